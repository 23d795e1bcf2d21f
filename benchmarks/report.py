"""Results as text, which is Markdown as well: a line a case, summaries, and every contender of every case."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from . import growth
from .machine import machine_line
from .peers import OURS
from .results import Measurement, Result, Row, peers_of, shared_words
from .roofs import Roofs
from .text import markdown

HEADERS = (
    "contender", "median ms", "quartiles", "busy", "faults", "GFLOP/s", "GB/s", "of roof", "MiB", "error", "",
    "time / ours", "",
)  # fmt: skip
FASTER_BASELINE = "<- faster than ours"
SLOWER, WRONG = "🔴", "❌"
NOTES = (
    "A number below a baseline is the median, round by round, of its time over ours: below 1 it is faster than "
    f"ours, which is marked {SLOWER}. {WRONG} marks a result whose error is over the limit.",
    "Time is the median of samples taken in turn, in one process, with its quartiles; all contenders have the "
    "same dtype and threads, and a sample begins with untimed calls, once no other thread of the process runs. "
    "Each reads maps in the layout its name says, ours and torch.compile in that of the case, ONNX Runtime and "
    "OpenVINO in NCHW; converting layouts, laying out weights and compiling are not counted. Freed memory is "
    "kept by the process, and glibc before 2.38 is told to join small blocks at once.",
    "GFLOP/s counts taps on padding; GB/s counts each input, weight and output once. of roof: the least time in "
    "which the machine could do so many multiply–adds, or copy so many bytes, over the time taken; both were "
    "measured in the same run. It exceeds 100 % where taps on padding are skipped, or where maps are in a cache "
    "that a copy of their size does not reach. MiB: the most memory that a call took beyond what was there "
    "before it, its result among it; unknown for runtimes that keep memory of their own. error is the largest "
    "one against float64 over the largest output; operators are ok up to twice that of plain PyTorch and four "
    "roundings, all that has several layers up to twice as much.",
)
DETAILS = (
    "busy: samples, of all, in which another process took a core; faults: pages that the kernel had to supply "
    "in a call (median).",
)
#: The sections of a report, by kind of case.
KINDS = {
    "operator": "Operators",
    "layer": "Layers",
    "model": "Models",
    "training": "Training steps",
    "": "Cases",  # results of the first format do not say
}


def report(result: Result, *, details: bool = True) -> str:
    """Everything: machine, summary, a table a kind of case, fitted growth, what did not run, and all contenders."""
    roofs = Roofs.from_plain(result.machine.get("roofs"))
    parts = [f"machine: {machine_line(result.machine)}", roofs_text(roofs), *NOTES, summary(result.rows)]
    for kind, title in KINDS.items():
        rows = [row for row in result.rows if kind_of(row) == kind]
        if rows:
            parts += [f"## {title}", overview(rows, roofs)]
    if fitted := growth.table(result.rows):
        parts += ["## Cost as work grows", fitted]
    if reasons := absences(result.rows):
        parts += ["## What did not run", *reasons]
    if details:
        parts += ["## Every contender", *DETAILS, *(f"{row.case}\n\n{table(row, roofs)}" for row in result.rows)]
    if result.interrupted:
        parts.append("interrupted: cases are missing, or have the samples of fewer passes than others")
    return "\n\n".join(part for part in parts if part)


def kind_of(row: Row) -> str:
    """A key of `KINDS`."""
    kind = row.parameters.get("kind", "")
    return kind if kind in KINDS else ""


def overview(rows: Sequence[Row], roofs: Roofs | None = None) -> str:
    """A line a case: ours, and the time of each baseline over ours."""
    peers, shared = peers_of(rows, OURS), shared_words(rows)
    name = f"case ({shared.strip()})" if shared else "case"
    headers = (name, "ours ms", "quartiles", "GFLOP/s", "GB/s", "of roof", "MiB", "error", *peers)
    return markdown(headers, [_overview_line(row, shared, peers, roofs) for row in rows])


def table(row: Row, roofs: Roofs | None = None) -> str:
    """One line a contender."""
    return markdown(HEADERS, [_line(row, m, roofs) for m in row.measurements], left=(0, 10, 12))


def absences(rows: Sequence[Row]) -> list[str]:
    """Contenders that did not run, and why; in how many of the cases that name them, where it is not all."""
    found: dict[tuple[str, str], int] = {}
    named: dict[str, int] = {}
    for m in (m for row in rows for m in row.measurements):
        named[m.contender] = named.get(m.contender, 0) + 1
        if m.reason:
            found[m.contender, m.reason] = found.get((m.contender, m.reason), 0) + 1
    return [
        f"{name}{'' if count == named[name] else f' ({count} of {named[name]} cases)'}: {reason}"
        for (name, reason), count in found.items()
    ]


def summary(rows: Sequence[Row]) -> str:
    """For each baseline: cases, in how many of them ours is faster, the ratio's geometric mean and extremes."""
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


