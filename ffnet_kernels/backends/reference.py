"""The meaning of every operator, in plain PyTorch: what all backends are tested against, and what runs where none can.

Forward and backward are compositions of differentiable ``aten`` operators: any device, any dtype up to float64, any
order of derivative, exportable. Arguments are those of the schemas in ``operators.py``, already checked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

_aten = torch.ops.aten
_ACTIVATE_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, x: grad,
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "silu": lambda grad, x: _silu_backward(grad, x),
}


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:  # aten::silu_backward has no derivative
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid * (1 + x * (1 - sigmoid)))


def unavailable() -> str | None:
    return None


def refusal(operator: str, args: tuple) -> str | None:
    return None


def slower(operator: str, args: tuple) -> str | None:
    return None


def describe(operator: str, args: tuple) -> str:
    return "plain PyTorch operators"


def depthwise_conv2d(x, weight, bias, stride, padding, activation) -> Tensor:
    return _ACTIVATE[activation](_convolve(x, weight, bias, stride, padding))


def ffnified_attention(query, key, key_bias, value, value_bias, activation, scale, residual) -> Tensor:
    hidden = _ACTIVATE[activation](_convolve(query, key, key_bias, (1, 1), same_padding(key)))
    return _finish(_convolve(hidden, value, value_bias, (1, 1), same_padding(value)), scale, residual)


def channel_mixer(
    x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> Tensor:
    mixed = _convolve(x, weight, bias, (1, 1), same_padding(weight))
    hidden = _ACTIVATE[activation](F.conv2d(mixed, expand_weight[:, :, None, None], expand_bias))
    return _finish(F.conv2d(hidden, project_weight[:, :, None, None], project_bias), scale, residual)


def depthwise_conv2d_backward(grad, x, weight, bias, stride, padding, activation, mask) -> list[Tensor]:
    if activation != "none":
        grad = _ACTIVATE_BACKWARD[activation](grad, _convolve(x, weight, bias, stride, padding))
    return _select(_convolve_backward(grad, x, weight, stride, padding, mask), mask)


def ffnified_attention_backward(
    grad, query, key, key_bias, value, value_bias, activation, scale, residual, mask
) -> list[Tensor]:
    pads1, pads2 = same_padding(key), same_padding(value)
    before = _convolve(query, key, key_bias, (1, 1), pads1)
    hidden = _ACTIVATE[activation](before)
    grad_scale = None
    if mask[5]:
        grad_scale = (grad * _convolve(hidden, value, value_bias, (1, 1), pads2)).sum((0, 2, 3))
    grad_out = grad if scale is None else grad * scale[:, None, None]
    needs_hidden = any(mask[:3])
    grad_hidden, *grad_value = _convolve_backward(grad_out, hidden, value, (1, 1), pads2, (needs_hidden, *mask[3:5]))
    grad_query_key = [None, None, None]
    if needs_hidden:
        grad_before = _ACTIVATE_BACKWARD[activation](grad_hidden, before)
        grad_query_key = _convolve_backward(grad_before, query, key, (1, 1), pads1, mask[:3])
    return _select([*grad_query_key, *grad_value, grad_scale, grad], mask)


def channel_mixer_backward(
    grad, x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual, mask
) -> list[Tensor]:
    pads = same_padding(weight)
    expand, project = expand_weight[:, :, None, None], project_weight[:, :, None, None]
    mixed = _convolve(x, weight, bias, (1, 1), pads)
    before = F.conv2d(mixed, expand, expand_bias)
    hidden = _ACTIVATE[activation](before)
    grad_scale = (grad * F.conv2d(hidden, project, project_bias)).sum((0, 2, 3)) if mask[7] else None
    grad_out = grad if scale is None else grad * scale[:, None, None]
    needs_mixed = any(mask[:3])
    needs_hidden = needs_mixed or any(mask[3:5])
    grad_hidden, grad_project, grad_project_bias = _pointwise_backward(
        grad_out, hidden, project, (needs_hidden, *mask[5:7])
    )
    grad_mixed = grad_expand = grad_expand_bias = None
    if needs_hidden:
        grad_before = _ACTIVATE_BACKWARD[activation](grad_hidden, before)
        grad_mixed, grad_expand, grad_expand_bias = _pointwise_backward(
            grad_before, mixed, expand, (needs_mixed, *mask[3:5])
        )
    first = [None, None, None]
    if needs_mixed:
        first = _convolve_backward(grad_mixed, x, weight, (1, 1), pads, mask[:3])
    flat = [g if g is None else g.flatten(1) for g in (grad_expand, grad_project)]
    return _select([*first, flat[0], grad_expand_bias, flat[1], grad_project_bias, grad_scale, grad], mask)


def same_padding(weight: Tensor) -> tuple[int, int, int, int]:
    kh, kw = int(weight.shape[2]), int(weight.shape[3])  # never symbolic: convolution takes plain numbers
    return (kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2


def _convolve(x, weight, bias, stride, padding) -> Tensor:
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, tuple(stride), (top, left), groups=x.shape[1])


def _convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias; None where the mask says that one is not wanted."""
    top, bottom, left, right = padding
    uneven = top != bottom or left != right
    padded, sides = (F.pad(x, (left, right, top, bottom)), [0, 0]) if uneven else (x, [top, left])
    grads = list(
        _aten.convolution_backward(
            grad, padded, weight, [weight.shape[0]], list(stride), sides, [1, 1], False, [0, 0], x.shape[1], list(mask)
        )
    )
    if uneven and mask[0]:
        grads[0] = grads[0][:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return grads


def _pointwise_backward(grad, x, weight, mask) -> list:
    return list(
        _aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask)
        )
    )


def _finish(out: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    if scale is not None:
        out = out * scale[:, None, None]
    return out if residual is None else residual + out


def _select(grads: list[Tensor | None], mask) -> list[Tensor]:
    return [g for g, wanted in zip(grads, mask, strict=True) if wanted and g is not None]
