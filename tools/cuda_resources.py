"""What the built CUDA kernels take of a multiprocessor, read from their machine code: no GPU is needed.

    python tools/cuda_resources.py LIBRARY --write docs/cuda-resources.json --markdown docs/cuda-resources.md
    python tools/cuda_resources.py LIBRARY --check docs/cuda-resources.json

Fails on any kernel with a stack frame or spilled registers; with --check also where a kernel or an architecture is
missing or new, where a count grew by more than 5 %, and where a kernel is predicted to be slower than its limit.
LIBRARY is a shared library or an object.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cuda_machine_code import COUNTS, PHASES, RESOURCES, collect

GROWTH = 1.05
NAME = "cuda-resources"  # of the tables in docs/


# One multiprocessor of an H100 SXM: 3.35 TB/s over 132 of them at 1.755 GHz.
BYTES_PER_CLOCK = 14.46
PREDICTED_ARCHITECTURE = "90"
PANEL_ROW = 128  # elements, of 16 bits: 16 windows of 8 columns


@dataclass(frozen=True)
class Case:
    """Planes of size x size that a streaming kernel goes through, many of them."""

    operator: str
    kernel: str
    rows: int  # of the filter, and steps of the main loop
    convolutions: int
    size: int
    maps: int  # that are read or written
    limit: float  # of the predicted ratio

    def kernels(self) -> list[str]:
        """Both dtypes; planes one window wide have a variant of their own."""
        windows = "alone" if self.size <= 8 else "aligned"
        return [self.kernel.format(dtype=dtype, windows=windows) for dtype in ("Half", "BFloat16")]

    def passes(self) -> list[float]:
        """How often the main loop's PHASES are executed for a panel of whole planes (stream_rows in stream.h)."""
        steps = self.size + self.convolutions * (self.rows // 2)
        turns = math.ceil(steps / self.rows)
        row, residual = self.size / self.rows, self.maps > 2
        return [turns, turns * residual, row, row, row * residual, 1]


def _cases() -> list[Case]:
    attention = "attention_forward_kernel<{dtype}, %d, {windows}>"
    sizes = ((7, 8), (7, 16), (7, 32), (7, 64), (3, 32), (3, 64))
    cases = [
        Case(f"token mixer{text}", attention % rows, rows, 2, size, maps, 1.3 if size <= 16 else 1.5)
        for text, maps in (("", 3), (", no residual", 2))
        for rows, size in sizes
    ]
    depthwise = "depthwise_stream_kernel<{dtype}, 7, {windows}, activate>"
    return cases + [Case("depthwise, GELU", depthwise, 7, 1, size, 2, 1.5) for size in (8, 16, 32, 64)]


CASES = _cases()

# What a pass through the main loop is, of a warp unless a thread is named. The first entry that matches counts.
UNITS = (
    (
        r"(attention_(forward|backward)|depthwise_stream)_kernel",
        "As many steps as the filter has rows (3 or 7), each for a row of a panel: 128 elements. Counted here are also "
        "what only ReLU runs; `any` fetches in two ways.",
    ),
    (
        r"banded_kernel",
        "A row of the input of 16 windows, of 8 columns of the result each, for all of up to 8 rows of results that "
        "read it. The last argument is how many products each of them takes, of 16 columns of the input.",
    ),
    (
        r"wgrad_kernel",
        "A row of the gradient, 256 elements, for as many rows of the filter as the second argument says. The loops "
        "that copy rows into shared memory are counted once.",
    ),
    (
        r"direct_wgrad_kernel",
        "For a thread: a strip of 8 rows of the gradient and a tile of taps; code for strips at the edge of a plane "
        "is counted besides that for whole ones. Arguments: channels, rows of the filter (0: any), stride.",
    ),
    (
        r"direct_kernel",
        "For a thread: a column of the input, which is read, times a column of the filter, for 8x2 results of each of "
        "its channels. Arguments: channels, rows of the filter (0: any, 4 at a time), stride.",
    ),
    (
        r"mixer_kernel",
        "16 hidden units of 32 pixels, from the first product to the second. At width 128 that is a whole chunk of "
        "weights, whose copies into shared memory are counted, too.",
    ),
    (
        r"elementwise_kernel",
        "For a thread: a vector of as many elements as the last argument says. All activations are counted, of which "
        "one is executed.",
    ),
    (r"filter_gradients_kernel", "For a thread: partial sums of a tap, which are added up; unrolled."),
)


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
    if [*RESOURCES, *COUNTS] != committed["columns"] or [*PHASES] != committed["phases"]:
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
    head = (
        f'"nvcc": {json.dumps(nvcc)},\n"columns": {json.dumps([*RESOURCES, *COUNTS])},\n"phases": {json.dumps(PHASES)}'
    )
    path.write_text(f'{{\n{head},\n"kernels": {{\n{lines}\n}}\n}}\n')


def clocks(phases: list[list[int]], passes: list[float], size: int, maps: int) -> dict[str, float]:
    """Of one multiprocessor for a row of a panel, by what could be the bottleneck."""
    sums = (sum(n * p for n, p in zip(column, passes, strict=True)) / size for column in zip(*phases, strict=True))
    n = dict(zip(COUNTS, sums, strict=True))
    return {
        "issue": n["total"] / 4,
        "tensor": n["hmma_k16"] * 2 + n["hmma_k8"],
        "special": n["mufu"] * 2,
        "shared": n["shared_clocks"],
        "memory": PANEL_ROW * 2 * maps / BYTES_PER_CLOCK,
    }


def ratio(by_limit: dict[str, float]) -> float:
    return max(by_limit.values()) / by_limit["memory"]


def predict(kernels: dict, case: Case) -> tuple[dict[str, float], float] | None:
    """Clocks and ratio of the slower dtype, and the ratio that the main loop alone would have; None if not built."""
    rows = [kernels.get(name, {}).get(PREDICTED_ARCHITECTURE) for name in case.kernels()]
    phases = [row[5] for row in rows if row is not None and row[5] is not None]
    if not phases:
        return None
    slower = max((clocks(p, case.passes(), case.size, case.maps) for p in phases), key=ratio)
    loop_alone = [clocks(p, [*case.passes()[:-1], 0], case.size, case.maps) for p in phases]
    return slower, max(map(ratio, loop_alone))


def predictions(kernels: dict) -> list[str]:
    """What is wrong with them: limits exceeded, or main loops that are not what `passes` takes them to be."""
    problems = []
    for case in CASES:
        for name in case.kernels():
            row = kernels.get(name, {}).get(PREDICTED_ARCHITECTURE)
            if row is not None and (wrong := _unlike(case, row[5])):
                problems.append(f"{name}, sm_{PREDICTED_ARCHITECTURE}: {wrong}")
        predicted = predict(kernels, case)
        if predicted and (value := ratio(predicted[0])) > case.limit:
            problems.append(
                f"{case.operator}, {case.rows}x{case.rows} at {case.size}x{case.size}: predicted to take {value:.2f} "
                f"times as long as its memory accesses, the limit is {case.limit}"
            )
    return problems


def _unlike(case: Case, phases: list[list[int]] | None) -> str | None:
    """Checks the reading of a main loop by what must be in it."""
    if phases is None:
        return "no main loop inside a loop over panels was found"
    found = {phase: dict(zip(COUNTS, counts, strict=True)) for phase, counts in zip(PHASES, phases, strict=True)}
    products = case.rows * case.rows * case.convolutions
    if found["row"]["hmma_k16" if case.size > 8 else "hmma_k8"] != products:
        return f"its main loop does not have {products} products in branches that a step without a row skips"
    if found["result"]["global_store"] != 2 * case.rows:
        return "its main loop does not have its stores in branches of their own"
    if (case.convolutions == 2) != (found["fetch"]["global_load"] > 0 and found["residual"]["shared_load"] > 0):
        return "its main loop does not have what a residual takes in branches of its own"
    return None


def markdown(kernels: dict, nvcc: str) -> str:
    library, arguments = (
        "ffnet_kernels/lib/libffnet_kernels_cuda.so",
        f"--write docs/{NAME}.json --markdown docs/{NAME}.md",
    )
    text = f"""# What the CUDA kernels take

Of the machine code that nvcc {nvcc} makes; do not edit. After a change of a kernel, with the library that `make cuda` builds:

    python tools/cuda_resources.py {library} {arguments}

With `--check docs/{NAME}.json` alone it fails where a kernel has a stack frame or spills, where a count has
grown by more than {GROWTH - 1:.0%}, and where a prediction exceeds its limit. The JSON file has all counts of all architectures.

## Predicted until a GPU confirms it

Clocks of one multiprocessor (sm_{PREDICTED_ARCHITECTURE}) for a row of a panel: {PANEL_ROW} elements of 16 bits. GELU, many images.

    issue   = instructions / 4                       four schedulers
    tensor  = 2 · HMMA.16816 + HMMA.1688
    special = 2 · MUFU
    shared  = 128-byte rows of LDS, LDSM, STS and LDGSTS + SHFL, without bank conflicts
    memory  = 2 · {PANEL_ROW} · maps / {BYTES_PER_CLOCK}
    ratio   = max(issue, tensor, special, shared, memory) / memory

{BYTES_PER_CLOCK} bytes a clock are an H100's: 3.35 TB/s over 132 multiprocessors at 1.755 GHz. The ratio says how far a kernel would
be from the speed of memory if its latencies were hidden and its limits overlapped fully: it is a lower bound of what a
GPU will show. The instructions are those executed for a panel, divided by its rows H:

    turns · (turn + fetch) / H + (row + result + residual) / K + setup / H      with turns = ⌈(H + lag) / K⌉

The main loop is unrolled over the K rows of the filter, a turn; by lag rows, K/2 rounded down for each convolution,
results are behind the input. Its code is split at branches: what a branch skips is a row's if there is HMMA in it, a
result's if there is STG, the residual's if it is fetched (LDGSTS) or read from shared memory alone; all else is executed
in every turn. Of an if-else the longer side counts. Setup, once a panel, is what the loop over panels does outside of
the main loop and what opens a panel within it; integer divisions in it are for planes that are cut into parts, which
these are not. The last column is the ratio without setup.

| operator | filter | map | issue | tensor | special | shared | memory | **ratio** | limit | main loop alone |
|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501
    for case in CASES:
        if predicted := predict(kernels, case):
            value = ratio(predicted[0])
            limit = f"{case.limit}{' **exceeded**' if value > case.limit else ''}"
            cells = [case.operator, f"{case.rows}×{case.rows}", f"{case.size}²"]
            cells += [*(f"{c:.1f}" for c in predicted[0].values()), f"**{value:.2f}**", limit, f"{predicted[1]:.2f}"]
            text += f"| {' | '.join(cells)} |\n"
    shown = {case: kernels.get(case.kernels()[0], {}).get(PREDICTED_ARCHITECTURE) for case in CASES}
    text += f"\nInstructions of a main loop, by phase, and of the setup:\n\n| kernel | {' | '.join(PHASES)} |\n"
    text += "|---" * (len(PHASES) + 1) + "|\n"
    for name, row in {case.kernels()[0]: row for case, row in shown.items() if row and row[5]}.items():
        text += f"| `{name}` | {' | '.join(str(counts[0]) for counts in row[5])} |\n"
    return text + _resource_tables(kernels)


def _resource_tables(kernels: dict) -> str:
    architectures = sorted({a for rows in kernels.values() for a in rows}, key=int)
    columns = ("total", "hmma_k16", "hmma_k8", "global_load", "global_store", "shared_load", "shared_store", "shuffle",
               "mufu", "fp32", "other")  # fmt: skip
    heads = ["kernel", f"registers sm_{'/'.join(architectures)}", "stack", "code", *columns]
    head = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    shared = "/".join(str(max(rows[a][2] for rows in kernels.values() if a in rows)) for a in architectures)
    text = f"""
## Registers, stack, and instructions of the main loop

Stack: bytes, and which architecture has them. Code: instructions of the whole kernel; these and the main loop's are of
sm_{PREDICTED_ARCHITECTURE}. `16-bit` stands for Half and BFloat16 where both are alike. The size of shared memory is
given when a kernel is started; in their code are {shared} bytes at most, which the system reserves.
"""
    rest = dict(kernels)
    for pattern, sentence in UNITS:
        lines: dict[str, list[str]] = {}
        for name in [name for name in rest if re.match(pattern, name)]:
            lines.setdefault(_line(rest.pop(name), architectures, columns), []).append(name)
        if lines:
            text += f"\n{textwrap.fill(sentence, 120)}\n\n{head}"
        for cells, names in lines.items():
            text += "".join(f"| `{name}` | {cells} |\n" for name in _merged(names))
    if rest:
        text += f"\nOther kernels:\n\n{head}"
        text += "".join(f"| `{name}` | {_line(rows, architectures, columns)} |\n" for name, rows in rest.items())
    return text


def _line(rows: dict, architectures: list[str], columns: tuple[str, ...]) -> str:
    registers = "/".join(str(rows[a][0]) if a in rows else "–" for a in architectures)
    stack = ", ".join(f"{rows[a][1]} (sm_{a})" for a in rows if rows[a][1]) or "0"
    row = rows.get(PREDICTED_ARCHITECTURE)
    loop = dict(zip(COUNTS, row[4], strict=True)) if row and row[4] else {}
    return " | ".join([registers, stack, str(row[3][0]) if row else "–", *(str(loop.get(c, "–")) for c in columns)])


def _merged(names: list[str]) -> list[str]:
    """One name for both 16-bit types."""
    halves = {name.replace("BFloat16", "Half") for name in names if "BFloat16" in name} & set(names)
    return [
        name.replace("Half", "16-bit") if name in halves else name
        for name in names
        if "BFloat16" not in name or name.replace("BFloat16", "Half") not in halves
    ]


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
        problems += compare(kernels, nvcc, json.loads(options.check.read_text())) + predictions(kernels)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(kernels)} kernels, no stack frames" + (f", as in {options.check}" if options.check else ""))


if __name__ == "__main__":
    main()
