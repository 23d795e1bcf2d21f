"""Launches the kernels of depthwise convolution: shapes, tiles, grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..maps import same_padding as same_padding
from . import configs
from .configs import Shape
from .depthwise_kernels import (
    depthwise_conv2d_backward_kernel,
    depthwise_conv2d_backward_weight_kernel,
    depthwise_conv2d_forward_kernel,
    filter_gradients_kernel,
    sum_partials_kernel,
)
from .launch import launch, maps, vectors
from .rows import CHUNK


def forward(out: Tensor, x, weight, bias, stride, padding, activation: str) -> Tensor:
    outputs = weight.shape[0] // x.shape[1]
    return convolve(
        out, x, weight, bias, stride=stride, top=padding[0], left=padding[2], activation=activation,
        outputs=outputs,
    )  # fmt: skip


def backward(grad, x, weight, bias, stride, padding, activation: str, mask) -> list[Tensor | None]:
    """The gradients of x, weight and bias; None where one is not needed."""
    if activation != "none":
        grad = activation_backward(grad, x, weight, bias, stride, padding, activation)
    return convolve_backward(grad, x, weight, stride, padding, mask)


def activated(x, weight, bias, stride, padding, activation: str) -> Tensor:
    """The whole convolution, of one output for each channel and stride 1."""
    return forward(torch.empty_like(x), x, weight, bias, stride, padding, activation)


def activation_backward(grad, x, weight, bias, stride, padding, activation: str) -> Tensor:
    """The gradient of the convolution's output, given that of the activation's."""
    return convolve(
        torch.empty_like(grad), x, weight, bias, stride=stride, top=padding[0], left=padding[2],
        activation=activation, derivative=True, outputs=weight.shape[0] // x.shape[1], other=grad,
    )  # fmt: skip


def scaled_filter_gradients(grad, x, weight, bias, scale, padding, mask) -> list[Tensor | None]:
    """Gradients of weight, bias and scale of ``scale · (DW(x; weight) + bias)``; None where one is not needed."""
    sums = weight_sums(grad, x, weight, (1, 1), padding)
    return filter_gradients(sums, weight, mask, bias=bias, scale=scale)


def filters(x: Tensor, *, mirrored: bool = False, **weights: Tensor) -> dict[str, Any]:
    """Depthwise filters as kernels take them: first tap and strides (channel, row, column), the latter negative if
    mirrored. Channels are innermost if those of x are: lanes that hold channels then read their taps together."""
    arguments: dict[str, Any] = {}
    for name, weight in weights.items():
        if configs.channels_innermost(x) and weight.stride(0) != 1:
            weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        channel, _, ky, kx = weight.stride()
        if mirrored:
            weight, ky, kx = weight[:, :, weight.shape[2] - 1 :, weight.shape[3] - 1 :], -ky, -kx
        arguments[name], arguments[f"{name}_strides"] = weight, (channel, ky, kx)
    return arguments


def unroll(height: int) -> dict[str, Any]:
    """How a filter's rows are unrolled: so many chunks of CHUNK rows, then TAPS rows."""
    most = int(CHUNK.value)
    taps = height if height <= most else height % most
    return {"chunks": (height - taps) // most, "CHUNKED": height > most, "TAPS": taps}


def convolve(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, stride=(1, 1), top: int, left: int,
    activation: str = "none", derivative: bool = False, scale: Tensor | None = None, other: Tensor | None = None,
    outputs: int = 1, inputs: int = 1, mirrored: bool = False,
) -> Tensor:  # fmt: skip
    """``out = other + scale · act(DW(x) + bias)``, or ``other · act'(DW(x) + bias)``; ``other`` may be None.

    ``outputs`` per input channel; or the sum over ``inputs`` per output channel, which with the filter ``mirrored`` is
    the adjoint of that.
    """
    images, channels, out_height, out_width = out.shape
    kernel_height, kernel_width = weight.shape[2:]
    kernel = "depthwise" if inputs == 1 else "depthwise_sum"
    shape = Shape.of(kernel, x, out.shape, kernel_height)
    tile = configs.choose(shape, x.device)
    share = configs.share(tile, shape)
    launch(
        depthwise_conv2d_forward_kernel, share["splits"] * -(-channels // tile.block_c), x.device, warps=tile.warps,
        **maps(x=x, other=other, out=out), **filters(x, weight=weight, mirrored=mirrored),
        **vectors(bias=bias, scale=scale),
        images=images, channels=channels, height=x.shape[2], width=x.shape[3], out_height=out_height,
        out_width=out_width, top=top, left=left, kernel_width=kernel_width, **share,
        ACTIVATION=activation, DERIVATIVE=derivative, STRIDE_H=stride[0], STRIDE_W=stride[1],
        OUTPUTS=outputs, INPUTS=inputs, **unroll(kernel_height), **tile.blocks(),
    )  # fmt: skip
    return out


def convolve_backward(grad, x, weight, stride, padding, mask) -> list[Tensor | None]:
    """Gradients of x, weight and bias, None where the mask does not ask for one."""
    one_pass = tuple(stride) == (1, 1) and weight.shape[0] == x.shape[1]
    if one_pass and mask[0] and any(mask[1:]):
        grad_x, sums = _backward_in_one_pass(grad, x, weight, padding)
        return [grad_x, *filter_gradients(sums, weight, mask[1:])]
    grads: list[Tensor | None] = [None, None, None]
    if mask[0]:
        grads[0] = _backward_input(grad, x, weight, stride, padding)
    if any(mask[1:]):
        sums = weight_sums(grad, x, weight, stride, padding)
        grads[1:] = filter_gradients(sums, weight, mask[1:])
    return grads


def _backward_in_one_pass(grad, x, weight, padding) -> tuple[Tensor, Tensor]:
    """The input gradient, and sums as from :func:`weight_sums`."""
    images, channels, height, width = x.shape
    rows, columns = max(height, grad.shape[2]), max(width, grad.shape[3])
    shape = Shape.of("depthwise_backward", x, (images, channels, rows, columns), weight.shape[2])
    tile = configs.choose(shape, x.device)
    share = configs.share(tile, shape, sums=weight.shape[2] * weight.shape[3] + 1)
    grad_x = torch.empty_like(x)
    partials = _partials(x, share, weight)
    launch(
        depthwise_conv2d_backward_kernel, share["splits"] * -(-channels // tile.block_c), x.device, warps=tile.warps,
        **maps(grad=grad, x=x, grad_x=grad_x), **filters(x, weight=weight), partials=partials,
        **_extents(grad, x, weight, padding), **share, **unroll(weight.shape[2]), **tile.blocks(),
    )  # fmt: skip
    return grad_x, sum_partials(partials)


def weight_sums(grad, x, weight, stride, padding) -> Tensor:
    """Sums [taps + 1, C] in float32: the filter's gradient, tap by tap, then the bias's."""
    shape = Shape.of("depthwise_weight", x, grad.shape, weight.shape[2])
    tile = configs.choose(shape, x.device)
    share = configs.share(tile, shape, sums=weight.shape[2] * weight.shape[3] + 1)
    partials = _partials(x, share, weight)
    launch(
        depthwise_conv2d_backward_weight_kernel, share["splits"] * -(-shape.channels // tile.block_c), x.device,
        warps=tile.warps, **maps(grad=grad, x=x), partials=partials, **_extents(grad, x, weight, padding), **share,
        STRIDE_H=stride[0], STRIDE_W=stride[1], OUTPUTS=weight.shape[0] // x.shape[1], **unroll(weight.shape[2]),
        **tile.blocks(),
    )  # fmt: skip
    return sum_partials(partials)


def _partials(x: Tensor, share: dict[str, int], weight: Tensor) -> Tensor:
    taps = weight.shape[2] * weight.shape[3]
    return x.new_empty((share["splits"], taps + 1, weight.shape[0]), dtype=torch.float32)


def _extents(grad: Tensor, x: Tensor, weight: Tensor, padding) -> dict[str, int]:
    return {
        "images": x.shape[0], "channels": grad.shape[1], "height": x.shape[2], "width": x.shape[3],
        "out_height": grad.shape[2], "out_width": grad.shape[3], "top": padding[0], "left": padding[2],
        "kernel_height": weight.shape[2], "kernel_width": weight.shape[3],
    }  # fmt: skip


def _backward_input(grad, x, weight, stride, padding) -> Tensor:
    """The input gradient: a convolution of ``grad`` with the mirrored filter.

    With stride 2 it is up to four of them, one for the even and odd rows and columns of x each: those meet every other
    tap of the filter.
    """
    grad_x = torch.empty_like(x)
    inputs = weight.shape[0] // x.shape[1]
    for row in range(stride[0]):
        ky, top = _phase(row, stride[0], weight.shape[2], padding[0])
        for column in range(stride[1]):
            kx, left = _phase(column, stride[1], weight.shape[3], padding[2])
            taps = weight[:, :, ky :: stride[0], kx :: stride[1]]
            out = grad_x[:, :, row :: stride[0], column :: stride[1]]
            if taps.numel() == 0:
                out.zero_()
            elif out.numel():
                convolve(out, grad, taps, None, top=top, left=left, inputs=inputs, mirrored=True)
    return grad_x


def _phase(offset: int, stride: int, kernel: int, padding: int) -> tuple[int, int]:
    """(first tap, padding of the convolution of the gradient) of every stride-th pixel from offset.

    Pixel ``h = offset + stride·i`` meets tap k in output ``(h + padding - k) / stride`` where that is whole: in the
    taps ``first + stride·t`` and outputs ``i + shift - t``.
    """
    first, shift = (offset + padding) % stride, (offset + padding) // stride
    return first, len(range(first, kernel, stride)) - 1 - shift


def sum_partials(partials: Tensor) -> Tensor:
    """``[splits, ...]`` float32 to its sum over the splits, in the same order every time."""
    splits, count = partials.shape[0], partials[0].numel() if partials.shape[0] else 0
    if splits == 0:
        return partials.new_zeros(partials.shape[1:])
    if splits == 1:
        return partials[0]
    sums = torch.empty_like(partials[0])
    block = 128
    launch(
        sum_partials_kernel, -(-count // block), partials.device, warps=4,
        partials=partials, sums=sums, splits=splits, count=count, BLOCK_S=16, BLOCK=block,
    )  # fmt: skip
    return sums


def filter_gradients(sums, weight, mask, *, bias=None, scale=None) -> list[Tensor | None]:
    """Gradients of weight and bias, and of scale if the mask says something of it, from sums ``[taps + 1, C]``; see the
    kernel."""
    channels, _, kernel_height, kernel_width = weight.shape
    grad_weight = torch.empty_like(weight) if mask[0] else None
    grad_bias = weight.new_empty(channels) if mask[1] else None
    grad_scale = weight.new_empty(channels) if len(mask) > 2 and mask[2] else None
    block_c = 32
    strides = [None if t is None else (t.stride(0), t.stride(2), t.stride(3)) for t in (weight, grad_weight)]
    launch(
        filter_gradients_kernel, -(-channels // block_c), weight.device, warps=4,
        sums=sums, weight=weight, weight_strides=strides[0], grad_weight=grad_weight, grad_weight_strides=strides[1],
        **vectors(bias=bias, scale=scale), grad_bias=grad_bias, grad_scale=grad_scale,
        channels=channels, kernel_height=kernel_height, kernel_width=kernel_width, BLOCK_C=block_c, BLOCK_T=64,
    )  # fmt: skip
    return [grad_weight, grad_bias, grad_scale][: len(mask)]
