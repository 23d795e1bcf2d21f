"""``torch.compile(model, backend="ffnet_kernels")``: capture by PyTorch, our operators, inductor for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend

from . import autocast, kernels, patterns
from .capture import NotCapturable
from .normalize import NORM_ARGUMENTS, argument, is_mean_of_pixels, normalize
from .program import Constants, lower
from .shapes import LARGER, Node


def backend(module: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """The backend that ``torch.compile`` calls with each graph it captures.

    Without gradients, weights are folded as by `ffnet_kernels.optimize`, and folded again when one changes. The casts
    of autocast to bfloat16 on the CPU, which are not in the graph, become nodes of it. Under another autocast, or one
    that the graph itself switches, inductor compiles the graph unchanged.
    """
    inductor = lookup_backend("inductor")
    to = autocast.dtype()
    if to is not None:
        graph = module.graph
        if to not in autocast.DTYPES or not all(map(_is_on_cpu, example_inputs)) or any(map(_is_switch, graph.nodes)):
            return inductor(module, example_inputs, **options)
        try:
            spelled_out = fx.GraphModule(module, _copy_casting(graph, to))
        except ValueError:
            return inductor(module, example_inputs, **options)
        with autocast.SpelledOut():
            compiled = backend(spelled_out, example_inputs, **options)

        def run_without(*inputs: Any) -> Any:
            with autocast.SpelledOut():
                return compiled(*inputs)

        return run_without
    differentiable = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    graph = fx.Graph()
    placeholders = _copy(module.graph, graph, example_inputs)
    if torch.is_autocast_enabled("cuda"):
        return inductor(module, example_inputs, **options)
    try:
        if differentiable:
            _name_training_norms(graph)
        normalize(graph, draws=differentiable)
        patterns.rewrite(graph, fold=not differentiable)
    except NotCapturable:
        return inductor(module, example_inputs, **options)
    _average_by_rows(graph)
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
    statistics = _by_kind(
        [place for place in leaves if not isinstance(example_inputs[place], nn.Parameter)], example_inputs
    )
    known = [_as_one(example_inputs, places) for places in statistics]

    def run(*inputs: Any) -> Any:
        current = [_as_one(inputs, places) for places in statistics]
        if not all(map(torch.equal, current, known)):
            constants.known = None
            known[:] = current
        values = constants.values([inputs[place] for place in leaves])
        # There are no gradients: each operator would only pass through the Python that registers them.
        with torch._C._AutoDispatchBelowAutograd():
            return compiled(*(inputs[place] for place in others), *values)

    return run


def _by_kind(places: list[int], inputs: list[Any]) -> list[list[int]]:
    """The places of vectors of a dtype and device together, each other one alone."""
    kinds: dict[Any, list[int]] = {}
    for place in places:
        x = inputs[place]
        kinds.setdefault((x.dtype, x.device) if x.dim() == 1 else place, []).append(place)
    return list(kinds.values())


def _as_one(inputs: Sequence[Any], places: list[int]) -> Tensor:
    """A copy of several inputs as one tensor: to compare hundreds one by one takes most of a millisecond."""
    return torch.cat([inputs[place] for place in places]) if len(places) > 1 else inputs[places[0]].clone()


def _name_training_norms(graph: fx.Graph) -> None:
    """Batch normalisations that move running statistics, which Dynamo has as two calls, as the one of programs."""
    for node in list(graph.nodes):
        if node.target is not F.batch_norm or argument(node, 5, "training", False) is not True:
            continue
        x, *statistics = (argument(node, i, name, None) for i, name in enumerate(NORM_ARGUMENTS))
        momentum, eps = argument(node, 6, "momentum", 0.1), argument(node, 7, "eps", 1e-5)
        count = node.prev
        counted = count.target == "add_" and count.args[1:] == (1,) and "tensor" in count.args[0].meta
        if not counted or count.users or not all(isinstance(value, int | float) for value in (momentum, eps)):
            continue
        node.target, node.kwargs = kernels.batch_norm_training, {}
        node.args = (x, *statistics, count.args[0], momentum, eps)
        graph.erase_node(count)


def _average_by_rows(graph: fx.Graph) -> None:
    """Means over pixels as means of rows' means.

    Inductor adds the pixels of a channels-last map one after another, which for 112² of them rounds ten times as much
    as PyTorch does. Maps are channels-last here where they need not be in the plain model.
    """
    for node in list(graph.nodes):
        x = node.args[0] if node.args else None
        value = x.meta.get("value") if isinstance(x, fx.Node) else None
        if node.target in ("flatten", torch.flatten) or not is_mean_of_pixels(node) or node.kwargs.get("dtype"):
            continue
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_cpu:
            continue
        keeps = node.target is F.adaptive_avg_pool2d or argument(node, 2, "keepdim", False)
        with graph.inserting_before(node):
            mean = graph.call_method("mean", (graph.call_method("mean", (x, 3, True)), 2, True))
            node.replace_all_uses_with(mean if keeps else graph.call_method("flatten", (mean, 1)))
        graph.erase_node(node)


def _is_on_cpu(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_cpu


def _is_switch(node: Node) -> bool:
    return "autocast" in getattr(node.target, "__name__", "")


def _copy_casting(source: fx.Graph, to: torch.dtype) -> fx.Graph:
    """The same graph with the casts of autocast.

    Raises:
        ValueError: where autocast does more than to cast.
    """
    graph = fx.Graph()
    env: dict[Node, Node] = {}
    casts: dict[Node, Node] = {}

    def cast(node: Node) -> Node:
        value = node.meta.get("example_value")
        if not autocast.is_cast(value, to):
            return node
        if node not in casts:
            casts[node] = graph.call_method("to", (node, to))
            casts[node].meta["example_value"] = value.to(to)
        return casts[node]

    for node in source.nodes:
        if node.op.startswith("call") and autocast.casts(node.target):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: cast(env[other]))
            env[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
            env[node].meta = dict(node.meta)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    return graph


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
