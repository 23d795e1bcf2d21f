"""Depthwise convolution with its activation."""

from __future__ import annotations

from torch import Tensor

from ..backends import reference as plain
from ..backends.activations import ACTIVATE
from ..backends.maps import empty_output
from . import _arguments
from ._operator import Operator


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    activation: str = "none",
) -> Tensor:
    """Depthwise convolution with its activation: ``act(DW(x; weight) + bias)``.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, 1, kh, kw]`` or, for two outputs per input channel, ``[2·C, 1, kh, kw]``.
        bias: ``[C]`` (or ``[2·C]``) or None.
        stride: 1 or 2, or a pair of them.
        padding: zeros around the map: ``"same"`` (``kernel - 1`` in all, for an even kernel the odd one at the bottom
            and right; stride 2 then halves, rounding up), ``"valid"`` (none), or pixels on each side.
        activation: one of ``ffnet_kernels.ACTIVATIONS``; ``"gelu"`` is the exact one, by erf.

    Returns:
        ``[N, C or 2·C, H', W']``.
    """
    return OPERATOR.run(x, weight, bias, stride, padding, activation)


def checked(x, weight, bias, stride, padding, activation) -> tuple:
    _arguments.check_map("x", x)
    _arguments.check_filter("weight", weight, x)
    channels, outputs = x.shape[1], weight.shape[0]
    if outputs != channels and outputs != 2 * channels:
        raise ValueError(
            f"weight: expected {channels} or {2 * channels} filters (1 or 2 for each of x's {channels} channels), "
            f"got {outputs} (shape {list(weight.shape)})"
        )
    bias = _arguments.channel_vector("bias", bias, outputs, x)
    strides, pads = _arguments.geometry(x, weight, stride, padding)
    _arguments.check_activation(activation)
    return x, weight, bias, strides, pads, activation


spelled = _arguments.spelled_convolution


def reference(x, weight, bias, stride, padding, activation) -> Tensor:
    return ACTIVATE[activation](plain.convolve(x, weight, bias, stride, padding))


def empty(x, weight, bias, stride, padding, activation) -> Tensor:
    size = _arguments.result_size(x, weight, stride, padding)
    return empty_output((x.shape[0], weight.shape[0], *size), (x, weight))


def gradient(p, grad, x, weight, bias, stride, padding, activation, mask) -> list:
    if activation != "none":
        grad = p.activation_backward(grad, x, weight, bias, stride, padding, activation)
    return p.convolve_backward(grad, x, weight, stride, padding, mask)


OPERATOR = Operator(__name__, weights=("weight",))
