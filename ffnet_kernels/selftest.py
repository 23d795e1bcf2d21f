"""Checks every built kernel of this installation against the float64 reference, in seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, native
from .backends import reference, triton


class Check(NamedTuple):
    """One comparison: the largest error of the kernel and of plain PyTorch in the same dtype, against float64."""

    backend: str
    variant: str
    case: str
    error: float
    eager_error: float
    passed: bool


def error_limit(reference64: Tensor, eager: Tensor) -> float:
    """The relative rule: twice the largest error of plain PyTorch in the same dtype, and four roundings of the result.

    Both tensors of one shape; the result is an absolute error.
    """
    if reference64.numel() == 0:
        return 0.0
    roundings = 4 * torch.finfo(eager.dtype).eps * reference64.abs().max().item()
    return 2 * (eager.double() - reference64).abs().max().item() + roundings


def selftest(report: Callable[[Check], None] | None = None) -> list[Check]:
    """Runs every kernel of every available backend and instruction set over small maps that hit its edges.

    Args:
        report: called with each check as it is made.

    Returns:
        All checks; ``all(check.passed for check in selftest())`` is the verdict. Empty where only the reference is
        available.
    """
    checks = []
    for backend in dispatch.available_backends():
        if backend == "reference":
            continue
        for variant, activate, device, dtype in _variants(backend):
            with activate:
                for name, operator, args in _cases():
                    args = tuple(a.to(device, dtype) if isinstance(a, Tensor) else a for a in args)
                    check = _compare(backend, variant, name, operator, args)
                    checks.append(check)
                    if report:
                        report(check)
    return checks


def _compare(backend: str, variant: str, case: str, operator: str, args: tuple) -> Check:
    double = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    expected = getattr(reference, operator)(*double)
    eager = getattr(reference, operator)(*args)
    got = getattr(dispatch.BACKENDS[backend], operator)(*args)
    error = (got.double() - expected).abs().max().item()
    eager_error = (eager.double() - expected).abs().max().item()
    # NaN compares false: an output that was not written fails.
    return Check(backend, variant, case, error, eager_error, error <= error_limit(expected, eager))


def _variants(backend: str) -> Iterator[tuple[str, contextlib.AbstractContextManager, torch.device, torch.dtype]]:
    """What of a backend is checked on its own: (name, context that selects it, device and dtype of the tensors)."""
    cpu, helper = torch.device("cpu"), native.helper()
    if backend == "triton":
        if triton.INTERPRETED:
            return  # minutes, of a check that is not about this machine
        device = torch.device("cuda" if torch.cuda.device_count() > 0 else "xpu")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{device.type} {str(dtype).removeprefix('torch.')}", contextlib.nullcontext(), device, dtype
    elif helper is None:
        yield "default", contextlib.nullcontext(), cpu, torch.float32
    else:
        for isa in helper.usable_isas():
            yield isa, _selected_isa(helper, isa), cpu, torch.float32


@contextlib.contextmanager
def _selected_isa(helper, isa: str) -> Iterator[None]:
    previous = helper.isa()
    helper.select_isa(isa)
    try:
        yield
    finally:
        helper.select_isa(previous)


def _cases() -> Iterator[tuple[str, str, tuple]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for kernel in (1, 3, 4, 5, 7, 31):
        for channels, multiplier, stride, size in ((35, 1, 1, (9, 17)), (19, 2, 2, (16, 5)), (16, 1, 1, (18, 34))):
            for channels_last in (False, True):
                weight = random(channels * multiplier, 1, kernel, kernel) / kernel
                pads = reference.same_padding(weight)
                activation = ("none", "gelu", "gelu_tanh", "relu", "silu")[(kernel + stride) % 5]
                x = _formatted(random(2, channels, *size), channels_last)
                name = f"depthwise_conv2d k={kernel} s={stride} m={multiplier} C={channels} {size} {activation}"
                bias = random(channels * multiplier)
                yield name, "depthwise_conv2d", (x, weight, bias, (stride, stride), pads, activation)
            if multiplier == 1:
                value = random(channels, 1, kernel, kernel) / kernel
                residual = _formatted(random(2, channels, *size), stride == 1)
                name = f"ffnified_attention k={kernel} C={channels} {size}"
                attention = (x, weight, bias, value, random(channels), "gelu", random(channels), residual)
                yield name, "ffnified_attention", attention
                hidden = 2 * channels + 1
                expand, project = random(hidden, channels) / channels**0.5, random(channels, hidden) / hidden**0.5
                name = f"channel_mixer k={kernel} C={channels} D={hidden} {size}"
                mixer = (x, weight, bias, expand, random(hidden), project, random(channels), "gelu", bias, residual)
                yield name, "channel_mixer", mixer


def _formatted(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
