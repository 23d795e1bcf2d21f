"""The backward passes, composed of depthwise convolutions and their gradients.

A function here takes the primitives of a backend first: ``convolve(x, weight, bias, stride, padding)`` and
``convolve_backward(grad, x, weight, stride, padding, mask)``, which returns the gradients of x, weight and bias, None
where the mask does not ask for one. The other arguments are those of the schemas in ``operators.py``. Primitives that
are differentiable make all of it differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATE, ACTIVATE_BACKWARD


class Primitives(Protocol):
    """A backend module, as far as the backward passes need it."""

    convolve: Any
    convolve_backward: Any


def backward_passes(p: Any) -> tuple[Callable[..., list[Tensor]], ...]:
    """The three backward passes on a backend's primitives, in the order of this file."""
    passes = (depthwise_conv2d_backward, ffnified_attention_backward, channel_mixer_backward)
    return tuple(functools.partial(backward, p) for backward in passes)


def depthwise_conv2d_backward(p: Primitives, grad, x, weight, bias, stride, padding, activation, mask) -> list[Tensor]:
    if activation != "none":
        grad = ACTIVATE_BACKWARD[activation](grad, p.convolve(x, weight, bias, stride, padding))
    return _select(p.convolve_backward(grad, x, weight, stride, padding, mask), mask)


def ffnified_attention_backward(
    p: Primitives, grad, query, key, key_bias, value, value_bias, activation, scale, residual, mask
) -> list[Tensor]:
    pads1, pads2 = same_padding(key), same_padding(value)
    before = p.convolve(query, key, key_bias, (1, 1), pads1)
    hidden = ACTIVATE[activation](before)
    grad_scale = None
    if mask[5]:
        grad_scale = (grad * p.convolve(hidden, value, value_bias, (1, 1), pads2)).sum((0, 2, 3))
    grad_out = grad if scale is None else grad * scale[:, None, None]
    needs_hidden = any(mask[:3])
    grad_hidden, *grad_value = p.convolve_backward(grad_out, hidden, value, (1, 1), pads2, (needs_hidden, *mask[3:5]))
    grad_query_key = [None, None, None]
    if needs_hidden:
        grad_before = ACTIVATE_BACKWARD[activation](grad_hidden, before)
        grad_query_key = p.convolve_backward(grad_before, query, key, (1, 1), pads1, mask[:3])
    return _select([*grad_query_key, *grad_value, grad_scale, grad], mask)


def channel_mixer_backward(
    p: Primitives,
    grad,
    x,
    weight,
    bias,
    expand_weight,
    expand_bias,
    project_weight,
    project_bias,
    activation,
    scale,
    residual,
    mask,
) -> list[Tensor]:
    pads = same_padding(weight)
    expand, project = expand_weight[:, :, None, None], project_weight[:, :, None, None]
    mixed = p.convolve(x, weight, bias, (1, 1), pads)
    before = F.conv2d(mixed, expand, expand_bias)
    hidden = ACTIVATE[activation](before)
    grad_scale = (grad * F.conv2d(hidden, project, project_bias)).sum((0, 2, 3)) if mask[7] else None
    grad_out = grad if scale is None else grad * scale[:, None, None]
    needs_mixed = any(mask[:3])
    needs_hidden = needs_mixed or any(mask[3:5])
    grad_hidden, grad_project, grad_project_bias = _pointwise_backward(
        grad_out, hidden, project, (needs_hidden, *mask[5:7])
    )
    grad_mixed = grad_expand = grad_expand_bias = None
    if needs_hidden:
        grad_before = ACTIVATE_BACKWARD[activation](grad_hidden, before)
        grad_mixed, grad_expand, grad_expand_bias = _pointwise_backward(
            grad_before, mixed, expand, (needs_mixed, *mask[3:5])
        )
    first = [None, None, None]
    if needs_mixed:
        first = p.convolve_backward(grad_mixed, x, weight, (1, 1), pads, mask[:3])
    flat = [g if g is None else g.flatten(1) for g in (grad_expand, grad_project)]
    return _select([*first, flat[0], grad_expand_bias, flat[1], grad_project_bias, grad_scale, grad], mask)


def same_padding(weight: Tensor) -> tuple[int, int, int, int]:
    kh, kw = int(weight.shape[2]), int(weight.shape[3])  # never symbolic: convolution takes plain numbers
    return (kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2


def _pointwise_backward(grad, x, weight, mask) -> list:
    return list(
        torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask)
        )
    )


def _select(grads: list[Tensor | None], mask) -> list[Tensor]:
    return [g for g, wanted in zip(grads, mask, strict=True) if wanted and g is not None]
