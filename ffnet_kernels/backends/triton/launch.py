"""Launches kernels on the current stream of the tensors' device, interprets them, or only records them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Triton reads the same variable when a kernel is defined, so it has to be set before the first call.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """A kernel with the arguments of its launch."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = [
            f"{name}={value}" for name, value in self.arguments.items() if name.startswith(("BLOCK", "ROWS", "TAPS"))
        ]
        return f"{self.kernel.__name__} ({', '.join(tile)}, {self.warps} warps)"


class _State(threading.local):
    """Per thread: the list into which launches are recorded instead of being run, if any."""

    recorder: list[Launch] | None = None


_state = _State()


def launch(kernel: Any, grid: int, device: torch.device, *, warps: int, stages: int = 1, **arguments: Any) -> None:
    """Launches ``grid`` programs of a kernel; all arguments by name except ALIGN, which is determined here."""
    arguments = aligned(arguments)
    if _state.recorder is not None:
        _state.recorder.append(Launch(kernel, grid, arguments, warps, stages))
    elif grid > 0:
        with _on_device(device):
            kernel[(grid,)](**arguments, **options(warps, stages, nvidia=_is_nvidia(device)))


def options(warps: int, stages: int, *, nvidia: bool) -> dict[str, Any]:
    """Compiler options. NVIDIA's assembler aims at round register counts, and rather spills a little than exceed them
    unless it is allowed to use all registers."""
    registers = {"maxnreg": min(255, 65536 // (32 * warps))} if nvidia else {}
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **registers}


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def maps(**tensors: Tensor | None) -> dict[str, Any]:
    """Tensors with their strides, as kernels take them: ``x`` and ``x_strides``; both None for None."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        arguments[name] = tensor
        arguments[f"{name}_strides"] = None if tensor is None else tensor.stride()
    return arguments


def vectors(**tensors: Tensor | None) -> dict[str, Any]:
    """Tensors with contiguous elements."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


_ALIGN = 8  # elements: 16 bytes of the narrowest dtype, the widest load
_COUNTS = ("channels", "hidden", "outputs")


def aligned(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with ALIGN, the unit of strides and channels: 8 elements where all are multiples of 8, else 1.

    Triton vectorises a load only where it can prove the alignment, and of a number it is told no more than whether 16
    divides it: 88 channels would be read one by one. In units of 8 the factor is in the kernel's text. What has a
    stride of 1 is a constant too: dimension MAP_UNIT of maps (1 or 3), 0 of filters, MATRIX_UNIT of matrices.
    """
    strides = {name: value for name, value in arguments.items() if name.endswith("_strides") and value is not None}
    if not strides:
        return arguments
    units = {rank: _unit([s for s in strides.values() if len(s) == rank], order) for rank, order in _UNITS.items()}
    names = {name: units[rank] for rank, name in ((4, "MAP_UNIT"), (2, "MATRIX_UNIT")) if any(
        len(s) == rank for s in strides.values())}  # fmt: skip
    counts = [name for name in _COUNTS if name in arguments]
    numbers = [arguments[name] for name in counts]
    numbers += [s for value in strides.values() for i, s in enumerate(value) if i != units[len(value)]]
    if None in names.values() or units[3] is None or any(number % _ALIGN for number in numbers):
        return {**arguments, **dict.fromkeys(names, 1), "ALIGN": 1}
    in_units = {name: tuple(s // _ALIGN for s in value) for name, value in strides.items()}
    return {**arguments, **in_units, **{name: arguments[name] // _ALIGN for name in counts}, **names, "ALIGN": _ALIGN}


#: By rank: of maps, filters and matrices the dimensions that may have a stride of 1.
_UNITS = {4: (1, 3), 3: (0,), 2: (1, 0)}


def _unit(strides: list[tuple[int, ...]], dimensions: tuple[int, ...]) -> int | None:
    """The first of the dimensions that has a stride of 1 in all; None where none has."""
    return next((d for d in dimensions if all(value[d] == 1 for value in strides)), None)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches kernels on the current device, not on that of the tensors."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Records this thread's launches instead of running them, for tensors without data."""
    previous, _state.recorder = _state.recorder, []
    try:
        yield _state.recorder
    finally:
        _state.recorder = previous
