"""Evaluates the calls of a graph on tensors without data.

PyTorch's own meta kernels import a thousand modules when first used, which takes a second and 150 MB. The functions
that most image models consist of are evaluated here, all others by PyTorch, whose views import nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import kernels

#: An ``fx.Node``, typed loosely, as its arguments are declared too broadly for a type checker.
Node = Any


#: In ``node.meta``, beside "value": the node's value for a map of twice the images, height and width. Whatever is to
#: hold for all sizes has to hold for both.
LARGER = "larger"


def shapes(node: Any) -> tuple[torch.Size, torch.Size] | None:
    """The shapes of a node's value for the map and for a larger one; None if unknown."""
    if not isinstance(node, fx.Node):
        return None
    value, larger = node.meta.get("value"), node.meta.get(LARGER)
    return (value.shape, larger.shape) if isinstance(value, Tensor) and isinstance(larger, Tensor) else None


def values_of(node: Node) -> dict[str, Any]:
    """The metadata that `shapes` reads, for a node that replaces another one."""
    return {which: node.meta.get(which) for which in ("value", LARGER)}


def evaluate(node: Node, value_of: Callable[[Node], Any]) -> Any:
    """The result of a call for the values of its arguments; None if it cannot be evaluated."""
    target: Any = node.target
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        result = _by_rule(target, args, kwargs)
        if result is not None:
            return result
        return target(*args, **kwargs) if node.op == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)
    except Exception:  # of any function, on values without data
        return None


def _by_rule(target: Any, args: Any, kwargs: Any) -> Tensor | None:
    rule = _RULES.get(target)
    try:
        return None if rule is None else rule(*args, **kwargs)
    except Exception:  # of arguments that it does not know: PyTorch may
        return None


def has_dimensions(node: Node, count: int) -> bool:
    value = node.meta.get("value")
    return isinstance(value, Tensor) and value.dim() == count


def has_dtype_of(node: Node, other: Node) -> bool:
    """Whether two nodes have the same dtype: under autocast, sums and products may be wider than their maps."""
    value, expected = node.meta.get("value"), other.meta.get("value")
    return not (isinstance(value, Tensor) and isinstance(expected, Tensor)) or value.dtype == expected.dtype


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return x.new_empty(x.shape) if isinstance(x, Tensor) else None


def _broadcast(x: Any, y: Any) -> Tensor | None:
    if not isinstance(x, Tensor):
        x, y = y, x
    if not isinstance(y, Tensor):
        return x.new_empty(x.shape) if isinstance(y, int | float) and x.is_floating_point() else None
    if x.dtype != y.dtype:
        if not (x.is_floating_point() and y.is_floating_point() and x.dim() and y.dim()):
            return None
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = (t.new_empty(t.shape, dtype=dtype) for t in (x, y))
    shape = _broadcast_shape(x.shape, y.shape)
    if shape is None:
        return None
    larger = x if x.numel() >= y.numel() else y
    return larger.new_empty(larger.shape) if list(larger.shape) == shape else larger.new_empty(shape)


def _broadcast_onto(x: Tensor, y: Any) -> Tensor | None:
    """What keeps the first argument's shape and dtype."""
    result = _broadcast(x, y)
    return x.new_empty(x.shape) if result is not None and result.shape == x.shape else None


def _broadcast_shape(*shapes: Sequence[int]) -> list[int] | None:
    """Of two tensors; None where they do not fit. (PyTorch's own function for it imports as much as a call.)"""
    count = max(map(len, shapes))
    pairs = list(zip(*([1] * (count - len(shape)) + list(shape) for shape in shapes), strict=True))
    return [b if a == 1 else a for a, b in pairs] if all(a == b or 1 in (a, b) for a, b in pairs) else None


