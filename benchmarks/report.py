"""Results as Markdown text: a line per case, summaries, every contender of every case, how time grows with work, and
tables for GPUs. ``python -m benchmarks report`` writes them and charts into a folder."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import charts
from .cases import GROWTH_FROM, parameters
from .contenders import COPY, is_ours
from .options import parser_of
from .results import (
    OURS,
    Measurement,
    Result,
    Roofs,
    Row,
    baselines_of,
    machine_line,
    read,
    replacing,
    shared_words,
    write_json,
)

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
#: The sections of a report by kind of case.
KINDS = {
    "operator": "Operators",
    "layer": "Layers",
    "model": "Models",
    "training": "Training steps",
    "": "Cases",  # not recorded by the first format
}


def report(result: Result, *, details: bool = True) -> str:
    """The whole report: machine, summary, a table per kind of case, fitted growth, what did not run, and all
    contenders."""
    roofs = Roofs.of(result.machine)
    parts = [f"machine: {machine_line(result.machine)}", roofs_text(roofs), *NOTES, summary(result.rows)]
    for kind, title in KINDS.items():
        rows = [row for row in result.rows if kind_of(row) == kind]
        if rows:
            parts += [f"## {title}", overview(rows, roofs)]
    if fitted := growth_table(result.rows):
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
    """A line per case: ours, and the time of each baseline over ours."""
    baselines, shared = baselines_of(rows), shared_words(rows)
    name = f"case ({shared.strip()})" if shared else "case"
    headers = (name, "ours ms", "quartiles", "GFLOP/s", "GB/s", "of roof", "MiB", "error", *baselines)
    lines = []
    for row in rows:
        cells, ours = ["-"] * (len(headers) - 1), row.measurement(OURS)
        if ours:
            error = error_text(ours) if ours.passed else f"{WRONG} {error_text(ours)}"
            cells = [*_rates(row, ours, roofs), error, *(_baseline_text(row, name) for name in baselines)]
        lines.append((row.case.removesuffix(shared), *cells))
    return markdown(headers, lines)


def table(row: Row, roofs: Roofs | None = None) -> str:
    """A line per contender."""
    lines = []
    for m in row.measurements:
        name = f"{m.contender} ({m.detail})" if m.detail else m.contender
        if not m.samples_ms:
            lines.append((name, *["-"] * (len(HEADERS) - 2), "did not run"))
            continue
        ms, quartiles, *rates = _rates(row, m, roofs)
        ratio = row.ratio(m.contender)
        lines.append((
            name, ms, quartiles, busy_text(m), f"{m.faults_per_call:.0f}", *rates, error_text(m),
            "ok" if m.passed else "WRONG", ratio_text(ratio), FASTER_BASELINE if ratio and ratio < 1 else "",
        ))  # fmt: skip
    return markdown(HEADERS, lines, left=(0, 10, 12))


def _rates(row: Row, m: Measurement, roofs: Roofs | None) -> tuple[str, ...]:
    """Milliseconds, quartiles, GFLOP/s, GB/s, share of the roofline and MiB."""
    memory = "-" if m.memory is None else f"{m.memory / 2**20:.1f}"
    quartiles, share = range_text(m.quartiles_ms, 3), share_text(row, m, roofs)
    return f"{m.median_ms:.3f}", quartiles, f"{row.gflops(m):.1f}", f"{row.gbytes(m):.1f}", share, memory


def absences(rows: Sequence[Row]) -> list[str]:
    """Contenders that did not run, and why; and in how many cases, if not in all."""
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
    for name in baselines_of(rows):
        if ratios := [ratio for row in rows if (ratio := row.ratio(name)) is not None]:
            numbers = statistics.geometric_mean(ratios), min(ratios), max(ratios)
            lines.append((name, f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}", *map(ratio_text, numbers)))
    return markdown(("time / ours of", "ours faster", "geometric mean", "least", "most"), lines) if lines else ""


def roofs_text(roofs: Roofs | None) -> str:
    if roofs is None:
        return ""
    peaks = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in roofs.gflops.items())
    names = {size: f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB" for size, _ in roofs.copies}
    copies = ", ".join(f"{rate:.0f} GB/s for {names[size]}" for size, rate in roofs.copies)
    return f"roofs: {peaks or 'multiply–adds not measured (no native helper)'}; copies at {copies}"


def error_text(measurement: Measurement) -> str:
    return "nan" if measurement.error is None else f"{measurement.error:.1e}"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def range_text(ends: tuple[float, float], digits: int, between: str = "..") -> str:
    """A range, such as quartiles."""
    return between.join(f"{end:.{digits}f}" for end in ends)


def busy_text(measurement: Measurement) -> str:
    """Samples in which another process took a core, of all."""
    return f"{measurement.disturbed}/{len(measurement.samples_ms)}"


def share_text(row: Row, m: Measurement, roofs: Roofs | None) -> str:
    """The share of the roofline reached."""
    least = row.least_ms(roofs) if roofs else None
    return "-" if least is None else f"{100 * least / m.median_ms:.0f} %"


def _baseline_text(row: Row, name: str) -> str:
    theirs, ratio = row.measurement(name), row.ratio(name)
    if theirs is None or ratio is None:
        return "-"
    marks = [mark for mark, applies in ((SLOWER, ratio < 1), (WRONG, not theirs.passed)) if applies]
    return " ".join((*marks, ratio_text(ratio)))


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """An aligned Markdown table, columns right-aligned but those in ``left``."""
    widths = [max(3, *(len(line[i]) for line in (headers, *lines))) for i in range(len(headers))]

    def format_line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([format_line(headers), f"|{rule}|", *map(format_line, lines)])


# How time grows with work: exponents fitted to cases that differ in one dimension only.

#: Fields of a case that grow, and their names; maps are square, so a size counts as its pixels.
DIMENSIONS = {"batch": "batch", "size": "pixels", "channels": "channels", "kernel": "kernel size"}
LEAST_POINTS = 3
GROWTH_NOTE = (
    "Time is taken to be a power of what grows, all else as in {base}: the exponent of the line through the "
    "logarithms (least squares), and in brackets by how much the point that is farthest from it is off. "
    "arithmetic is the exponent of the multiply–adds: a smaller one says that something is spared or shared as "
    "work grows, a larger one that something runs out."
)


class Series(NamedTuple):
    """One operator as one dimension grows: its values (pixels for a size), and a row for each."""

    operator: str
    dimension: str
    values: list[int]
    rows: list[Row]

    def times(self, contender: str) -> list[tuple[int, float]]:
        """(value, median milliseconds) of the rows in which a contender ran."""
        pairs = zip(self.values, self.rows, strict=True)
        return [(value, m.median_ms) for value, row in pairs if (m := row.measurement(contender)) is not None]


def series(rows: Sequence[Row]) -> Iterator[Series]:
    """The rows that differ from a call of `GROWTH_FROM` in one dimension only, where there are at least three."""
    for base in GROWTH_FROM.values():
        start = parameters(base)
        for dimension in DIMENSIONS:
            fixed = {name: value for name, value in start.items() if name != dimension}
            found = [row for row in rows if fixed.items() <= row.parameters.items() and "width" not in row.parameters]
            found.sort(key=lambda row: row.parameters[dimension])
            if len(found) >= LEAST_POINTS:
                power = 2 if dimension == "size" else 1
                yield Series(base.operator, dimension, [row.parameters[dimension] ** power for row in found], found)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Exponent, and the largest deviation of a point from the fitted power, as a share of the fit."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    exponent, offset = statistics.linear_regression(xs, ys)
    return exponent, max(abs(math.expm1(y - offset - exponent * x)) for x, y in zip(xs, ys, strict=True))


def growth_table(rows: Sequence[Row]) -> str:
    """A line per series; empty if there is none."""
    found = list(series(rows))
    if not found:
        return ""
    contenders = [OURS, *baselines_of([row for one in found for row in one.rows])]
    lines = []
    for one in found:
        work, _ = fit([(value, row.flops) for value, row in zip(one.values, one.rows, strict=True)])
        range_, cells = f"{one.values[0]}..{one.values[-1]}", [_fit_text(one.times(name)) for name in contenders]
        lines.append((one.operator, DIMENSIONS[one.dimension], range_, f"{work:.2f}", *cells))
    headers = ("operator", "grows", "from..to", "arithmetic", *contenders)
    base = next(iter(GROWTH_FROM.values()))
    start = f"{base.batch}×{base.channels}×{base.size}×{base.size}, {base.kernel}×{base.kernel}, {base.dtype}"
    return f"{GROWTH_NOTE.format(base=start)}\n\n{markdown(headers, lines, left=(0, 1))}"


def _fit_text(points: Sequence[tuple[float, float]]) -> str:
    if len(points) < LEAST_POINTS:
        return "-"
    exponent, deviation = fit(points)
    return f"{exponent:.2f} ({100 * deviation:.0f} %)"


# Of a GPU.

GPU_HEADERS = ("case", "backend", "ms", "quartiles", "GB/s", "/ copy", "predicted", "error", "")
MOST_FAILURES = 12

#: Of the CUDA kernels for 16-bit NCHW maps; how it names the operators that are timed here.
PREDICTIONS = Path(__file__).resolve().parents[1] / "docs" / "cuda-resources.json"
PREDICTED_OPERATORS = {"ffnified_attention": "token mixer", "depthwise_conv2d": "depthwise, GELU"}


def gpu_summary(result: Result, left: Mapping[str, Sequence[str]]) -> tuple[str, bool]:
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
    lines += list(dict.fromkeys(_failed_baselines(result)))[:MOST_FAILURES]
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


def _failed_baselines(result: Result) -> Iterator[str]:
    for row in result.rows:
        for m in row.measurements:
            if m.reason and not is_ours(m.contender):
                yield f"{m.contender}: {_short(m.reason)}"


def gpu_table(result: Result) -> str:
    """A line for each contender of each case."""
    notes = (
        "Medians and quartiles of milliseconds, cold caches. GB/s counts each tensor once; / copy is the time over "
        "that of a plain copy of as many bytes; predicted: that by a model of the machine code, for 128 images (docs/)."
    )
    predicted = predictions(PREDICTIONS, result.machine["device"])
    lines = [_gpu_line(row, m, predicted) for row in result.rows for m in row.measurements]
    return f"{notes}\n\n{markdown(GPU_HEADERS, lines, left=(0, 1, 8))}"


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


def _gpu_line(row: Row, m: Measurement, predicted: Mapping[str, float]) -> tuple[str, ...]:
    if not m.samples_ms:
        return (row.case, m.contender, *["-"] * 6, "did not run")
    first, third = m.quartiles_ms
    over_copy = row.ratio(m.contender, COPY)
    ratio = predicted.get(_without_channels(row.case) or "") if m.contender == "cuda nchw" else None
    return (
        row.case, m.contender, f"{m.median_ms:.4f}", f"{first:.4f}..{third:.4f}", f"{row.gbytes(m):.0f}",
        "-" if over_copy is None else f"{over_copy:.2f}x", "-" if ratio is None else f"{ratio:.2f}x", error_text(m),
        "ok" if m.passed else "WRONG",
    )  # fmt: skip


def _without_channels(case: str) -> str | None:
    """`operator 16x16 k7` of the name of an operator's forward pass in 16 bits; other kernels are not predicted."""
    found = re.fullmatch(r"(\w+) \d+x(\d+x\d+ k\d+) b\d+ (bfloat16|float16) forward", case)
    return f"{found[1]} {found[2]}" if found else None


