"""The results of ``benchmarks gpu`` as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .gpu_contenders import COPY, is_ours
from .report import error_text
from .results import Measurement, Result, Row
from .text import markdown

HEADERS = ("case", "backend", "ms", "quartiles", "GB/s", "/ copy", "predicted", "error", "")
MOST_FAILURES = 12

#: Of the CUDA kernels for 16-bit NCHW maps; how it names the operators that are timed here.
PREDICTIONS = Path(__file__).resolve().parents[1] / "docs" / "cuda-resources.json"
PREDICTED_OPERATORS = {"ffnified_attention": "token mixer", "depthwise_conv2d": "depthwise, GELU"}


def summary(result: Result, left: Mapping[str, Sequence[str]]) -> tuple[str, bool]:
    """A line a part with what failed in it, and whether anything did; ``left``: steps that time did not allow."""
    lines, failed = [f"GPU: {result.machine['device']}; commit {result.machine['commit']}"], False
    for name, part in result.extra["parts"].items():
        skipped = list(dict.fromkeys(row["skipped"] for row in part["rows"].values() if "skipped" in row))
        rows = {step: row for step, row in part["rows"].items() if "skipped" not in row}
        failures = [f"  {step}: {_reason(row)}" for step, row in rows.items() if not row["passed"]]
        failed |= bool(failures)
        over = f", {len(left[name])} left: run again to go on" if left.get(name) else ""
        lines.append(f"{name}: {len(rows) - len(failures)} of {len(rows)} passed{over}")
        lines += [f"  skipped: {_short(reason)}" for reason in skipped]
        lines += failures[:MOST_FAILURES]
        lines += [f"  and {len(failures) - MOST_FAILURES} more"] if len(failures) > MOST_FAILURES else []
    lines += list(dict.fromkeys(_peers_that_failed(result)))[:MOST_FAILURES]
    return "\n".join(lines), failed


def _reason(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return _short(row["error"])
    errors = row.get("errors", {})
    if not isinstance(errors, Mapping):
        return _short("; ".join(errors))
    wrong = [(name, *pair) for name, pair in errors.items() if pair[0] is None or pair[0] > pair[1]]
    return ", ".join(f"{name} {'nan' if e is None else f'{e:.1e}'} > {limit:.1e}" for name, e, limit in wrong)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 240 else f"{line[:100]} [...] {line[-130:]}"


def _peers_that_failed(result: Result) -> Iterator[str]:
    for row in result.rows:
        for m in row.measurements:
            if m.reason and not is_ours(m.contender):
                yield f"{m.contender}: {_short(m.reason)}"


def table(result: Result) -> str:
    """A line for each contender of each case."""
    notes = (
        "Medians and quartiles of milliseconds, cold caches. GB/s counts each tensor once; / copy is the time over "
        "that of a plain copy of as many bytes; predicted: that by a model of the machine code, for 128 images (docs/)."
    )
    predicted = predictions(PREDICTIONS, result.machine["device"])
    lines = [_line(row, m, predicted) for row in result.rows for m in row.measurements]
    return f"{notes}\n\n{markdown(HEADERS, lines, left=(0, 1, 8))}"


def predictions(path: Path, device: str) -> dict[str, float]:
    """The predicted ratios in the table of the CUDA kernels' resources, by the beginnings of cases' names.

    They are made for few GPUs: others have none.
    """
    if not path.exists():
        return {}
    return {
        f"{operator} {row['map']}x{row['map']} k{row['filter']}": row["ratio_128"]
        for row in json.loads(path.read_text())["predictions"]
        for operator, named in PREDICTED_OPERATORS.items()
        if row["operator"] == named and row["gpu"].split()[0] in device
    }


def _line(row: Row, m: Measurement, predicted: Mapping[str, float]) -> tuple[str, ...]:
    if not m.samples_ms:
        return (row.case, m.contender, *["-"] * 6, "did not run")
    first, third = m.quartiles_ms
    over_copy = row.ratio(m.contender, COPY)
    ratio = predicted.get(_without_channels(row.case) or "") if m.contender == "cuda nchw" else None
    return (
        row.case,
        m.contender,
        f"{m.median_ms:.4f}",
        f"{first:.4f}..{third:.4f}",
        f"{row.gbytes(m):.0f}",
        "-" if over_copy is None else f"{over_copy:.2f}x",
        "-" if ratio is None else f"{ratio:.2f}x",
        error_text(m),
        "ok" if m.passed else "WRONG",
    )


def _without_channels(case: str) -> str | None:
    """`operator 16x16 k7` of the name of an operator's forward pass in 16 bits; other kernels are not predicted."""
    found = re.fullmatch(r"(\w+) \d+x(\d+x\d+ k\d+) b\d+ (bfloat16|float16) forward", case)
    return f"{found[1]} {found[2]}" if found else None
