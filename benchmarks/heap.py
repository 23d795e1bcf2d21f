"""A heap whose state does not decide who is fast: what glibc is asked ahead of measuring. Imports no torch.

An output that is fresh memory in every call costs its page faults, maybe more than the call itself. Whether it is so
depends on where earlier blocks happened to lie, for one contender and not for another.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

#: Before 2.38, an aligned block, as torch asks for, can rarely be cut from the one that an equal block left: the few
#: bytes beside it are kept for reuse by themselves, and do not join it. The heap grows with every call. Without such
#: keeping, small blocks join their neighbours at once. Read when a process starts.
JOINED_AT_ONCE = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
MENDED_IN = (2, 38)


def restart_with_plain_heap() -> None:
    """Starts this very command again with `JOINED_AT_ONCE`, where the C library needs it and has not been told."""
    library, version = platform.libc_ver()
    given = os.environ.get("GLIBC_TUNABLES", "")
    if library != "glibc" or "glibc.malloc.tcache_count" in given:
        return
    if tuple(int(part) for part in version.split(".")[:2]) < MENDED_IN:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, JOINED_AT_ONCE)))
        os.execv(sys.executable, sys.orig_argv)


@functools.cache
def keep_freed_memory() -> bool:
    """Asks the C library to keep freed blocks of up to 32 MiB, however many, and says whether it will."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, -1))  # -1: never given back
