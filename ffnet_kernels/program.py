"""A module's computation as a straight sequence of operators, below modules and autograd."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import autocast, kernels, onednn, patterns, steps
from .backends import choice, cpu, crossover
from .capture import NotCapturable, capture
from .nodes import has_shape_of, is_node
from .normalize import is_view, normalize
from .prefetch import Prefetch
from .shapes import LARGER, Node, has_dimensions
from .state import State

_FEW_STEPS = 4
_ANY_SIZE = (None, None)


class Program:
    """What a module computes from one map, in the state in which this was made.

    Attributes:
        graph: its operators.
        state: what it was made of.
    """

    def __init__(self, module: nn.Module, state: State, x: Tensor, differentiable: bool) -> None:
        #: The dtype that autocast casts to; None if it is off.
        self.autocast = autocast.dtype()
        graph, grows = _capture(module, x)
        #: The number of images, and the height and width, that it is for; None for any.
        self.size = None if grows[0] else x.shape[0], None if grows[1] else x.shape[2:]
        if not state.is_current(module):
            raise NotCapturable("its forward changes the modules")
        normalize(graph, draws=differentiable)
        patterns.rewrite(graph, fold=not differentiable)
        if not any(node.target in kernels.FUSED or node.meta.get("is_folded") for node in graph.nodes):
            reasons = dict.fromkeys(node.meta["reason"] for node in graph.nodes if "reason" in node.meta)
            why = f" ({', '.join(reasons)})" if reasons else ""
            raise NotCapturable(f"nothing in it is for an operator{why}")
        if not differentiable and any(map(is_constant, _output(graph).all_input_nodes)):
            raise NotCapturable("its result is made of weights alone")
        self.state, self.graph, self.differentiable = state, graph, differentiable
        if x.device.type == "cpu":
            onednn.lower(graph, pack=not differentiable)
        self.constants = Constants(graph, computed=not differentiable)
        self.tensors = [node.meta["tensor"] for node in self.constants.leaves]
        self.dtype, self.device = self.constants.kind()
        if x.dtype != self.dtype and self.autocast is None:
            raise NotCapturable(f"its parameters are of {self.dtype}, its map of {x.dtype}")
        self.map_dtype = x.dtype
        registered = (node.meta["tensor"] for node in self.constants.leaves if not node.meta.get("is_kept"))
        self.sample = next(t for t in registered if t.is_floating_point())
        gives_maps = any(not has_dimensions(node, 2) for node in _output(graph).all_input_nodes)
        self.filters = [tensor for tensor in self.tensors if gives_maps and tensor.dim() == 4]
        #: Running statistics that a training step updates, and whether it draws random numbers.
        self.moved = [node.meta["tensor"] for node in self.constants.leaves if _is_statistic(node)]
        self.draws = any(node.target in (F.dropout, "bernoulli_") for node in graph.nodes)
        lowered = lower(graph, self.constants)
        if not differentiable:
            _reuse(lowered)
        self.channels = x.shape[1]
        work = [node for node in lowered.nodes if node.op.startswith("call") and not is_view(node)]
        #: Whether maps stay in the format they come in: to convert them there and back takes as long as a few steps.
        self.keeps_format = gives_maps and len(work) <= _FEW_STEPS
        self.lone_weight = _lone_weight(work, self.constants)
        self.code = self.direct = _compile(lowered)
        if not differentiable and kernels.is_direct(x):
            _call_natively(lowered, self.keeps_format)
            steps.join(lowered)
            self.direct = _compile(lowered)
        #: The strides of results by the map's shape and strides and `weight_strides`; and of the map's gradient.
        self.layouts: dict[tuple, list[tuple]] = {}
        self.grad_strides: dict[tuple, tuple] = {}
        self.is_compared = False  # a program with gradients, with what the modules compute
        for node in graph.nodes:  # nodes form reference cycles and outlive the model; its weights should not
            node.meta.pop("tensor", None), node.meta.pop("counted_by", None)

    def is_current(self, module: nn.Module) -> bool:
        """Whether the module is still in the state that the program was made of."""
        if self.sample.dtype != self.dtype or self.sample.device != self.device:  # moved to other memory in place
            return False
        touched = self.state.touched
        current = self.state.is_current(module)
        if touched != self.state.touched:  # it may have been in training mode meanwhile, which updates statistics
            self.constants.known = None
        return current

    def takes(self, x: Tensor) -> bool:
        return (
            x.dtype == self.map_dtype
            and x.device == self.device
            and x.dim() == 4
            and x.shape[1] == self.channels
            and self.fits(x)
        )

    @property
    def is_for_any_size(self) -> bool:
        return self.size == _ANY_SIZE

    def fits(self, x: Tensor) -> bool:
        """Whether it is for maps of this size and the present autocast mode."""
        if self.autocast != autocast.dtype():
            return False
        return self.is_for_any_size or (self.size[0] in (None, x.shape[0]) and self.size[1] in (None, x.shape[2:]))

    def why_small(self, x: Tensor) -> crossover.Slower | None:
        """Why PyTorch takes as long, if it is only a 1×1 convolution that takes less time than the checks before
        running it."""
        work = (self.lone_weight or math.inf) * x.shape[0] * x.shape[2] * x.shape[3]
        return crossover.Slower("little_work", int(work)) if work <= crossover.now.little_work else None

    def weight_strides(self) -> Iterator[tuple[int, ...]]:
        """The strides that, with the map's, determine those of results that are maps; nothing if none is."""
        return map(Tensor.stride, self.filters)

    def run(self, x: Tensor, aside: bool = False) -> Any:
        """Runs the program; with gradients ``aside``, on copies of what it may move, such as running statistics."""
        if self.autocast is None:
            return self._run(x, aside)
        with autocast.SpelledOut():
            return self._run(x, aside)

    def _run(self, x: Tensor, aside: bool) -> Any:
        if self.device.type == "cpu" and not self.keeps_format:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.differentiable:
            values = self.constants.values(self.tensors)
            if aside:
                values = [value if isinstance(value, nn.Parameter) else value.clone() for value in values]
            return self.code(None, x, *values)
        with torch._C._AutoDispatchBelowAutograd():
            # So that a profile shows operators by name.
            is_direct = choice.prefers_cpu() and not torch._C._autograd._profiler_enabled()
            code = self.direct if is_direct else self.code
            return code(None, x, *self.constants.values(self.tensors))


