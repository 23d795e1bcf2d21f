"""Checks that a program computes what the modules do, and gives results the strides of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .backends.choice import BackendError

_CORNER = 2, 128  # images; rows and columns


def compared(program: Callable, modules: Callable, x: Tensor, expected: Any) -> tuple[Any, str | None]:
    """The program's result for x, and how it differs from ``expected``, the modules' result; None if it does not."""
    try:
        result = program(x)
        reason = difference(result, expected)
        if reason is None and is_flat(x):  # for which a wrong program may compute the same
            probe = torch.empty_like(x).uniform_(generator=torch.Generator(x.device).manual_seed(0))
            reason = difference(program(probe), modules(probe))
    except BackendError:  # of one that was asked for
        raise
    except Exception as error:
        result, reason = expected, str(error)
    return result, None if reason is None else _NOT_THE_SAME + reason


def compared_aside(program: Callable, x: Tensor, expected: Any) -> str | None:
    """Like `compared`, of a program with gradients, which must not move anything twice; the difference alone."""
    try:
        with torch.no_grad():
            reason = difference(program(x, aside=True), expected)
    except BackendError:  # of one that was asked for
        raise
    except Exception as error:
        reason = str(error)
    return None if reason is None else _NOT_THE_SAME + reason


_NOT_THE_SAME = "its program is not what the modules are: "


def corner_of(x: Tensor) -> Tensor | None:
    """A corner of a map, in its memory format; None if that is ambiguous, or the corner would not be much smaller."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    part = x[: _CORNER[0], :, : _CORNER[1], : _CORNER[1]]
    if 4 * part.numel() > x.numel() or is_last == x.is_contiguous():
        return None
    return part.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def strides_in_format_of(like: Tensor, result: Tensor) -> tuple[int, ...] | None:
    """The strides of a result in the memory format of another one; None if that is ambiguous."""
    is_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    if is_last == like.is_contiguous():
        return None
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(result.shape, device="meta", memory_format=memory_format).stride()


def is_flat(x: Tensor) -> bool:
    """Whether a map is constant, or has a value that is not finite."""
    least, most = (value.item() for value in x.aminmax()) if x.numel() else (0.0, 0.0)
    return not (least < most and math.isfinite(least) and math.isfinite(most))


def as_laid_out(out: Any, strides: list[tuple]) -> Any:
    """A result with the strides of the modules' result."""
    if type(out) is Tensor:
        return (
            out
            if out.stride() == strides[0] or 0 in strides[0]
            else torch.empty_strided(out.shape, strides[0], dtype=out.dtype, device=out.device).copy_(out)
        )
    leaves, spec = tree_flatten(out)
    return tree_unflatten([as_laid_out(leaf, [s]) for leaf, s in zip(leaves, strides, strict=True)], spec)


def difference(out: Any, expected: Any) -> str | None:
    """How a program's result differs from the modules', beyond rounding; None if it does not."""
    leaves, spec = tree_flatten(out)
    expected_leaves, expected_spec = tree_flatten(expected)
    if spec != expected_spec or not all(type(leaf) is Tensor for leaf in (*leaves, *expected_leaves)):
        return "the result has another structure"
    for a, b in zip(leaves, expected_leaves, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return f"{list(a.shape)} {a.dtype} instead of {list(b.shape)} {b.dtype}"
        if not a.numel():
            continue
        wide, expected_wide = a.double(), b.double()
        same = (wide == expected_wide) | (wide.isnan() & expected_wide.isnan())
        error = (wide - expected_wide).abs().masked_fill(same, 0.0).amax().item()
        size = expected_wide.abs().nan_to_num(0.0, 0.0).amax().item()
        if not error <= size * _ROUNDING.get(a.dtype, 0.0):
            return f"results differ by {error} of {size}"
    return None


#: The difference, relative to the largest result, that other orders of summation may cause in a deep network; a wrong
#: graph exceeds it.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def are_tensors_of_their_own(values: list[Any]) -> bool:
    """Whether all values are plain tensors, no two of which share memory."""
    if not all(type(value) is Tensor for value in values):
        return False
    places = [value.untyped_storage()._cdata for value in values if value.numel()]
    return len(set(places)) == len(places)
