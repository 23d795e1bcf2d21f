"""The native CPU kernels: AVX-512 with or without bfloat16 instructions, AVX2 or portable code, chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import crossover
from .crossover import Slower

NAME = "cpu"
_ops = torch.ops.ffnet_kernels

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
#: Operators for which plain PyTorch is faster on some maps: see `slower`.
_DEPTHWISE = ("depthwise_conv2d", "ffnified_attention", "channel_mixer")
#: Operators of training steps.
_TRAINING = ("batch_norm", "branched_depthwise", "feed_forward")
#: Operators whose gradient has no kernel of its own; its depthwise part does.
COMPOSED = ("channel_mixer",)
OPERATORS = frozenset((*_DEPTHWISE, *_TRAINING, "conv2d"))
#: Operators that a program loaded without Python may contain.
IN_LIBRARY = OPERATORS


def unavailable() -> str | None:
    return native.cpu_library_error()


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.device.type != "cpu":
        return f"takes CPU tensors, got {x.device}"
    if operator in _TRAINING and x.numel() == 0:
        return f"takes maps that are not empty, got the shape {list(x.shape)}"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return None


def slower(operator: str, args: tuple) -> Slower | str | None:
    if operator in _DEPTHWISE:
        return slower_map(args[0])
    if operator == "conv2d":
        return slower_projection(args)
    return slower_norm(*args) if operator == "batch_norm" else None


def slower_projection(args: tuple) -> Slower | None:
    """Why plain PyTorch is faster for a 1×1 convolution with nothing fused behind it."""
    x, weight, *_, activation, scale, residual = args
    if x.stride(1) == 1 or activation != "none" or scale is not None or residual is not None:
        return None
    if tuple(getattr(weight, "shape", ())[2:]) != (1, 1):
        return None
    images, channels, height, width = x.shape
    values, rule = channels * height * width, "nchw_values" if images == 1 else "nchw_batch_values"
    return Slower(rule, values) if values <= getattr(crossover.now, rule) else None


def slower_norm(x: Tensor, activation: str | None = None) -> Slower | str | None:
    """Why plain PyTorch is as fast for batch normalisation in training."""
    if activation is None:  # it is not asked about that alone
        return None
    if x.dtype != torch.float32 and activation in ("none", "relu"):
        return "no faster in 16 bits with nothing or a ReLU behind it"
    kind = crossover.kind_of_norm(activation, x.is_contiguous(memory_format=torch.channels_last))
    return Slower("norm", kind) if kind in crossover.now.norm else None


def slower_map(x: Tensor) -> Slower | None:
    """Why plain PyTorch is faster for depthwise operators on this map."""
    images, channels, height, width = x.shape
    now = crossover.now
    if channels <= now.few_channels and x.stride(1) == 1:
        return Slower("few_channels", channels)
    if height * width <= now.few_pixels and images > 1:
        return Slower("few_pixels", height * width)
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


def convolve(x, weight, bias, stride, padding) -> Tensor:
    return _ops.depthwise_conv2d.default(x, weight, bias, stride, padding, "none")


def convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias; None where the mask does not ask for one."""
    bias = weight[:, 0, 0, 0] if mask[2] else None  # its values do not matter
    grads = iter(_ops.depthwise_conv2d_backward.default(grad, x, weight, bias, stride, padding, "none", mask))
    return [next(grads) if wanted else None for wanted in mask]
