"""Peak memory of FFNet-1, FFNet-Seg and FFNet-SR, ours against eager PyTorch: ``python -m benchmarks memory``.

Each contender runs in a fresh process. There the model and its input are made and the resident high-water mark is set
to what is resident. After some calls the mark, VmHWM, says how much was resident at most; ``calls`` is what that is
above the state before the first of them: maps, packed weights, gradients, scratch memory, and code that is paged in.
Time is not measured, and the processes run one by one.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .cases import Case, ModelCase, TrainingCase
from .high_water import MIB, reset_peak, resident
from .machine import machine, machine_line
from .peers import CONTENDERS, OURS
from .text import markdown
from .work import build

CASES: tuple[Case, ...] = (
    ModelCase("ffnet_1", 8),
    ModelCase("ffnet_1", 8, dtype="bfloat16"),
    TrainingCase("ffnet_1", 4),
    ModelCase("ffnet_seg_ade20k", 1, 512),
    ModelCase("ffnet_seg_ade20k", 1, 1024),
    ModelCase("ffnet_sr_light", 1, 360, width=640),
    TrainingCase("ffnet_1", 4, autocast=True),
)
NAMES = (OURS, "eager nchw", "eager channels-last")
CALLS = 3


def measure(case: Case, contender: str) -> dict[str, int]:
    """Bytes in this very process: resident ahead of the first call, and the most during the calls."""
    work = build(case)
    with torch.inference_mode(work.inference):
        program = CONTENDERS[contender].prepare(work)
        del work
        gc.collect()
        reset_peak()
        before = resident("VmRSS")
        for _ in range(CALLS):
            program()
        return {"before": before, "peak": resident("VmHWM")}


def in_fresh_process(case: int, contender: str, threads: int) -> dict[str, Any]:
    """As `measure`, or {"error": why not}."""
    arguments = ["--one", str(case), contender, "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", str(__package__), "memory", *arguments], capture_output=True, text=True
    )
    if done.returncode != 0:
        return {"error": next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """A line a contender; ratios are to ours in the same case."""
    ours = {row["case"]: row for row in rows if row["contender"] == OURS and "error" not in row}
    lines = []
    for row in rows:
        name = (row["case"], row["contender"])
        if "error" in row:
            lines.append((*name, "-", "-", "-", "-", row["error"]))
            continue
        calls, own = row["peak"] - row["before"], ours.get(row["case"])
        ratio = f"{calls / max(1, own['peak'] - own['before']):.2f}x" if own else "-"
        lines.append((*name, *(f"{size / MIB:.0f}" for size in (row["before"], row["peak"], calls)), ratio, ""))
    headers = ("case", "contender", "before MiB", "peak MiB", "calls MiB", "calls / ours", "")
    return markdown(headers, lines, left=(0, 1, 6))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something could not be measured."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} memory", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(CASES[int(options.one[0])], options.one[1])))
        return 0
    rows: list[dict[str, Any]] = [
        {"case": case.name, "contender": name, **in_fresh_process(number, name, torch.get_num_threads())}
        for number, case in enumerate(CASES)
        for name in NAMES
    ]
    print(f"machine: {machine_line(machine())}\n\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        print(f"\nwrote {options.json}")
    return 1 if any("error" in row for row in rows) else 0
