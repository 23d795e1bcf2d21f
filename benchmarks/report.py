"""Results as a text table, which is Markdown as well."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .machine import machine_line
from .peers import OURS
from .results import Measurement, Result, Row, peers_of

HEADERS = ("contender", "median ms", "quartiles", "busy", "faults", "GFLOP/s", "GB/s", "error", "", "time / ours", "")
NOTES = (
    "Time is the median of samples taken in turn, in one process; all contenders have the same dtype and threads, "
    "and a sample begins with untimed calls, once no other thread of the process runs. Each reads maps in the layout "
    "its name says, ours and torch.compile in that of the case, ONNX Runtime and OpenVINO in NCHW; converting layouts, "
    "laying out weights and compiling are not counted. busy: samples, of all, in which another process took a core; "
    "faults: pages that the kernel had to supply in a call (median).",
    "GFLOP/s counts taps on padding; GB/s counts each input, weight and output once. error is the largest one against "
    "float64 over the largest output; it is ok up to twice that of plain PyTorch (models: four times) and four "
    "roundings.",
)
FASTER_PEER = "<- faster than ours"


def report(result: Result) -> str:
    """Everything: machine, one table a case, what did not run, and a summary."""
    parts = [f"machine: {machine_line(result.machine)}", *NOTES]
    parts += [f"{row.case}\n\n{table(row)}" for row in result.rows]
    reasons = dict.fromkeys((m.contender, m.reason) for row in result.rows for m in row.measurements if m.reason)
    parts += [f"{contender}: {reason}" for contender, reason in reasons]
    parts.append(summary(result.rows))
    if result.interrupted:
        parts.append(f"interrupted: only the {len(result.rows)} finished cases are shown")
    return "\n\n".join(part for part in parts if part)


def table(row: Row) -> str:
    """One line a contender."""
    return markdown(HEADERS, [_line(row, m) for m in row.measurements], left=(0, 8, 10))


def summary(rows: Sequence[Row]) -> str:
    """For each peer: cases, in how many of them ours is faster, and the geometric mean and extremes of the ratio."""
    lines = []
    for peer in peers_of(rows, OURS):
        ratios = [ratio for row in rows if (ratio := row.ratio(peer, OURS)) is not None]
        if ratios:
            faster = sum(ratio > 1 for ratio in ratios)
            mean = statistics.geometric_mean(ratios)
            lines.append(
                (peer, f"{faster} of {len(ratios)}", f"{mean:.2f}x", f"{min(ratios):.2f}x", f"{max(ratios):.2f}x")
            )
    if not lines:
        return ""
    return markdown(("time / ours of", "ours faster", "geometric mean", "least", "most"), lines)


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """An aligned Markdown table, columns right-aligned but those in ``left``."""
    widths = [max(3, *(len(line[i]) for line in (headers, *lines))) for i in range(len(headers))]

    def format_line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([format_line(headers), f"|{rule}|", *map(format_line, lines)])


def error_text(measurement: Measurement) -> str:
    return "nan" if measurement.error is None else f"{measurement.error:.1e}"


def ratio_text(row: Row, measurement: Measurement) -> str:
    ratio = row.ratio(measurement.contender, OURS)
    return "-" if ratio is None else f"{ratio:.2f}x"


def busy_text(measurement: Measurement) -> str:
    """Samples in which another process took a core, of all."""
    return f"{measurement.disturbed}/{len(measurement.samples_ms)}"


def _line(row: Row, m: Measurement) -> tuple[str, ...]:
    name = f"{m.contender} ({m.detail})" if m.detail else m.contender
    if not m.samples_ms:
        return (name, *["-"] * 9, "did not run: see below")
    first, third = m.quartiles_ms
    ratio = row.ratio(m.contender, OURS)
    return (
        name,
        f"{m.median_ms:.3f}",
        f"{first:.3f}..{third:.3f}",
        busy_text(m),
        f"{m.faults_per_call:.0f}",
        f"{row.gflops(m):.1f}",
        f"{row.gbytes(m):.1f}",
        error_text(m),
        "ok" if m.passed else "WRONG",
        ratio_text(row, m),
        FASTER_PEER if ratio is not None and ratio < 1 else "",
    )