# As files, and the command.


def write_report(result: Result, folder: Path) -> None:
    """report.md in the folder, and beside it the charts that can be drawn; says what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [chart for chart in _charts(result) if _drawn(chart, folder, machine_line(result.machine))]
    pictures = "\n\n".join(f"![{chart.title}]({chart.name})" for chart in drawn)
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(f"# Benchmark report\n\n{pictures}\n\n{report(result)}\n")
    print(f"wrote {folder / 'report.md'}" + "".join(f", {chart.name}" for chart in drawn))


class _Chart(NamedTuple):
    name: str
    title: str
    draw: Callable[[Path, str], None]


def _charts(result: Result) -> Iterator[_Chart]:
    for kind, title in KINDS.items():
        if rows := [row for row in result.rows if kind_of(row) == kind]:
            draw = functools.partial(charts.speedup_chart, rows)
            yield _Chart(f"speedup-{kind or 'cases'}.png", f"{title}: time over ours", draw)
    draw = functools.partial(charts.roofline_chart, result.rows, Roofs.of(result.machine))
    yield _Chart("roofline.png", "Rates under the roofline", draw)


def _drawn(chart: _Chart, folder: Path, line: str) -> bool:
    try:
        chart.draw(folder / chart.name, f"{chart.title}\n{line}")
    except charts.ChartError as error:
        print(f"no {chart.name}: {error}", file=sys.stderr)
        (folder / chart.name).unlink(missing_ok=True)  # a chart of an earlier run would be mistaken for this one's
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 2 if results cannot be read or do not belong together."""
    from . import goals  # imported here, as it uses the functions above

    parser = parser_of("report", "Prints the tables of results that were kept.")
    parser.add_argument("parts", nargs="+", type=Path, metavar="RESULTS.json", help="a later one replaces equal cases")
    parser.add_argument("--goals", action="store_true", help="which goals of the suite 'record' are reached, instead")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md and charts there, print nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all parts into this one, too")
    options = parser.parse_args(argv)
    try:
        result = read(options.parts)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.out:
        write_report(result, options.out)
    else:
        print(goals.report(result) if options.goals else report(result))
    if options.json:
        write_json(result, options.json)
        print(f"\nwrote {options.json}")
    return 0
