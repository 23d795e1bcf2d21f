"""What the built CUDA kernels take of a multiprocessor, read from their machine code: no GPU is needed.

    python csrc/cuda/resources.py LIBRARY --write docs/cuda-resources.json --markdown docs/cuda-resources.md
    python csrc/cuda/resources.py LIBRARY --check docs/cuda-resources.json

Fails on any kernel with a stack frame or spilled registers; with --check also where a kernel or an architecture is
missing or new, and where a count grew by more than 5 %. LIBRARY is a shared library or an object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from machine_code import COUNTS, RESOURCES, collect

GROWTH = 1.05


@dataclass(frozen=True)
class Work:
    """What one pass of a warp through a kernel's main loop does."""

    kernel: str  # regular expression; matches from the beginning of the name
    outputs: int  # elements written a pass
    bytes_per_output: float  # of DRAM traffic, reads and writes


# The first entry that matches counts; kernels without one get no prediction.
WORK: list[Work] = []

# One multiprocessor of an H100 SXM: 3.35 TB/s over 132 of them at 1.755 GHz.
BYTES_PER_CLOCK = 14.46
PREDICTED_ARCHITECTURE = "90"


def frames(kernels: dict) -> list[str]:
    """Kernels with a stack frame, or that keep values in local memory."""
    problems = []
    for name, rows in kernels.items():
        for architecture, row in rows.items():
            stack, local = row[1], row[3][COUNTS.index("local")]
            if stack or local:
                problems.append(f"{name}, sm_{architecture}: {stack} bytes of stack, {local} local loads and stores")
    return problems


def compare(kernels: dict, nvcc: str, committed: dict) -> list[str]:
    """What is wrong with `kernels` against the committed table."""
    problems = []
    if [*RESOURCES, *COUNTS] != committed["columns"]:
        return ["the committed table has other columns: write it again"]
    # Another compiler makes other code of the same source: then only what must never be is looked at.
    same_compiler = nvcc == committed["nvcc"]
    if not same_compiler:
        print(f"the table was written with nvcc {committed['nvcc']}, this is {nvcc}: counts are not compared")
    for name in sorted(committed["kernels"].keys() | kernels.keys()):
        old, new = committed["kernels"].get(name, {}), kernels.get(name, {})
        for architecture in sorted(old.keys() | new.keys(), key=int):
            where = f"{name}, sm_{architecture}"
            if architecture not in new:
                problems.append(f"{where} is missing")
            elif architecture not in old:
                problems.append(f"{where} is not in the committed table: write it again")
            elif same_compiler:
                problems += (f"{where}: {growth}" for growth in _growth(old[architecture], new[architecture]))
    return problems


def _growth(old: list, new: list) -> Iterator[str]:
    columns = [("", RESOURCES, old[:3], new[:3]), ("", COUNTS, old[3], new[3])]
    if old[4] is not None and new[4] is not None:
        columns.append(("of the main loop ", COUNTS, old[4], new[4]))
    elif old[4] != new[4]:
        yield "the main loop " + ("is new" if old[4] is None else "is gone")
    for kind, names, before, after in columns:
        for name, a, b in zip(names, before, after, strict=True):
            if b > a * GROWTH:
                yield f"{name} {kind}grew from {a} to {b}"


def write_table(path: Path, kernels: dict, nvcc: str) -> None:
    """A line a kernel, so that a change of one shows as one."""
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(rows, separators=(',', ':'))}" for n, rows in kernels.items())
    head = f'"nvcc": {json.dumps(nvcc)},\n"columns": {json.dumps([*RESOURCES, *COUNTS])}'
    path.write_text(f'{{\n{head},\n"kernels": {{\n{lines}\n}}\n}}\n')


def limits(loop: list[int], work: Work) -> dict[str, float]:
    """Clocks of one multiprocessor for a pass of one warp, by what could be the bottleneck."""
    n = dict(zip(COUNTS, loop, strict=True))
    return {
        "issue": n["total"] / 4,
        "tensor": n["hmma_k16"] * 2 + n["hmma_k8"],
        "special": n["mufu"] * 2,
        "shared": n["shared_clocks"],
        "memory": work.outputs * work.bytes_per_output / BYTES_PER_CLOCK,
    }


