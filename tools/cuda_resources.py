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
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cuda_predictions as predictions
from cuda_machine_code import COUNTS, RESOURCES, collect

GROWTH = 1.05
NAME = "cuda-resources"  # of the tables in docs/


PREDICTED_ARCHITECTURE = predictions.ARCHITECTURE

# What a pass through the main loop is, of a warp unless a thread is named. The first entry that matches counts.
UNITS = (
    (
        r"(attention_(forward|backward|backward_planes)|depthwise_(stream|backward))_kernel",
        "PlaneRows: a whole panel. HighRows: as many steps as the filter has rows (3 or 7), each for a row of a panel, "
        "128 elements. AnyRows: such steps twice, asking for each what it does, and without, AskedRows once; what "
        "only ReLU runs is counted, too, and `any` fetches in two ways.",
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


def compare(kernels: dict, predicted: list[dict], nvcc: str, committed: dict) -> list[str]:
    """What is wrong with `kernels` and predictions against the committed table."""
    problems = []
    if [*RESOURCES, *COUNTS] != committed["columns"] or "predictions" not in committed:
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
    return problems + (compare_predictions(predicted, committed["predictions"]) if same_compiler else [])


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


def compare_predictions(predicted: list[dict], committed: list[dict]) -> list[str]:
    """What grew by more than GROWTH against the committed predictions, and which are missing or new."""
    shape = ("operator", "filter", "map", "channels", "gpu")
    old, new = ({tuple(row[k] for k in shape): row for row in table} for table in (committed, predicted))
    problems = [f"{', '.join(map(str, key))}: predicted in one table only" for key in old.keys() ^ new.keys()]
    for key in old.keys() & new.keys():
        for name, before in old[key].items():
            if name not in (*shape, "blocks", "limit") and new[key][name] > before * GROWTH + 0.05:
                problems.append(f"{', '.join(map(str, key))}: {name} grew from {before} to {new[key][name]}")
    return sorted(problems)


def write_table(path: Path, kernels: dict, nvcc: str, predicted: list[dict]) -> None:
    """A line a kernel and a prediction, so that a change of one shows as one."""
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(rows, separators=(',', ':'))}" for n, rows in kernels.items())
    head = f'"nvcc": {json.dumps(nvcc)},\n"columns": {json.dumps([*RESOURCES, *COUNTS])}'
    rows = ",\n".join(map(json.dumps, predicted))
    path.write_text(f'{{\n{head},\n"predictions": [\n{rows}\n],\n"kernels": {{\n{lines}\n}}\n}}\n')


def markdown(kernels: dict, nvcc: str, predicted: list[predictions.Prediction]) -> str:
    library, arguments = (
        "ffnet_kernels/lib/libffnet_kernels_cuda.so",
        f"--write docs/{NAME}.json --markdown docs/{NAME}.md",
    )
    text = f"""# What the CUDA kernels take

Of the machine code that nvcc {nvcc} makes; do not edit. After a change of a kernel, with the library that `make cuda` builds:

    python tools/cuda_resources.py {library} {arguments}

With `--check docs/{NAME}.json` alone it fails where a kernel has a stack frame or spills, where a count or a
prediction has grown by more than {GROWTH - 1:.0%}, and where a prediction exceeds its limit. The JSON file has all counts of all architectures.

"""  # noqa: E501
    return text + predictions.markdown(predicted) + _resource_tables(kernels)


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
    kernels, code = collect(options.library, PREDICTED_ARCHITECTURE, predictions.KNOWN)
    nvcc, problems = nvcc_of(options.library), frames(kernels)
    predicted: list[predictions.Prediction] = []
    if code:  # a library without kernels for the architecture, or of others, has none
        registers = {name: rows[PREDICTED_ARCHITECTURE][0] for name, rows in kernels.items() if name in code}
        predicted, wrong = predictions.predict_all(code, registers)
        problems += wrong if options.check else []
    rows = predictions.table(predicted)
    if options.write:
        write_table(options.write, kernels, nvcc, rows)
    if options.markdown:
        options.markdown.write_text(markdown(kernels, nvcc, predicted))
    if options.check:
        problems += compare(kernels, rows, nvcc, json.loads(options.check.read_text()))
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(kernels)} kernels, no stack frames" + (f", as in {options.check}" if options.check else ""))


if __name__ == "__main__":
    main()
