"""``torch.export`` of a model with our operators in the program, or without them."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import kernels, patterns
from .backends import choice, crossover
from .capture import NotCapturable, capture
from .normalize import normalize
from .optimize import plainly, require_module
from .program import Constants, lower
from .shapes import Node
from .trial import difference


def export(
    model: nn.Module, example: Tensor, *, operators: bool = True, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """Exports a model's inference by ``torch.export``, for ``torch.export.save``, AOTInductor and the like.

    The program is that of the plain model, whether or not `optimize` was called, and the model is left unchanged. The
    program is run once and compared with the model.

    Args:
        model: in eval mode, whose forward takes one tensor.
        example: a tensor like those it is to take. On the CPU, where operators are kept, maps of four dimensions are
            made channels-last first.
        operators: whether layers become operators of ``torch.ops.ffnet_kernels`` (on a GPU
            ``torch.ops.ffnet_kernels_cuda``), with batch normalisation, parallel branches and layer scales folded into
            their weights. Whatever loads the program then needs those operators, by ``import ffnet_kernels`` or, in
            C++, by loading the library. Otherwise the program has PyTorch's operators only, and nothing is folded.
        dynamic_batch: whether the program takes any number of images, one or more; otherwise only that of the example.

    Raises:
        TypeError: if the model is not a module, or the example not a tensor.
        ValueError: if the model is in training mode, has no operators to keep, or does not work for every batch size.
        RuntimeError: if the program does not compute what the model does, and whatever ``torch.export`` raises.
    """
    require_module(model, "export")
    if not isinstance(example, Tensor):
        raise TypeError(f"export: expected a tensor as the example, got {type(example).__name__}")
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f"export: expected a model in eval mode, {training} is in training mode (call .eval())")
    if dynamic_batch and example.dim() > 0 and example.shape[0] < 2:  # torch.export treats 0 and 1 as constants
        example = torch.cat([example, example]) if len(example) else example.new_zeros(2, *example.shape[1:])
    with torch.no_grad(), choice.keep_operators(operators):
        program = _export(_kept(model, example, dynamic_batch) if operators else model, example, dynamic_batch)
        if operators and not any(str(node.target).startswith("ffnet_kernels") for node in program.graph.nodes):
            raise ValueError("export: nothing in the model is for an operator; operators=False exports it as it is")
        reason = _difference(program.module()(example), plainly(model, example))
    if reason is not None:
        raise RuntimeError(f"export: the program is not what the model is: {reason}")
    return program


def _difference(out: Any, expected: Any) -> str | None:
    """Like `difference`, for results that may contain constants as well."""
    (leaves, spec), (expected_leaves, expected_spec) = tree_flatten(out), tree_flatten(expected)
    constants, expected_constants = ([a for a in of if not isinstance(a, Tensor)] for of in (leaves, expected_leaves))
    if spec != expected_spec or constants != expected_constants:
        return "the result has another structure"
    return difference(*([a for a in of if isinstance(a, Tensor)] for of in (leaves, expected_leaves)))


def _export(model: nn.Module, example: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = {0: torch.export.Dim("batch")} if dynamic_batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        return torch.export.export(_OneArgument(model), (example,), dynamic_shapes=(shapes,))


class _OneArgument(nn.Module):
    """A model with one input, whose forward may have further arguments, or other names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def _kept(model: nn.Module, x: Tensor, dynamic_batch: bool) -> nn.Module:
    """A model rewritten onto the operators."""
    try:
        graph = capture(model, x, (dynamic_batch, False))
        return _Kept(graph)
    except NotCapturable:  # user-defined classes
        return _captured_by_dynamo(model, x, dynamic_batch)


class _Kept(nn.Module):
    """A graph of operators that holds its constants as buffers."""

    def __init__(self, graph: fx.Graph, finish: Callable[[fx.Graph], Any] | None = None) -> None:
        super().__init__()
        normalize(graph)
        patterns.rewrite(graph)
        constants = Constants(graph)
        names = [_name_of(node, place) for place, node in enumerate(constants.inputs)]
        for node in graph.nodes:
            if node.target is kernels.linear:
                node.target = _linear_of(node)
        leaves = [node.meta["tensor"] for node in constants.leaves]
        values = dict(zip(names, constants.values(leaves), strict=True))
        lowered = lower(graph, constants)
        if finish is not None:
            finish(lowered)
        for name, value in values.items():
            self.register_buffer(name, _of_its_own(value.detach()))
        self.code = fx.GraphModule({}, lowered)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        if x.is_cpu and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.code(x, *self._buffers.values())


