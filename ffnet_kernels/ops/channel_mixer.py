"""The convolutional feed-forward network, FFNet's channel mixer: a depthwise convolution before two 1×1 ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference as plain
from ..backends.activations import ACTIVATE, ACTIVATE_BACKWARD
from ..backends.maps import empty_output, same_padding
from . import _arguments
from ._operator import LIBRARIES, Operator


def channel_mixer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolutional feed-forward network, FFNet's channel mixer (arXiv 2406.02021, section 3):
    ``residual + scale · (W₂ · act(W₁ · (DW(x; weight) + bias) + b₁) + b₂)``.

    The hidden map is rounded to the maps' dtype, even if a fused backend never writes it to memory.

    Args:
        x: ``[N, C, H, W]``.
        weight, bias: depthwise filter ``[C, 1, kh, kw]``, "same" padding, and ``[C]`` or None.
        expand_weight, expand_bias: ``[D, C]`` (or ``[D, C, 1, 1]``) and ``[D]`` or None.
        project_weight, project_bias: ``[O, D]`` (or ``[O, D, 1, 1]``) and ``[O]`` or None.
        activation: on the hidden map; as in :func:`ffnet_kernels.depthwise_conv2d`.
        scale: layer scale ``[O]`` or ``[O, 1, 1]``, or None.
        residual: ``[N, O, H, W]`` or None.

    Returns:
        ``[N, O, H, W]``.
    """
    return OPERATOR.run(
        x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
    )


def checked(
    x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> tuple:
    _arguments.check_map("x", x)
    _arguments.check_own_filter("weight", weight, x, of="x")
    bias = _arguments.channel_vector("bias", bias, x.shape[1], x)
    pointwise = checked_pointwise(
        x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
    )
    return x, weight, bias, *pointwise


def checked_pointwise(
    x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> tuple:
    """Checks all arguments but x."""
    expand_weight = _arguments.matrix("expand_weight", expand_weight, x.shape[1], x)
    hidden = expand_weight.shape[0]
    expand_bias = _arguments.channel_vector("expand_bias", expand_bias, hidden, x)
    project_weight = _arguments.matrix("project_weight", project_weight, hidden, x)
    outputs = project_weight.shape[0]
    project_bias = _arguments.channel_vector("project_bias", project_bias, outputs, x)
    scale = _arguments.channel_vector("scale", scale, outputs, x)
    _arguments.check_residual(residual, x, outputs)
    _arguments.check_activation(activation)
    return expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual


spelled = _arguments.spelled_mixer


def reference(x, weight, bias, *pointwise) -> Tensor:
    return pointwise_reference(plain.convolve(x, weight, bias, (1, 1), same_padding(weight)), *pointwise)


def pointwise_reference(
    x, expand_weight, expand_bias, project_weight, project_bias, activation, scale=None, residual=None
) -> Tensor:
    """The part after the depthwise convolution."""
    hidden = ACTIVATE[activation](plain.pointwise(x, expand_weight, expand_bias))
    return plain.scaled_residual(plain.pointwise(hidden, project_weight, project_bias), scale, residual)


def empty(x, weight, bias, expand_weight, expand_bias, project_weight, *_) -> Tensor:
    return empty_output((x.shape[0], project_weight.shape[0], x.shape[2], x.shape[3]), (x, weight))


def gradient(
    p, grad, x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual,
    mask,
) -> list:  # fmt: skip
    """Gradients: of the 1×1 convolutions in plain PyTorch, of the depthwise one on the backend."""
    pads = same_padding(weight)
    mixed = p.convolve(x, weight, bias, (1, 1), pads)
    before = plain.pointwise(mixed, expand_weight, expand_bias)
    hidden = ACTIVATE[activation](before)
    wants_mixed = any(mask[:3])
    wants_hidden = wants_mixed or any(mask[3:5])
    hidden_grad, *project_grads = plain.pointwise_backward(
        plain.scaled(grad, scale), hidden, project_weight, (wants_hidden, *mask[5:7])
    )
    grads: list = [None] * 5
    if wants_hidden:
        before_grad = ACTIVATE_BACKWARD[activation](hidden_grad, before)
        mixed_grad, *grads[3:] = plain.pointwise_backward(before_grad, mixed, expand_weight, (wants_mixed, *mask[3:5]))
    if wants_mixed:
        grads[:3] = p.convolve_backward(mixed_grad, x, weight, (1, 1), pads, mask[:3])
    scale_grad = None
    if mask[7]:
        scale_grad = (grad * plain.pointwise(hidden, project_weight, project_bias)).sum((0, 2, 3))
    return [*grads, *project_grads, scale_grad]


OPERATOR = Operator(__name__, weights=("weight", "expand_weight", "project_weight"))


def _empty_normalized(x, weight, bias, norm_weight, norm_bias, eps, *pointwise) -> Tensor:
    return empty(x, weight, bias, *pointwise)


torch.library.register_fake("ffnet_kernels::norm_mixer", _empty_normalized, lib=LIBRARIES["ffnet_kernels"])
