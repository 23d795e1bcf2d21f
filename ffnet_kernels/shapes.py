"""Evaluates the calls of a graph on tensors without data.

PyTorch's own meta kernels import a thousand modules when first used, which takes a second and 150 MB. The functions
that most image models consist of are evaluated here, all others by PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
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
        rule = _RULES.get(target)
        result = None if rule is None else rule(*args, **kwargs)
        if result is not None:
            return result
        return target(*args, **kwargs) if node.op == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)
    except Exception:  # of any function, on values without data
        return None


def has_dimensions(node: Node, count: int) -> bool:
    value = node.meta.get("value")
    return isinstance(value, Tensor) and value.dim() == count


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
    sizes = [[1] * (max(x.dim(), y.dim()) - t.dim()) + list(t.shape) for t in (x, y)]
    pairs = list(zip(*sizes, strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    larger = x if x.numel() >= y.numel() else y
    shape = [b if a == 1 else a for a, b in pairs]
    return larger.new_empty(larger.shape) if list(larger.shape) == shape else larger.new_empty(shape)


def _convolved(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor | None:
    strides, dilations = _pair(stride), _pair(dilation)
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        return None
    spans = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    pads = (
        {"same": spans, "valid": (0, 0)}.get(padding) if isinstance(padding, str) else [2 * p for p in _pair(padding)]
    )
    size = [(n + p - s) for n, p, s in zip(x.shape[2:], pads or (), spans, strict=True)]
    return x.new_empty((x.shape[0], weight.shape[0], *((n - 1) // s + 1 for n, s in zip(size, strides, strict=True))))


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * 2 if len(values) == 1 else values


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if x.shape[-1] == weight.shape[1] else None


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor | None:
    if not isinstance(dim, tuple | list):
        return None
    dims = {d % x.dim() for d in dim}
    return x.new_empty([1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims])


def _pooled(x: Tensor, output_size: Any) -> Tensor | None:
    size = _pair(output_size)
    return x.new_empty((*x.shape[:-2], *size)) if all(isinstance(n, int) for n in size) else None


def _cast(x: Tensor, dtype: Any) -> Tensor | None:
    return x.new_empty(x.shape, dtype=dtype) if isinstance(dtype, torch.dtype) else None


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv2d: _convolved, F.linear: _linear, F.adaptive_avg_pool2d: _pooled, torch.mean: _mean, "mean": _mean,
    "to": _cast,
    **dict.fromkeys(
        (
            operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul, torch.add,
            torch.mul, "add", "sub", "mul", "div", "add_", "mul_", "div_",
        ),
        _broadcast,
    ),
    **dict.fromkeys(
        (
            kernels.batch_norm, kernels.batch_norm_training, F.batch_norm, F.layer_norm, F.group_norm, F.gelu, F.relu,
            F.silu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, F.dropout, F.softmax,
            torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "softmax", "bernoulli_", "contiguous",
            F.relu_, F.hardtanh_, F.leaky_relu_,
        ),
        _same,
    ),
}  # fmt: skip