def _capture(module: nn.Module, x: Tensor) -> tuple[fx.Graph, tuple[bool, bool]]:
    """Captures the graph of a module for as many map sizes as possible, and says which sizes may change: see
    `capture`."""
    for grows in ((True, True), (True, False)):
        try:
            graph = capture(module, x, grows)
        except NotCapturable:  # it may decide by the size of the map
            break
        values = [node.meta for node in graph.nodes if node.op != "output"]
        if all(meta["value"] is None or meta[LARGER] is not None for meta in values):
            return graph, grows
    return capture(module, x, (False, False)), (False, False)


class Constants:
    """The tensors that steps read: parameters, and values computed from parameters alone.

    Attributes:
        leaves: the nodes of parameters and buffers, which have ``meta["tensor"]``.
        inputs: the nodes that other nodes read.
    """

    def __init__(self, graph: fx.Graph, computed: bool = True) -> None:
        self.leaves = [node for node in graph.nodes if "tensor" in node.meta]
        self.order = [n for n in graph.nodes if "tensor" in n.meta or (computed and is_constant(n))]
        known = set(self.order)
        self.inputs = [n for n in self.order if not known.issuperset(n.users)]
        sources = {n for node in self.order for n in node.all_input_nodes if "tensor" in n.meta}
        self.sources = [i for i, node in enumerate(self.leaves) if node in sources]
        counters = {id(t): t for t in (self.leaves[i].meta.get("counted_by") for i in self.sources) if t is not None}
        self.counters = list(counters.values())
        self.shapes = [node.meta["tensor"].shape for node in self.leaves]
        self.known: Known | None = None

    def kind(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and the device of all floating-point tensors."""
        tensors = [node.meta["tensor"] for node in self.leaves]
        kinds = {(t.dtype, t.device) for t in tensors if t.is_floating_point()}
        if len(kinds) != 1:
            raise NotCapturable(f"its parameters are of {len(kinds)} kinds: {kinds or 'none'}")
        return kinds.pop()

    def values(self, tensors: list[Tensor]) -> list[Tensor]:
        """The values of ``inputs`` for the tensors of ``leaves``; recomputed if one of those has changed."""
        known, steps = self.known, _steps.count  # read once, as other threads may replace it
        same = (
            known is not None
            and known.steps == steps
            and (tensors is known.tensors or all(map(is_, tensors, known.tensors)))
        )
        sources = known.sources if known and same else [*(tensors[i] for i in self.sources), *self.counters]
        if known and same:
            known.prefetch()
        versions, places = _versions(sources), _places(sources)
        if (
            not known or not same or versions != known.versions or places != known.places
            or any(map(_is_gone, known.storages))
        ):  # fmt: skip
            kinds = {(t.dtype, t.device) for t in tensors if t.is_floating_point()}
            if len(kinds) > 1:
                raise RuntimeError(f"parameters are of {len(kinds)} kinds: {kinds}")
            if [t.shape for t in tensors] != self.shapes:
                raise RuntimeError("parameters have other shapes than when the program was made")
            memory = [StorageWeakRef(source.untyped_storage()) for source in sources]
            values = self._compute(tensors)
            storages = [reference.cdata for reference in memory]
            prefetch = Prefetch(tensors=sources, storages=storages)
            known = self.known = Known(tensors, sources, versions, places, memory, storages, steps, values, prefetch)
        return known.values

    @torch.no_grad()
    def _compute(self, tensors: list[Tensor]) -> list[Tensor]:
        env: dict[Node, Any] = dict(zip(self.leaves, tensors, strict=True))
        for node in self.order:
            if node not in env:
                env[node] = call(node, env.__getitem__)
            for other in node.all_input_nodes:  # one copy of the weights, not one for each fold
                if other not in self.leaves and other not in self.inputs and all(user in env for user in other.users):
                    env[other] = None
        if any(node.target is onednn.packed_weight for node in self.order):
            onednn.give_back_memory()
        return [env[node] for node in self.inputs]


class Known(NamedTuple):
    """Constants, and what they were computed from."""

    tensors: list[Tensor]
    sources: list[Tensor]  # of these, and what counts for running statistics
    versions: list[int]
    # PyTorch does not change the version of a parameter that is given other memory. The same address may be other
    # memory, too: then the earlier storage has been freed.
    places: list[int]
    memory: list[StorageWeakRef]
    storages: list[int]
    steps: int
    values: list[Tensor]
    prefetch: Prefetch


class _Steps:
    """Counts the steps of all optimizers: fused ones change weights without changing their versions."""

    count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps)

_is_gone = torch.UntypedStorage._expired
_version_of = operator.attrgetter("_version")


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(_version_of, tensors))  # hundreds, in every call
    except RuntimeError:  # tensors made in inference mode have none
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _places(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # tensors that torch.compile traces with
        return []


def call(node: Node, value_of: Callable[[Node], Any]) -> Any:
    """Executes the call that a node stands for."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    target: Any = node.target
    return target(*args, **kwargs) if node.op == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)


