"""The native CPU kernels: AVX-512 with or without bfloat16 instructions, AVX2 or portable code, chosen at run time."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from .. import autograd, native
from . import gradients

_ops = torch.ops.ffnet_kernels

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def unavailable() -> str | None:
    return native.cpu_library_error()


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.device.type != "cpu":
        return f"takes CPU tensors, got {x.device}"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    if operator == "depthwise_conv2d_backward" and args[2].shape[0] > 2 * args[1].shape[1]:
        return f"takes one or two outputs per channel, got {args[2].shape[0]} for {args[1].shape[1]} channels"
    return None


def slower(operator: str, args: tuple) -> str | None:
    return None if operator in ("conv2d", "sequence") else slower_map(args[0])


def slower_map(x: Tensor) -> str | None:
    """Why plain PyTorch is the faster one for depthwise operators on this map."""
    _, channels, height, width = x.shape
    if channels < 4 and x.stride(1) == 1:
        return "slower on a channels-last map of fewer than 4 channels, which leaves most of a vector idle"
    if height * width <= 4 and x.shape[0] > 1:
        return "slower on maps of up to 2×2 pixels"
    return None


def describe(operator: str, args: tuple) -> str:
    if operator == "conv2d":
        return f"{native.isa()}, blocks of a matrix product"
    x, weights = args[0], [args[1], args[3]] if operator == "ffnified_attention" else [args[1]]
    unrolled = all(native.is_unrolled(weight.shape[2], weight.shape[3]) for weight in weights)
    in_place = x.stride(1) == 1 and x.shape[1] >= native.lanes() and weights[0].shape[0] == x.shape[1]
    rows = "unrolled rows" if unrolled else "rows of any width"
    source = "map read in place" if in_place else "map gathered to channel vectors"
    return f"{native.isa()}, {native.lanes()} channels a vector; {rows}, {source}"


def depthwise_conv2d(*args) -> Tensor:
    return autograd.call(_ops.depthwise_conv2d.default, *args)


def conv2d(*args) -> Tensor:
    return autograd.call(_ops.conv2d.default, *args)


def ffnified_attention(*args) -> Tensor:
    return autograd.call(_ops.ffnified_attention.default, *args)


def channel_mixer(*args) -> Tensor:
    return autograd.call(_ops.channel_mixer.default, *args)


def depthwise_conv2d_backward(*call) -> list[Tensor]:
    return _ops.depthwise_conv2d_backward.default(*call)


def ffnified_attention_backward(*call) -> list[Tensor]:
    return _ops.ffnified_attention_backward.default(*call)


def convolve(x, weight, bias, stride, padding) -> Tensor:
    return _ops.depthwise_conv2d.default(x, weight, bias, stride, padding, "none")


def convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias, None where the mask says that one is not wanted."""
    bias = weight[:, 0, 0, 0] if mask[2] else None  # any of that shape: the gradient does not depend on it
    grads = iter(_ops.depthwise_conv2d_backward.default(grad, x, weight, bias, stride, padding, "none", mask))
    return [next(grads) if wanted else None for wanted in mask]


channel_mixer_backward = functools.partial(gradients.channel_mixer_backward, sys.modules[__name__])
