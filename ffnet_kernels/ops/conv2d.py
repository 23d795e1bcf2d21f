"""Dense convolution with its activation, on the CPU's kernels or in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..backends import reference as plain
from ..backends.activations import ACTIVATE
from . import _arguments
from ._operator import Operator
from .depthwise_conv2d import empty as empty


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    activation: str = "none",
) -> Tensor:
    """Convolution of one group with its activation: ``act(conv(x; weight) + bias)``, for what stands around depthwise
    layers: 1×1 projections and strided stems.

    It has a kernel on the CPU, and one for the gradients of 1×1 convolutions of channels-last float32 maps without
    activation; elsewhere plain PyTorch runs.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[O, C, kh, kw]``.
        bias: ``[O]`` or None.
        stride, padding, activation: as in :func:`ffnet_kernels.depthwise_conv2d`.

    Returns:
        ``[N, O, H', W']``.
    """
    return OPERATOR.run(x, weight, bias, stride, padding, activation)


def checked(x, weight, bias, stride, padding, activation) -> tuple:
    _arguments.check_map("x", x)
    _arguments.check_like("weight", weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != x.shape[1] or 0 in shape:
        raise ValueError(f"weight: expected the shape [out, {x.shape[1]}, kh, kw], got {list(shape)}")
    bias = _arguments.channel_vector("bias", bias, shape[0], x)
    strides, pads = _arguments.geometry(x, weight, stride, padding)
    _arguments.check_activation(activation)
    return x, weight, bias, strides, pads, activation


spelled = _arguments.spelled_convolution


def reference(x, weight, bias, stride, padding, activation) -> Tensor:
    return ACTIVATE[activation](plain.convolve(x, weight, bias, stride, padding, groups=1))


def gradient(p, grad, x, weight, bias, stride, padding, activation, mask) -> list:
    """In plain PyTorch on every backend: there are no primitives of dense convolutions."""
    if activation != "none":
        grad = plain.activation_backward(grad, x, weight, bias, stride, padding, activation, groups=1)
    return plain.convolve_backward(grad, x, weight, stride, padding, mask, groups=1)


OPERATOR = Operator(
    __name__,
    "Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, str activation",
    weights=("weight",),
)
