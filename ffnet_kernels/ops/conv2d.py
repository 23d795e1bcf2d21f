"""Dense convolution with its activation, on the CPU kernels or in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference as plain
from ..backends.activations import ACTIVATE
from ..backends.maps import empty_output
from . import _arguments
from ._operator import LIBRARIES, Operator


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    activation: str = "none",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Dense convolution and its epilogue: ``residual + scale · act(conv(x; weight) + bias)``. It is for the layers
    around depthwise ones: 1×1 projections and strided stems.

    It has a CPU kernel, and one for gradients of 1×1 convolutions of channels-last float32 maps without an epilogue;
    otherwise plain PyTorch runs.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[O, C, kh, kw]``.
        bias: ``[O]`` or None.
        stride, padding, activation: as in :func:`ffnet_kernels.depthwise_conv2d`.
        scale: layer scale ``[O]`` or ``[O, 1, 1]``, or None.
        residual: ``[N, O, H', W']`` or None.

    Returns:
        ``[N, O, H', W']``.
    """
    return OPERATOR.run(x, weight, bias, stride, padding, activation, scale, residual)


def checked(x, weight, bias, stride, padding, activation, scale=None, residual=None) -> tuple:
    _arguments.check_map("x", x)
    _arguments.check_like("weight", weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != x.shape[1] or 0 in shape:
        raise ValueError(f"weight: expected the shape [out, {x.shape[1]}, kh, kw], got {list(shape)}")
    bias = _arguments.channel_vector("bias", bias, shape[0], x)
    strides, pads = _arguments.geometry(x, weight, stride, padding)
    _arguments.check_activation(activation)
    scale = _arguments.channel_vector("scale", scale, shape[0], x)
    _arguments.check_residual(residual, x, shape[0], _arguments.result_size(x, weight, strides, pads))
    return x, weight, bias, strides, pads, activation, scale, residual


def spelled(x, weight, bias, stride, padding, activation, scale, residual) -> tuple:
    arguments = _arguments.spelled_convolution(x, weight, bias, stride, padding, activation)
    return _arguments.spelled_mixer(*arguments, scale, residual)


def reference(x, weight, bias, stride, padding, activation, scale, residual) -> Tensor:
    out = ACTIVATE[activation](plain.convolve(x, weight, bias, stride, padding, groups=1))
    return plain.scaled_residual(out, scale, residual)


def empty(x, weight, bias, stride, padding, *_) -> Tensor:
    size = _arguments.result_size(x, weight, stride, padding)
    return empty_output((x.shape[0], weight.shape[0], *size), (x, weight))


def gradient(p, grad, x, weight, bias, stride, padding, activation, scale, residual, mask) -> list:
    """Gradients, in plain PyTorch on every backend, as there are no primitives for dense convolutions."""
    scale_grad = None
    if mask[3]:
        scale_grad = (grad * reference(x, weight, bias, stride, padding, activation, None, None)).sum((0, 2, 3))
    grad = plain.scaled(grad, scale)
    if activation != "none":
        grad = plain.activation_backward(grad, x, weight, bias, stride, padding, activation, groups=1)
    return [*plain.convolve_backward(grad, x, weight, stride, padding, mask[:3], groups=1), scale_grad]


OPERATOR = Operator(__name__, weights=("weight",))


def _empty_pair(x, weight, bias, stride, padding, activation, *following) -> Tensor:
    return empty(empty(x, weight, bias, stride, padding), *following)


torch.library.register_fake("ffnet_kernels::conv2d_pair", _empty_pair, lib=LIBRARIES["ffnet_kernels"])