def _convolved(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor | None:
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        return None
    return _windows(x, weight.shape[2:], stride, padding, dilation, weight.shape[0])


def _windows(x: Tensor, taps: Any, stride: Any, padding: Any, dilation: Any, channels: int) -> Tensor | None:
    spans = [d * (k - 1) for d, k in zip(_pair(dilation), _pair(taps), strict=True)]
    pads = (
        {"same": spans, "valid": (0, 0)}.get(padding) if isinstance(padding, str) else [2 * p for p in _pair(padding)]
    )
    size = [(n + p - s) for n, p, s in zip(x.shape[2:], pads or (), spans, strict=True)]
    size = [(n - 1) // s + 1 for n, s in zip(size, _pair(stride), strict=True)]
    return x.new_empty((x.shape[0], channels, *size)) if min(size) > 0 else None


def _max_pooled(
    x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Tensor | None:
    if x.dim() != 4 or ceil_mode or return_indices:
        return None
    return _windows(x, kernel_size, stride or kernel_size, padding, dilation, x.shape[1])


def _average_pooled(x, kernel_size, stride=None, padding=0, ceil_mode=False, *_: Any, **__: Any) -> Tensor | None:
    return _max_pooled(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * 2 if len(values) == 1 else values


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if x.shape[-1] == weight.shape[1] else None


def _reduced(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor | None:
    if not x.is_floating_point() or dim in ((), []):  # which stand for all of them to some functions
        return None
    every = range(x.dim())
    dims = {every[d] for d in (every if dim is None else [dim] if isinstance(dim, int) else dim)}
    return x.new_empty([1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims])


def _norm(x: Tensor, p: Any = None, dim: Any = None, keepdim: bool = False) -> Tensor | None:
    return _reduced(x, dim, keepdim)


def _pooled(x: Tensor, output_size: Any) -> Tensor | None:
    size = _pair(output_size)
    return x.new_empty((*x.shape[:-2], *size)) if all(isinstance(n, int) for n in size) else None


def _cast(x: Tensor, dtype: Any) -> Tensor | None:
    return x.new_empty(x.shape, dtype=dtype) if isinstance(dtype, torch.dtype) else None


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    shapes = [list(t.shape) for t in tensors]
    dim = range(len(shapes[0]))[dim]
    length = sum(shape[dim] for shape in shapes)
    rests = {(t.dtype, *shape[:dim], -1, *shape[dim + 1 :]) for t, shape in zip(tensors, shapes, strict=True)}
    return tensors[0].new_empty([*shapes[0][:dim], length, *shapes[0][dim + 1 :]]) if len(rests) == 1 else None


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    shape = list(tensors[0].shape)
    dim = range(len(shape) + 1)[dim]
    same = {(t.dtype, t.shape) for t in tensors}
    return tensors[0].new_empty([*shape[:dim], len(tensors), *shape[dim:]]) if len(same) == 1 else None


def _resized(x: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> Tensor | None:
    count = x.dim() - 2
    sizes = scale_factor if size is None else size
    sizes = tuple(sizes) if isinstance(sizes, tuple | list) else (sizes,) * count
    if size is None:
        sizes = tuple(math.floor(float(n) * factor) for n, factor in zip(x.shape[2:], sizes, strict=True))
    return x.new_empty((*x.shape[:2], *sizes)) if len(sizes) == count and min(sizes) > 0 else None


def _shuffled(x: Tensor, factor: int) -> Tensor | None:
    *images, channels, height, width = x.shape
    if channels % factor**2:
        return None
    return x.new_empty((*images, channels // factor**2, height * factor, width * factor))


def _repeated(x: Tensor, *counts: Any) -> Tensor | None:
    counts = tuple(counts[0]) if isinstance(counts[0], tuple | list) else counts
    shape = [1] * (len(counts) - x.dim()) + list(x.shape)
    return x.new_empty([count * n for count, n in zip(counts, shape, strict=True)])


def _product(x: Tensor, y: Tensor) -> Tensor | None:
    if x.dim() < 2 or y.dim() < 2 or x.shape[-1] != y.shape[-2] or x.dtype != y.dtype:
        return None
    batch = _broadcast_shape(x.shape[:-2], y.shape[:-2])
    return None if batch is None else x.new_empty((*batch, x.shape[-2], y.shape[-1]))


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor | None:
    *batch, _length, width = query.shape
    fits = list(key.shape[:-2]) == batch and key.shape[:-1] == value.shape[:-1] and key.shape[-1] == width
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if fits and not enable_gqa else None


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv2d: _convolved, F.linear: _linear, F.adaptive_avg_pool2d: _pooled, F.max_pool2d: _max_pooled,
    F.avg_pool2d: _average_pooled, "to": _cast, torch.cat: _joined, torch.stack: _stacked, F.interpolate: _resized,
    torch.pixel_shuffle: _shuffled, "repeat": _repeated, F.scaled_dot_product_attention: _attended, "norm": _norm,
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum", torch.amax, "amax"), _reduced),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul"), _product),
    **dict.fromkeys(
        (
            operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.add, torch.sub, torch.mul,
            torch.div, torch.pow, "add", "sub", "mul", "div", "pow",
        ),
        _broadcast,
    ),
    **dict.fromkeys((operator.iadd, operator.imul, "add_", "mul_", "div_"), _broadcast_onto),
    **dict.fromkeys(
        (
            kernels.batch_norm, kernels.batch_norm_training, F.batch_norm, F.layer_norm, F.group_norm, F.gelu, F.relu,
            F.silu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, F.dropout, F.softmax,
            torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "softmax", "bernoulli_", "contiguous",
            F.relu_, F.hardtanh_, F.leaky_relu_, F.normalize, torch.roll, torch.rsqrt, torch.sqrt, torch.exp,
        ),
        _same,
    ),
}  # fmt: skip