def is_constant(node: Node) -> bool:
    """Whether a node's value is computed from parameters alone."""
    if "constant" not in node.meta:
        computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
        node.meta["constant"] = "tensor" in node.meta or (computed and all(map(is_constant, node.all_input_nodes)))
    return node.meta["constant"]


#: Functions that may overwrite their first argument if nothing else reads it, and their in-place forms.
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    F.relu: F.relu_, F.hardtanh: F.hardtanh_, F.leaky_relu: F.leaky_relu_, torch.sigmoid: torch.sigmoid_,
    F.relu6: lambda x: F.hardtanh_(x, 0.0, 6.0), F.hardswish: lambda x: F.hardswish(x, True),
    F.hardsigmoid: lambda x: F.hardsigmoid(x, True), F.silu: lambda x: F.silu(x, True),
    operator.add: Tensor.add_, torch.add: Tensor.add_, operator.mul: Tensor.mul_, torch.mul: Tensor.mul_,
}  # fmt: skip
_COMMUTES = (operator.add, torch.add, operator.mul, torch.mul)

#: Functions that return a fresh map.
_FRESH = {
    *kernels.FUSED, kernels.convolution, onednn.convolution, onednn.packed_convolution, kernels.batch_norm,
    F.linear, F.layer_norm, F.avg_pool2d, torch.cat,
    *_IN_PLACE, *_IN_PLACE.values(),
}  # fmt: skip


