"""How much memory a call takes: the resident high-water mark, which Linux lets a process set back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

MIB = 2**20


class MemoryUnknown(RuntimeError):
    """The system does not tell; the text says why."""


def reset_peak() -> None:
    """Gives freed memory back (malloc_trim), and makes what is resident the high-water mark (5 into clear_refs)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError) as error:
        raise MemoryUnknown(f"the high-water mark cannot be set back here: {error}") from error


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS is resident now, VmHWM was at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise MemoryUnknown(f"/proc/self/status has no {field}")


def most_during(call: Callable[[], object]) -> int | None:
    """Bytes that a call takes at most beyond what is resident before it, its result among them; None where the system
    does not tell. To some pages."""
    try:
        reset_peak()
        before = resident("VmRSS")
        call()
        return max(0, resident("VmHWM") - before)
    except (MemoryUnknown, OSError):
        return None
