"""Rewrites a captured graph without in-place operations, randomness, and anything that depends on memory formats.

Afterwards a node is its value: nodes may be merged, reordered and run on maps of any layout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from . import kernels
from .capture import NotCapturable
from .shapes import Node, has_dimensions, has_dtype_of, shapes

#: The first arguments of `torch.nn.functional.batch_norm`.
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias")

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)

#: In-place operation -> the functional one of the same value.
_FUNCTIONAL: dict[Any, Callable] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, F.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.hardtanh_: F.hardtanh,
    F.elu_: F.elu, torch.relu_: torch.relu, torch.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh,
}  # fmt: skip
_METHODS = {"add_", "sub_", "mul_", "div_", "relu_", "sigmoid_", "tanh_", "clamp_", "clamp_min_", "clamp_max_", "neg_"}

#: Methods whose result may share memory with the map.
_VIEWS = {
    "reshape", "view", "permute", "transpose", "flatten", "unflatten", "expand", "expand_as", "squeeze", "unsqueeze",
    "chunk", "split", "unbind", "narrow", "select", "reshape_as", "view_as", "movedim", "swapaxes", "t", "detach",
    "contiguous", "to", "float", "type_as", "tensor_split", "swapdims", "unfold", "einsum",
}  # fmt: skip
#: Methods and functions whose values do not depend on the layout, by name; and the elementwise ones below.
_PURE = _VIEWS | {
    "add", "sub", "mul", "div", "truediv", "neg", "pow", "matmul", "bmm", "linear", "exp", "sqrt", "rsqrt", "abs",
    "square", "mean", "sum", "amax", "amin", "max", "min", "softmax", "log_softmax", "sigmoid", "tanh", "relu", "relu6",
    "gelu", "silu", "mish", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "softplus", "softsign",
    "logsigmoid", "prelu", "clamp", "clamp_min", "clamp_max", "cat", "stack", "conv1d", "conv2d", "conv3d",
    "conv_transpose2d", "batch_norm", "layer_norm", "group_norm", "instance_norm", "normalize", "rms_norm",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "pad", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "roll", "flip", "repeat", "repeat_interleave", "gather",
    "index_select", "fold", "getitem", "size", "dim", "numel", "eq", "ne", "lt", "le", "gt", "ge",
    "floordiv", "mod", "scaled_dot_product_attention", "var_mean", "var", "std", "norm", "where", "baddbmm", "addmm",
    "addcmul", "true_divide", "floor_divide", "rsub", "multiply", "divide", "subtract", "boolean_dispatch", "_assert",
    "getattr", "max_pool2d_with_indices", "local_response_norm", "cumsum", "log", "sin", "cos", "erf", "selu", "celu",
    "glu", "softmin", "threshold", "lp_pool2d", "bilinear", "embedding", "cosine_similarity", "len", "floor", "ceil",
    "round", "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "zeros", "ones", "zeros_like", "ones_like", "arange",
    "invert", "logical_not", "bitwise_not",
}  # fmt: skip
_HOMES = ("torch", "_operator", "builtins", "math", "timm", "ffnet_kernels")
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "mT", "T"}


#: Functions whose gradients do not need their results, so that these may be changed in place.
_SAVE_NO_RESULT = {
    torch.conv2d, F.linear, F.batch_norm, kernels.batch_norm, kernels.batch_norm_training, operator.add, torch.add,
    operator.mul, torch.mul, "bernoulli_",
}  # fmt: skip


def normalize(graph: fx.Graph, *, draws: bool = False) -> None:
    """Rewrites the graph.

    Args:
        graph: as captured.
        draws: whether it may draw random numbers and update running statistics, in their order.

    Raises:
        NotCapturable: if it does something that cannot be written so.
    """
    seen: set[Node] = set()
    for node in list(graph.nodes):
        if _moves_statistics(node):
            raise NotCapturable(f"{_name(node)} moves running statistics")
        if draws and node.target in (F.instance_norm, F.group_norm):
            raise NotCapturable(f"PyTorch's gradients of {_name(node)} are wrong on channels-last maps of one image")
        if node.op in ("call_function", "call_method"):
            _normalize(graph, node, seen, draws)
        seen.add(node)
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method") and not (_is_pure(node) or (draws and _is_draw(node))):
            raise NotCapturable(f"{_name(node)} is not known to depend on values alone")
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or _is_draw(node))


def _normalize(graph: fx.Graph, node: Node, seen: set[Node], draws: bool) -> None:
    target: Any = node.target
    if target in _DROPOUTS:
        if argument(node, 2, "training", True) is False:
            _replace(graph, node, node.args[0])
        elif not draws or not _is_in_rows(node.args[0]) or argument(node, 3, "inplace", False):
            raise NotCapturable("dropout draws random numbers, in the order of a map's memory")
    elif target is F.scaled_dot_product_attention and argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise NotCapturable("attention draws random numbers for its dropout")
    elif node.op == "call_method" and target == "contiguous" and len(node.args) == 1 and not node.kwargs:
        _replace(graph, node, node.args[0])
    elif node.op == "call_method" and target in ("view", "view_as") and not _views_as_dtype(node):
        node.target = target.replace("view", "reshape")
    elif target in _FUNCTIONAL:
        _make_functional(node, _FUNCTIONAL[target], seen, draws)
    elif node.op == "call_method" and target in _METHODS:
        _make_functional(node, target[:-1], seen, draws)
    elif _in_place_flag(node):
        node.args, node.kwargs = _without_in_place(node)
        _make_functional(node, target, seen, draws)
    elif target is operator.add and 0 in node.args:  # the start value of sum()
        others = [a for a in node.args if isinstance(a, fx.Node)]
        if len(others) == 1:
            _replace(graph, node, others[0])


_ROWWISE = {F.linear, F.gelu, F.relu, F.silu, F.hardswish, F.batch_norm, F.layer_norm, kernels.batch_norm, F.dropout}


def _is_in_rows(node: Any) -> bool:
    """Whether a node is a matrix in row-major order whatever the format of the map."""
    while isinstance(node, fx.Node) and has_dimensions(node, 2) and not is_mean_of_pixels(node):
        if node.target is F.linear:
            return True
        if node.target not in _ROWWISE and node.target is not kernels.batch_norm_training:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and has_dimensions(node, 2)


def _replace(graph: fx.Graph, node: Node, other: Any) -> None:
    node.replace_all_uses_with(other)
    graph.erase_node(node)


_IN_PLACE_AT = {F.relu: 1, F.relu6: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1, F.elu: 2, F.selu: 1,
                F.celu: 2, F.leaky_relu: 2, F.hardtanh: 3, F.threshold: 3}  # fmt: skip


def _in_place_flag(node: Node) -> bool:
    target: Any = node.target
    if target not in _IN_PLACE_AT:
        return node.kwargs.get("inplace", False) is not False
    return argument(node, _IN_PLACE_AT[target], "inplace", False) is not False


def _without_in_place(node: Node) -> tuple[tuple, dict]:
    place = _IN_PLACE_AT.get(node.target, len(node.args))
    return node.args[:place], {name: value for name, value in node.kwargs.items() if name != "inplace"}


def _make_functional(node: Node, target: Any, seen: set[Node], draws: bool) -> None:
    """Makes a node leave its map alone: later readers of that map read the node instead."""
    changed = node.args[0]
    if not isinstance(changed, fx.Node):
        raise NotCapturable(f"{_name(node)} changes something that is no map of the model's own")
    of_others = changed.op not in ("call_function", "call_method") or is_view(changed)
    if of_others or any(is_view(user) for user in changed.users if user in seen):
        raise NotCapturable(f"{_name(node)} changes a map that others may see in place")
    if draws and (len(changed.users) > 1 or changed.target not in _SAVE_NO_RESULT):
        raise NotCapturable(f"{_name(node)} changes in place what a gradient may need")
    if any(not has_dtype_of(a, changed) for a in node.args[1:] if isinstance(a, fx.Node)):
        raise NotCapturable(f"{_name(node)} casts what it takes to the dtype of the map that it changes")
    node.target = target
    for user in [user for user in changed.users if user is not node and user not in seen]:
        user.replace_input_with(changed, node)


def _moves_statistics(node: Node) -> bool:
    """Whether a normalisation updates the running statistics passed to it."""
    if node.target in (torch.batch_norm, torch.instance_norm):
        return True
    flags = {F.batch_norm: ("training", False), F.instance_norm: ("use_input_stats", True)}
    if node.target not in flags:
        return False
    uses_batch = argument(node, 5, *flags[node.target]) is not False
    return uses_batch and isinstance(argument(node, 1, "running_mean", None), fx.Node)


def _is_draw(node: Node) -> bool:
    """Whether a node updates running statistics, or draws random numbers in an order that does not depend on a
    layout."""
    if node.target in (F.dropout, kernels.batch_norm_training):
        return True
    is_bernoulli = node.op == "call_method" and node.target == "bernoulli_" and len(node.args) == 2
    if node.target == "new_empty":
        return all(user.target == "bernoulli_" for user in node.users)
    return is_bernoulli and node.args[0].target == "new_empty" and len(node.args[0].users) == 1


def _is_pure(node: Node) -> bool:
    name = _name(node)
    if node.op == "call_method":
        return name in _PURE
    target: Any = node.target
    if target is kernels.batch_norm:
        return True
    if target is getattr:
        return node.args[1] in _ATTRIBUTES
    home = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
    return name in _PURE and home in _HOMES


def _views_as_dtype(node: Node) -> bool:
    return bool(node.kwargs) or any(isinstance(a, torch.dtype) for a in node.args)


def _name(node: Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def is_view(node: Node) -> bool:
    """Whether a node's result may share its map's memory in another shape."""
    return _name(node) in _VIEWS or node.target in (operator.getitem, getattr)


def argument(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument that may have been passed by position or by keyword."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def is_mean_of_pixels(node: Node) -> bool:
    """Whether a node takes the mean over pixels, or removes pixel dimensions of size one."""
    if node.target in ("mean", torch.mean):
        dims = argument(node, 1, "dim", None)
        return isinstance(dims, tuple | list) and tuple(dims) in ((2, 3), (-2, -1), [2, 3])
    if node.target is F.adaptive_avg_pool2d:
        return argument(node, 1, "output_size", None) in (1, (1, 1), [1, 1])
    if node.target in ("flatten", torch.flatten):
        before, after = shapes(node.args[0]), shapes(node)
        one_pixel = before is not None and all(len(shape) == 4 and shape[2:] == (1, 1) for shape in before)
        return one_pixel and after is not None and len(after[0]) == 2
    return False
