"""Memory: heap settings for measuring, the memory of a call, and peak memory of FFNet-1, FFNet-Seg and FFNet-SR, ours
against eager PyTorch: ``python -m benchmarks memory``. Importing this does not import torch.

If every call's output is fresh memory, its page faults may take longer than the call. Whether it is depends on where
earlier blocks happen to lie, so that the heap could decide which contender is fast.

The command runs each contender in a fresh process. There the model and its input are made, and the resident high-water
mark, VmHWM, is reset. After some calls it says how much memory was resident at most; ``calls`` is how much more that is
than before the first call: maps, packed weights, gradients, scratch memory, and code that is paged in. Time is not
measured, and the processes run one by one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
CALLS = 3
#: Before glibc 2.38, an aligned block, as torch requests, rarely fits into the place of a freed block of the same size:
#: the few bytes beside it are cached for reuse instead of being merged with it, so the heap grows with every call.
#: Without these caches small blocks are merged at once. Read when a process starts.
JOINED_AT_ONCE = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
MENDED_IN = (2, 38)


def restart_with_plain_heap() -> None:
    """Restarts this command with `JOINED_AT_ONCE`, if the C library needs it and has not been told."""
    library, version = platform.libc_ver()
    given = os.environ.get("GLIBC_TUNABLES", "")
    if library != "glibc" or "glibc.malloc.tcache_count" in given:
        return
    if tuple(int(part) for part in version.split(".")[:2]) < MENDED_IN:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, JOINED_AT_ONCE)))
        os.execv(sys.executable, sys.orig_argv)


@functools.cache
def keep_freed_memory() -> bool:
    """Makes the C library keep freed blocks of up to 32 MiB, in any number, and says whether that worked."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, -1))  # -1: never returned to the system


class MemoryUnknown(RuntimeError):
    """The system does not report memory; the message says why."""


def reset_peak() -> None:
    """Returns freed memory to the system (malloc_trim), and resets the high-water mark (5 into clear_refs)."""
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


def resident_during(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes resident before a call, and the most during it."""
    reset_peak()
    before = resident("VmRSS")
    call()
    return before, resident("VmHWM")


def peak_during(call: Callable[[], object]) -> int | None:
    """Peak bytes of a call beyond what is resident before it, including its result, to within some pages; None if the
    system does not report it."""
    try:
        before, peak = resident_during(call)
        return max(0, peak - before)
    except (MemoryUnknown, OSError):
        return None


def measure(case: Any, contender: str) -> dict[str, int]:
    """Measures in this process: bytes resident before the first call, and the most during the calls."""
    import torch

    from .contenders import CONTENDERS
    from .work import build

    work = build(case)
    with torch.inference_mode(work.inference):
        program = CONTENDERS[contender].prepare(work)
        del work
        gc.collect()

        def calls() -> None:
            for _ in range(CALLS):
                program()

        before, peak = resident_during(calls)
        return {"before": before, "peak": peak}


def in_fresh_process(*arguments: object, seconds: float | None = None) -> Any:
    """Runs a command of the benchmarks in a process of its own, and returns the JSON that it prints last.

    Raises:
        RuntimeError: if it fails or takes too long.
    """
    command = [sys.executable, "-m", str(__package__), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {seconds:.0f} s") from None
    if done.returncode != 0:
        last = next(reversed(done.stderr.strip().splitlines()), "")
        raise RuntimeError(f"exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """A line a contender; ratios are to ours in the same case."""
    from .report import markdown
    from .results import OURS

    taken = {(row["case"], row["contender"]): row["peak"] - row["before"] for row in rows if "error" not in row}
    lines = []
    for row in rows:
        name = (row["case"], row["contender"])
        if "error" in row:
            lines.append((*name, "-", "-", "-", "-", row["error"]))
            continue
        ours = taken.get((row["case"], OURS))
        ratio = "-" if ours is None else f"{taken[name] / max(1, ours):.2f}x"
        lines.append((*name, *(f"{size / MIB:.0f}" for size in (row["before"], row["peak"], taken[name])), ratio, ""))
    headers = ("case", "contender", "before MiB", "peak MiB", "calls MiB", "calls / ours", "")
    return markdown(headers, lines, left=(0, 1, 6))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something could not be measured."""
    import torch

    from .cases import MEMORY_CASES
    from .contenders import DEFAULT_CONTENDERS
    from .options import parser_of, positive
    from .results import machine, machine_line

    parser = parser_of("memory", "Peak memory of FFNet-1, FFNet-Seg and FFNet-SR, ours against eager PyTorch.")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(MEMORY_CASES[int(options.one[0])], options.one[1])))
        return 0
    rows = []
    ours_and_eager = DEFAULT_CONTENDERS[:3]
    for (number, case), name in itertools.product(enumerate(MEMORY_CASES), ours_and_eager):
        try:
            found = in_fresh_process("memory", "--one", number, name, "--threads", torch.get_num_threads())
        except RuntimeError as error:
            found = {"error": str(error)}
        rows.append({"case": case.name, "contender": name, **found})
    print(f"machine: {machine_line(machine())}\n\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        print(f"\nwrote {options.json}")
    return 1 if any("error" in row for row in rows) else 0
