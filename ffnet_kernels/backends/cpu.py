"""The native CPU kernels: float32, AVX-512, AVX2 or portable code, chosen by the processor at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

_ops = torch.ops.ffnet_kernels
_OPERATORS = ("depthwise_conv2d", "ffnified_attention", "channel_mixer")


def unavailable() -> str | None:
    return native.cpu_library_error()


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if operator not in _OPERATORS:
        return f"no CPU kernel for {operator} yet"
    if x.device.type != "cpu":
        return f"takes CPU tensors, got {x.device}"
    if x.dtype != torch.float32:
        return f"takes float32, got {x.dtype}"
    return None


def slower(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.shape[1] < 4 and x.stride(1) == 1:
        return "slower on a channels-last map of fewer than 4 channels, which leaves most of a vector idle"
    if x.shape[2] * x.shape[3] <= 4 and x.shape[0] > 1:
        return "slower on maps of up to 2×2 pixels"
    return None


def describe(operator: str, args: tuple) -> str:
    helper = native.helper()
    isa = f"{helper.isa()}, {helper.lanes()} channels a vector" if helper else "instruction set chosen at run time"
    filters = [args[1], args[3]] if operator == "ffnified_attention" else [args[1]]
    widths = {weight.shape[3] for weight in filters}
    kernel = "unrolled rows" if widths <= {3, 7} else "generic rows"
    layout = "read in place" if args[0].stride(1) == 1 else "gathered to channel vectors"
    return f"{isa}; {kernel}, map {layout}"


def depthwise_conv2d(*args) -> Tensor:
    return _ops.depthwise_conv2d.default(*args)


def ffnified_attention(*args) -> Tensor:
    return _ops.ffnified_attention.default(*args)


def channel_mixer(*args) -> Tensor:
    return _ops.channel_mixer.default(*args)
