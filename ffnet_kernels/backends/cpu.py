"""The native CPU kernels: AVX-512 with or without bfloat16 instructions, AVX2 or portable code, chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

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


def slower(operator: str, args: tuple) -> str | None:
    if operator == "conv2d":
        return slower_projection(args)
    if operator == "batch_norm":
        return slower_norm(*args)
    return slower_map(args[0]) if operator in _DEPTHWISE else None


def slower_projection(args: tuple) -> str | None:
    """Why plain PyTorch is faster for a 1×1 convolution with nothing fused behind it."""
    x, weight, *_, activation, scale, residual = args
    least = 128 if native.lanes() < 16 else 32
    if x.stride(1) == 1 or x.shape[1] >= least or activation != "none" or scale is not None or residual is not None:
        return None
    is_pointwise = tuple(getattr(weight, "shape", ())[2:]) == (1, 1)
    return f"slower on an NCHW map of fewer than {least} channels" if is_pointwise else None


def slower_norm(x: Tensor, activation: str | None = None) -> str | None:
    """Why plain PyTorch is faster for batch normalisation in training."""
    if activation in ("none", "relu"):
        return "no faster with nothing or a ReLU behind it"
    if activation is not None and not x.is_contiguous(memory_format=torch.channels_last):
        return "slower on a map that is not channels-last"
    return None


def slower_map(x: Tensor) -> str | None:
    """Why plain PyTorch is faster for depthwise operators on this map."""
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


def convolve(x, weight, bias, stride, padding) -> Tensor:
    return _ops.depthwise_conv2d.default(x, weight, bias, stride, padding, "none")


def convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias; None where the mask does not ask for one."""
    bias = weight[:, 0, 0, 0] if mask[2] else None  # its values do not matter
    grads = iter(_ops.depthwise_conv2d_backward.default(grad, x, weight, bias, stride, padding, "none", mask))
    return [next(grads) if wanted else None for wanted in mask]