def _of_its_own(value: Tensor) -> Tensor:
    """A tensor that owns all of its storage, so that a file holds no more than it needs: itself, or a copy."""
    is_whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if is_whole else value.clone()


def _name_of(node: Node, place: int) -> str:
    """The name of a buffer: a parameter's path, or a number if it is computed from several."""
    path = str(node.target).replace(".", "_") if node.op == "get_attr" else ""
    return f"{path}_{place}" if path.isidentifier() else f"folded_{place}"


def _linear_of(node: Node) -> Callable[..., Tensor]:
    """What `kernels.linear` does for the example's number of rows; the program does the same for all."""
    x = node.args[0].meta.get("value")
    rows = x.numel() // x.shape[-1] if isinstance(x, Tensor) else 0
    if isinstance(rows, torch.SymInt):  # whose conversion would make the number of images that of the example
        rows = rows.node.hint
    return kernels.linear_of_few_rows if rows <= crossover.now.few_rows else kernels.linear_of_many_rows


def _captured_by_dynamo(model: nn.Module, x: Tensor, dynamic_batch: bool) -> nn.Module:
    """A model of arbitrary classes, captured as a whole by PyTorch."""
    results: list[Any] = []
    kept: list[_Kept] = []

    from .dynamo import _copy  # imports much

    def take(module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        graph = fx.Graph()
        placeholders = _copy(module.graph, graph, inputs)
        others = [node for node in placeholders if "tensor" not in node.meta]
        if kept:
            raise ValueError("export: its forward is more than one graph")
        maps = [node for node in others if isinstance(node.meta["value"], Tensor)]
        if len(maps) != 1:
            raise ValueError(f"export: expected one tensor that is no parameter or buffer, got {len(maps)}")

        def sized(lowered: fx.Graph) -> None:
            """The map as the only input, which determines the number of images."""
            given = [node for node in lowered.nodes if node.op == "placeholder"][: len(others)]
            image = given[others.index(maps[0])]
            first = next(node for node in lowered.nodes if node.op != "placeholder")
            for node in given:
                if node is not image:
                    with lowered.inserting_before(first):
                        node.replace_all_uses_with(lowered.call_method("size", (image, 0)))
                    lowered.erase_node(node)

        with contextlib.suppress(NotCapturable):  # operators that the model itself calls are kept
            kept.append(_Kept(graph, sized))

        def run(*values: Any) -> Any:
            results[:] = module(*values)
            return tuple(results)

        return run

    def call(x: Tensor) -> Any:
        return model(x)

    call = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)  # never compiled yet
    example = x.clone()
    if dynamic_batch:
        torch._dynamo.mark_dynamic(example, 0)
    expected = torch.compile(call, backend=take, fullgraph=True)(example)
    if not kept:
        return model
    leaves, spec = tree_flatten(expected)
    places = {
        place: next((i for i, result in enumerate(results) if result is leaf), -1)
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
    }
    if -1 in places.values():
        raise ValueError("export: its result is not made of the tensors that its graph gives")
    return _Structured(kept[0], places, [leaf for leaf in leaves if not isinstance(leaf, Tensor)], spec)


class _Structured(nn.Module):
    """A graph whose results are assembled like the model's: tensors in their places, constants in the others."""

    def __init__(self, kept: _Kept, places: dict[int, int], constants: list[Any], spec: Any) -> None:
        super().__init__()
        self.kept, self.places, self.constants, self.spec = kept, places, constants, spec
        self.eval()

    def forward(self, x: Tensor) -> Any:
        results, constants = self.kept(x), iter(self.constants)
        count = len(self.places) + len(self.constants)
        leaves = [results[self.places[i]] if i in self.places else next(constants) for i in range(count)]
        return tree_unflatten(leaves, self.spec)
