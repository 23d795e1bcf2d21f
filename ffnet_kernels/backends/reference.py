"""Plain PyTorch: defines what operators and their gradients compute, and runs every call that no kernel takes.

Compositions of differentiable ``aten`` operators: any device, any dtype up to float64, any order of derivative,
exportable. The operators themselves are in :mod:`ffnet_kernels.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATE, ACTIVATE_BACKWARD

NAME = "reference"


def unavailable() -> str | None:
    return None


def refusal(operator: str, args: tuple) -> str | None:
    return None


def slower(operator: str, args: tuple) -> str | None:
    return None


def describe(operator: str, args: tuple) -> str:
    return "plain PyTorch operators"


def convolve(x, weight, bias, stride, padding, groups=None) -> Tensor:
    """A convolution, depthwise by default.

    Uneven padding (of an even kernel) is added as zeros, so an infinite weight gives NaN there; kernels skip padding.
    """
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, tuple(stride), (top, left), groups=x.shape[1] if groups is None else groups)


def activated(x, weight, bias, stride, padding, activation) -> Tensor:
    return ACTIVATE[activation](convolve(x, weight, bias, stride, padding))


def activation_backward(grad, x, weight, bias, stride, padding, activation, groups=None) -> Tensor:
    """The gradient of the convolution's output, given that of the activation's."""
    return ACTIVATE_BACKWARD[activation](grad, convolve(x, weight, bias, stride, padding, groups))


def convolve_backward(grad, x, weight, stride, padding, mask, groups=None) -> list:
    """Gradients of x, weight and bias; None where the mask does not ask for one."""
    top, bottom, left, right = padding
    uneven = top != bottom or left != right
    padded, sides = (F.pad(x, (left, right, top, bottom)), [0, 0]) if uneven else (x, [top, left])
    groups = x.shape[1] if groups is None else groups
    grads = list(
        torch.ops.aten.convolution_backward(
            grad, padded, weight, [weight.shape[0]], list(stride), sides, [1, 1], False, [0, 0], groups, list(mask)
        )
    )
    if uneven and mask[0]:
        grads[0] = grads[0][:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return grads


def scaled_filter_gradients(grad, x, weight, bias, scale, padding, mask) -> list:
    """Gradients of weight, bias and scale of ``scale · (DW(x; weight) + bias)``; None where the mask does not ask for
    one."""
    grad_scale = (grad * convolve(x, weight, bias, (1, 1), padding)).sum((0, 2, 3)) if mask[2] else None
    return [*convolve_backward(scaled(grad, scale), x, weight, (1, 1), padding, (False, *mask[:2]))[1:], grad_scale]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution with a 2-D weight."""
    return F.conv2d(x, weight[:, :, None, None], bias)


def pointwise_backward(grad, x, weight, mask) -> list:
    """Gradients of x, weight and bias, like :func:`convolve_backward`."""
    grads = convolve_backward(grad, x, weight[:, :, None, None], (1, 1), (0, 0, 0, 0), mask, groups=1)
    return [grads[0], grads[1].flatten(1) if mask[1] else None, grads[2]]


def scaled(map: Tensor, scale: Tensor | None) -> Tensor:
    return map if scale is None else map * scale[:, None, None]


def scaled_residual(out: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    out = scaled(out, scale)
    return out if residual is None else residual + out