def markdown(kernels: dict, nvcc: str) -> str:
    architectures = sorted({a for rows in kernels.values() for a in rows}, key=int)
    text = f"""# What the CUDA kernels take

Written by `python csrc/cuda/resources.py` from the machine code (nvcc {nvcc}); do not edit. `--check` holds a build to
`cuda-resources.json`, which has every count of every architecture.

## Predicted, not measured

Clocks of one multiprocessor for a pass of one warp through a kernel's main loop, sm_{PREDICTED_ARCHITECTURE}:

    issue   = instructions / 4                       four schedulers
    tensor  = 2 · HMMA.16816 + HMMA.1688
    special = 2 · MUFU
    shared  = 128-byte rows of LDS, LDSM, STS and LDGSTS + SHFL, without bank conflicts
    memory  = bytes of DRAM / {BYTES_PER_CLOCK}                   H100: 3.35 TB/s over 132 multiprocessors at 1.755 GHz
    ratio   = max(issue, tensor, special, shared, memory) / memory

The ratio says how far a kernel would be from the speed of memory if its latencies were hidden and its limits overlapped
fully: it is a lower bound of what a GPU will show.

| kernel | outputs | issue | tensor | special | shared | memory | predicted ratio |
|---|---|---|---|---|---|---|---|
"""
    for name, rows in kernels.items():
        work = next((work for work in WORK if re.match(work.kernel, name)), None)
        loop = rows.get(PREDICTED_ARCHITECTURE, [None])[-1]
        if work and loop:
            clocks = limits(loop, work)
            ratio = max(clocks.values()) / clocks["memory"]
            text += f"| `{name}` | {work.outputs} | " + " | ".join(f"{c:.1f}" for c in clocks.values())
            text += f" | {ratio:.2f} |\n"
    text += "\n## Registers, and instructions of the main loop\n\n"
    shown = ("total", "hmma_k16", "hmma_k8", "global_load", "global_store", "shared_load", "shared_store", "shuffle",
             "mufu", "fp32", "other")  # fmt: skip
    heads = [f"registers sm_{'/'.join(architectures)}", f"whole kernel sm_{PREDICTED_ARCHITECTURE}", *shown]
    text += f"| kernel | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|\n"
    for name, rows in kernels.items():
        registers = "/".join(str(rows[a][0]) if a in rows else "–" for a in architectures)
        row = rows.get(PREDICTED_ARCHITECTURE)
        loop = dict(zip(COUNTS, row[4], strict=True)) if row and row[4] else {}
        cells = [registers, str(row[3][0]) if row else "–", *(str(loop.get(column, "–")) for column in shown)]
        text += f"| `{name}` | {' | '.join(cells)} |\n"
    return text


def nvcc_of(library: Path) -> str:
    try:
        return json.loads((library.parent / "build_record.json").read_text())["cuda"]["nvcc"]
    except (OSError, ValueError, KeyError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the built CUDA kernels take of a multiprocessor.")
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", type=Path, metavar="JSON", help="write the table of all counts")
    parser.add_argument("--check", type=Path, metavar="JSON", help="fail where the library is worse than this table")
    parser.add_argument("--markdown", type=Path, metavar="MD", help="write the readable table, with predictions")
    options = parser.parse_args()
    if not options.library.exists():
        parser.error(f"{options.library} does not exist")
    kernels, nvcc = collect(options.library), nvcc_of(options.library)
    if options.write:
        write_table(options.write, kernels, nvcc)
    if options.markdown:
        options.markdown.write_text(markdown(kernels, nvcc))
    problems = frames(kernels)
    if options.check:
        problems += compare(kernels, nvcc, json.loads(options.check.read_text()))
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(kernels)} kernels, no stack frames" + (f", as in {options.check}" if options.check else ""))


if __name__ == "__main__":
    main()
