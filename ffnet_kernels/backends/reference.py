"""The meaning of every operator, in plain PyTorch: what all backends are tested against, and what runs where none can.

Forward and backward are compositions of differentiable ``aten`` operators: any device, any dtype up to float64, any
order of derivative, exportable. Arguments are those of the schemas in ``operators.py``, already checked.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gradients
from .activations import ACTIVATE, ACTIVATE_BACKWARD
from .gradients import same_padding


def unavailable() -> str | None:
    return None


def refusal(operator: str, args: tuple) -> str | None:
    return None


def slower(operator: str, args: tuple) -> str | None:
    return None


def describe(operator: str, args: tuple) -> str:
    return "plain PyTorch operators"


def depthwise_conv2d(x, weight, bias, stride, padding, activation) -> Tensor:
    return ACTIVATE[activation](convolve(x, weight, bias, stride, padding))


def ffnified_attention(query, key, key_bias, value, value_bias, activation, scale, residual) -> Tensor:
    hidden = ACTIVATE[activation](convolve(query, key, key_bias, (1, 1), same_padding(key)))
    return _finish(convolve(hidden, value, value_bias, (1, 1), same_padding(value)), scale, residual)


def channel_mixer(
    x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> Tensor:
    mixed = convolve(x, weight, bias, (1, 1), same_padding(weight))
    hidden = ACTIVATE[activation](F.conv2d(mixed, expand_weight[:, :, None, None], expand_bias))
    return _finish(F.conv2d(hidden, project_weight[:, :, None, None], project_bias), scale, residual)


def conv2d(x, weight, bias, stride, padding, activation) -> Tensor:
    return ACTIVATE[activation](convolve(x, weight, bias, stride, padding, groups=1))


def conv2d_backward(grad, x, weight, bias, stride, padding, activation, mask) -> list[Tensor]:
    if activation != "none":
        grad = ACTIVATE_BACKWARD[activation](grad, convolve(x, weight, bias, stride, padding, groups=1))
    grads = convolve_backward(grad, x, weight, stride, padding, mask, groups=1)
    return [g for g, wanted in zip(grads, mask, strict=True) if wanted]


depthwise_conv2d_backward, ffnified_attention_backward, channel_mixer_backward = gradients.backward_passes(
    sys.modules[__name__]
)


def convolve(x, weight, bias, stride, padding, groups=None) -> Tensor:
    """Depthwise unless told otherwise.

    Uneven padding (an even kernel) is explicit: there an infinite weight meets zeros, where kernels skip padding.
    """
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, tuple(stride), (top, left), groups=x.shape[1] if groups is None else groups)


def convolve_backward(grad, x, weight, stride, padding, mask, groups=None) -> list:
    """Gradients of x, weight and bias; None where the mask says that one is not wanted."""
    top, bottom, left, right = padding
    uneven = top != bottom or left != right
    padded, sides = (F.pad(x, (left, right, top, bottom)), [0, 0]) if uneven else (x, [top, left])
    grads = list(
        torch.ops.aten.convolution_backward(
            grad,
            padded,
            weight,
            [weight.shape[0]],
            list(stride),
            sides,
            [1, 1],
            False,
            [0, 0],
            x.shape[1] if groups is None else groups,
            list(mask),
        )
    )
    if uneven and mask[0]:
        grads[0] = grads[0][:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return grads


def _finish(out: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    if scale is not None:
        out = out * scale[:, None, None]
    return out if residual is None else residual + out