def colored(text: str) -> str:
    """For a terminal: what is marked slower in red."""
    return re.sub(rf"{SLOWER} ([\d.]+x)", "\033[31m  \\1\033[0m", text)


def roofs_text(roofs: Roofs | None) -> str:
    if roofs is None:
        return ""
    peaks = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in roofs.gflops.items())
    copies = ", ".join(f"{rate:.0f} GB/s for {_size_text(size)}" for size, rate in roofs.copies)
    return f"roofs: {peaks or 'multiply–adds not measured (no native helper)'}; copies at {copies}"


def error_text(measurement: Measurement) -> str:
    return "nan" if measurement.error is None else f"{measurement.error:.1e}"


def ratio_text(row: Row, measurement: Measurement) -> str:
    ratio = row.ratio(measurement.contender, OURS)
    return "-" if ratio is None else f"{ratio:.2f}x"


def busy_text(measurement: Measurement) -> str:
    """Samples in which another process took a core, of all."""
    return f"{measurement.disturbed}/{len(measurement.samples_ms)}"


def _size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def share_text(row: Row, m: Measurement, roofs: Roofs | None) -> str:
    """Of the roof."""
    least = row.least_ms(roofs) if roofs else None
    return "-" if least is None else f"{100 * least / m.median_ms:.0f} %"


def _memory_text(m: Measurement) -> str:
    return "-" if m.memory is None else f"{m.memory / 2**20:.1f}"


def _quartiles_text(m: Measurement) -> str:
    first, third = m.quartiles_ms
    return f"{first:.3f}..{third:.3f}"


def _overview_line(row: Row, shared: str, peers: Sequence[str], roofs: Roofs | None) -> tuple[str, ...]:
    ours = row.measurement(OURS)
    if ours is None:
        return (row.case.removesuffix(shared), *["-"] * (7 + len(peers)))
    return (
        row.case.removesuffix(shared),
        f"{ours.median_ms:.3f}",
        _quartiles_text(ours),
        f"{row.gflops(ours):.1f}",
        f"{row.gbytes(ours):.1f}",
        share_text(row, ours, roofs),
        _memory_text(ours),
        error_text(ours) if ours.passed else f"{WRONG} {error_text(ours)}",
        *(_peer_text(row, peer) for peer in peers),
    )


def _peer_text(row: Row, peer: str) -> str:
    theirs, ratio = row.measurement(peer), row.ratio(peer, OURS)
    if theirs is None or ratio is None:
        return "-"
    marks = [mark for mark, applies in ((SLOWER, ratio < 1), (WRONG, not theirs.passed)) if applies]
    return " ".join((*marks, f"{ratio:.2f}x"))


def _line(row: Row, m: Measurement, roofs: Roofs | None) -> tuple[str, ...]:
    name = f"{m.contender} ({m.detail})" if m.detail else m.contender
    if not m.samples_ms:
        return (name, *["-"] * (len(HEADERS) - 2), "did not run")
    ratio = row.ratio(m.contender, OURS)
    return (
        name,
        f"{m.median_ms:.3f}",
        _quartiles_text(m),
        busy_text(m),
        f"{m.faults_per_call:.0f}",
        f"{row.gflops(m):.1f}",
        f"{row.gbytes(m):.1f}",
        share_text(row, m, roofs),
        _memory_text(m),
        error_text(m),
        "ok" if m.passed else "WRONG",
        ratio_text(row, m),
        FASTER_BASELINE if ratio is not None and ratio < 1 else "",
    )
