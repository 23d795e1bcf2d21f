"""Takes the cost of fresh memory pages out of the measurement."""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
KEEP_BYTES = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for its own next allocation; returns whether the C library does that.

    By default glibc hands large blocks back to the kernel and fetches them anew at the next call, or not, depending on
    the history of the heap: on virtual machines a contender that allocates maps between its operators was seen to take
    30 times as long in one run as in the next.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))