def _reuse(graph: fx.Graph) -> None:
    """Makes elementwise functions overwrite maps that only they read."""
    for node in graph.nodes:
        in_place = _IN_PLACE.get(node.target) if node.op == "call_function" and not node.kwargs else None
        if in_place is None:
            continue
        for place, x in enumerate(node.args[:2] if node.target in _COMMUTES else node.args[:1]):
            is_fresh = is_node(x) and x.target in _FRESH and len(x.users) == 1 and node.args.count(x) == 1
            if is_fresh and has_shape_of(x, node) and x.meta["value"].dtype == node.meta["value"].dtype:
                node.args = node.args if place == 0 else (x, node.args[0])
                node.target = in_place
                break


def _is_statistic(node: Node) -> bool:
    return str(node.target).rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def lower(graph: fx.Graph, constants: Constants) -> fx.Graph:
    """The same graph as a function of the map and of ``constants.inputs``."""
    lowered = fx.Graph()
    env: dict[Node, Node] = {}
    known = set(constants.order)
    for node in graph.nodes:
        if node.op == "placeholder" and node not in known:
            env[node] = lowered.node_copy(node)
    for node in constants.inputs:
        env[node] = lowered.placeholder(f"constant_{len(env)}")
    for node in graph.nodes:
        if node not in known and node not in env:
            env[node] = lowered.node_copy(node, env.__getitem__)
    return lowered


def _lone_weight(steps: list[Node], constants: Constants) -> int | None:
    """The number of elements of an unfolded weight, if the graph only multiplies with it."""
    if len(steps) != 1 or len(constants.order) != len(constants.leaves):
        return None
    bare = steps[0].target is kernels.conv2d and steps[0].args[5:] == ("none", None, None)
    return math.prod(constants.leaves[0].meta["shape"]) if bare or steps[0].target is kernels.projection else None


def _call_natively(graph: fx.Graph, any_format: bool) -> None:
    """Calls native operators without the checks of `kernels`, 2 µs each, if these have the same outcome every time.

    The outcome is the same for every map with the channels that the graph was captured for; for dense convolutions, if
    maps are channels-last.
    """
    for node in graph.nodes:
        native, maps = kernels.NATIVE.get(node.target), node.args[:1]
        if any_format and node.target is kernels.conv2d:
            continue
        x = maps[0].meta.get("value") if maps and is_node(maps[0]) else None
        if native is None or not isinstance(x, Tensor) or x.dim() != 4 or cpu.slower_map(x) is not None:
            continue
        if node.target is kernels.depthwise_conv2d:
            if x.shape[1] != node.args[6]:
                continue
            node.args = node.args[:6]
        else:
            scale = node.args[-2] if node.target is not kernels.conv2d_pair else None
            if scale is not None:  # as [C]
                with graph.inserting_before(node):
                    node.args = (*node.args[:-2], graph.call_method("reshape", (scale, -1)), node.args[-1])
        node.target = native


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """Compiles a graph to a function that frees values once they are no longer needed."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<ffnet_kernels program>", "exec"), scope)
    return scope["forward"]
