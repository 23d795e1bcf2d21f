"""``torch.compile(model, backend="ffnet_kernels")``: capture by PyTorch, our operators, inductor for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend

from . import patterns
from .capture import NotCapturable
from .normalize import normalize
from .program import Constants, lower
from .shapes import LARGER, Node


def backend(module: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """The backend that ``torch.compile`` calls with each graph it captures.

    Without gradients, weights are folded as by `ffnet_kernels.optimize`, and folded again when one changes. Under
    autocast, whose casts are not in the graph, inductor compiles the graph unchanged.
    """
    inductor = lookup_backend("inductor")
    differentiable = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    graph = fx.Graph()
    placeholders = _copy(module.graph, graph, example_inputs)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return inductor(module, example_inputs, **options)
    try:
        normalize(graph)
        patterns.rewrite(graph, fold=not differentiable)
    except NotCapturable:
        return inductor(module, example_inputs, **options)
    if differentiable:
        return inductor(fx.GraphModule(module, graph), example_inputs, **options)
    constants = Constants(graph)
    places = {node: place for place, node in enumerate(placeholders)}
    leaves = [places[node] for node in constants.leaves]
    others = [place for node, place in places.items() if "tensor" not in node.meta]
    values: list[Any] = constants.values([example_inputs[place] for place in leaves])
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:  # unlike those of inputs, their sizes never change
        values = [context.fake_mode.from_tensor(value, static_shapes=True) for value in values]
    lowered = fx.GraphModule(module, lower(graph, constants))
    compiled = inductor(lowered, [*(example_inputs[place] for place in others), *values], **options)

    # Batch normalisation updates running statistics without changing their versions, so their values are compared.
    statistics = [place for place in leaves if not isinstance(example_inputs[place], nn.Parameter)]
    known = [example_inputs[place].clone() for place in statistics]

    def run(*inputs: Any) -> Any:
        if not all(torch.equal(inputs[place], before) for place, before in zip(statistics, known, strict=True)):
            constants.known = None
            known[:] = [inputs[place].clone() for place in statistics]
        values = constants.values([inputs[place] for place in leaves])
        return compiled(*(inputs[place] for place in others), *values)

    return run


def _copy(source: fx.Graph, graph: fx.Graph, example_inputs: list[Any]) -> list[Node]:
    """Copies a Dynamo graph and marks its parameters and buffers, which are passed in with every call."""
    env: dict[Node, Node] = {}
    placeholders = []
    for node in source.nodes:
        copy = env[node] = graph.node_copy(node, env.__getitem__)
        value = node.meta.get("example_value")
        copy.meta = {"value": value, LARGER: value}
        if node.op == "placeholder":
            placeholders.append(copy)
    for copy, value in zip(placeholders, example_inputs, strict=True):
        if getattr(value, "_dynamo_static_input_type", None) is not None:
            copy.meta["tensor"] = value
    return placeholders
