"""How kernels are started: on the current stream of the tensors' device, interpreted, or only recorded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

#: Triton reads the same variable where a kernel is defined, so it has to be set before the first call.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """A kernel with the arguments it was to be started with."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    def __str__(self) -> str:
        numbers = [
            f"{name}={value}" for name, value in self.arguments.items() if name.isupper() and name.startswith(_TILE)
        ]
        return f"{self.kernel.__name__} ({', '.join(numbers)}, {self.warps} warps)"


_TILE = ("BLOCK", "ROWS", "TAPS")
_recorder: list[Launch] | None = None


def launch(kernel: Any, grid: int, device: torch.device, warps: int, stages: int = 1, **arguments: Any) -> None:
    """Starts ``grid`` programs of a kernel; all arguments by name."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, warps, stages))
    elif grid > 0:
        with on_device(device):
            kernel[(grid,)](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current device, whatever the device of the tensors."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects launches in place of running them, for tensors on the device ``meta``; not for several threads."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous
