"""The native CPU kernels: float32, AVX-512, AVX2 or portable code, chosen by the processor at run time."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .. import native
from . import gradients, reference

_ops = torch.ops.ffnet_kernels


def unavailable() -> str | None:
    return native.cpu_library_error()


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.device.type != "cpu":
        return f"takes CPU tensors, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return None


def slower(operator: str, args: tuple) -> str | None:
    x = args[0]
    if operator == "conv2d":
        return _slower_conv2d(x, args[1])
    if operator.endswith("_backward") and max(args[2].shape[2:]) <= 3:
        return "slower for filters of up to 3×3, whose gradients torch computes natively"
    if x.shape[1] < 4 and x.stride(1) == 1:
        return "slower on a channels-last map of fewer than 4 channels, which leaves most of a vector idle"
    if x.shape[2] * x.shape[3] <= 4 and x.shape[0] > 1:
        return "slower on maps of up to 2×2 pixels"
    return None


def _slower_conv2d(x: Tensor, weight: Tensor) -> str | None:
    _, channels, kh, kw = weight.shape
    if kh * kw > 1 and (channels > 4 or x.dtype == torch.float32):
        return "slower than torch's own convolution for filters larger than 1×1"
    if kh * kw == 1 and x.dtype != torch.float32 and channels < 160:
        return "slower than torch's own 16-bit 1×1 convolution of fewer than 160 channels"
    return None


def describe(operator: str, args: tuple) -> str:
    helper = native.helper()
    if helper is None:
        return "instruction set chosen at run time"
    if operator == "conv2d":
        return f"{helper.isa()}, panels of pixels"
    x, weights = args[0], [args[1], args[3]] if operator == "ffnified_attention" else [args[1]]
    unrolled = all(helper.is_unrolled(weight.shape[2], weight.shape[3]) for weight in weights)
    in_place = x.stride(1) == 1 and x.shape[1] >= helper.lanes() and weights[0].shape[0] == x.shape[1]
    rows = "unrolled rows" if unrolled else "rows of any width"
    source = "map read in place" if in_place else "map gathered to channel vectors"
    return f"{helper.isa()}, {helper.lanes()} channels a vector; {rows}, {source}"


def depthwise_conv2d(*args) -> Tensor:
    return _ops.depthwise_conv2d.default(*args)


def conv2d(*args) -> Tensor:
    return _ops.conv2d.default(*args)


def ffnified_attention(*args) -> Tensor:
    return _ops.ffnified_attention.default(*args)


def channel_mixer(*args) -> Tensor:
    return _ops.channel_mixer.default(*args)


depthwise_conv2d_backward, ffnified_attention_backward, channel_mixer_backward = gradients.backward_passes(
    sys.modules[__name__]
)


def convolve(x, weight, bias, stride, padding) -> Tensor:
    return _ops.depthwise_conv2d.default(x, weight, bias, stride, padding, "none")


def convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias, None where the mask says that one is not wanted: natively for stride 1 and one
    output per channel."""
    kh, kw = weight.shape[2], weight.shape[3]
    top, bottom, left, right = padding
    mirrored = (kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right)
    if tuple(stride) != (1, 1) or weight.shape[0] != x.shape[1] or min(mirrored) < 0:
        return reference.convolve_backward(grad, x, weight, stride, padding, mask)
    if x.stride(1) == 1 and grad.stride(1) != 1:  # such as the expanded gradient of a sum
        grad = grad.contiguous(memory_format=torch.channels_last)
    grads: list[Tensor | None] = [None, None, None]
    if mask[0]:
        grads[0] = convolve(grad, weight.flip(2, 3), None, (1, 1), mirrored)
    if mask[1] or mask[2]:
        wanted = _ops.depthwise_conv2d_wgrad.default(grad, x, (kh, kw), padding)
        grads[1:] = [g.to(x.dtype) if m else None for g, m in zip(wanted, mask[1:], strict=True)]
    return grads
