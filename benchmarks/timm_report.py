"""Results of ``benchmarks timm`` as text, which is Markdown as well: a table a number of threads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .machine import machine_line
from .report import SLOWER, WRONG
from .results import Result, Row
from .text import markdown

EAGER = ("eager nchw", "eager channels-last")
OPTIMIZED = ("optimize nchw", "optimize channels-last")
#: Backends of torch.compile, plain and ours, by contender.
COMPILED = {"inductor": "inductor", "our backend": "ffnet_kernels"}
#: A ratio below it is no noise of a quiet machine.
NOT_SLOWER = 0.97
HEADERS = (
    "model",
    "input",
    *EAGER,
    *OPTIMIZED,
    "nchw",
    "channels-last",
    "best / best",
    "quartiles",
    "error / eager",
    "",
)
NOTE = (
    "Milliseconds of each contender (medians), and eager time over optimised time (median, round by round): in either "
    "layout, and of the faster eager layout over the faster optimised one. error / eager: largest error against "
    "float64, the worse of both optimised layouts over the worse of both eager ones; more than twice that, but for "
    f"four roundings of the largest output, is marked {WRONG}, and a ratio below {NOT_SLOWER} {SLOWER}."
)


def fastest(row: Row, names: Sequence[str]) -> str | None:
    """The one that took least, of those that ran."""
    ran = [measurement for name in names if (measurement := row.measurement(name))]
    return min(ran, key=lambda measurement: measurement.median_ms).contender if ran else None


def gain(row: Row) -> float | None:
    """Time of the faster eager layout over that of the faster optimised one."""
    eager, ours = fastest(row, EAGER), fastest(row, OPTIMIZED)
    return row.ratio(eager, ours) if eager and ours else None


def agrees(row: Row) -> bool:
    """Whether every optimised model that ran is as right as plain PyTorch."""
    return all(m.passed for name in (*OPTIMIZED, "our backend") if (m := row.measurement(name)))


def table(rows: Sequence[Row]) -> str:
    """A line a model, the greatest gain first."""
    return markdown(HEADERS, [_line(row) for row in sorted(rows, key=lambda row: gain(row) or 0.0, reverse=True)])


def compiled_table(rows: Sequence[Row]) -> str:
    """A line for each model that torch.compile took part in."""
    lines = []
    for row in rows:
        if any(row.measurement(name) for name in COMPILED):
            times = [f"{m.median_ms:.2f}" if (m := row.measurement(name)) else "-" for name in COMPILED]
            ratio, wrong = row.ratio(*COMPILED), any(m and not m.passed for m in map(row.measurement, COMPILED))
            lines.append((row.parameters["model"], *times, f"{ratio:.2f}×" if ratio else "-", WRONG if wrong else ""))
    return markdown(("model, torch.compile", *COMPILED, "ratio", ""), lines) if lines else ""


def _line(row: Row) -> tuple[str, ...]:
    measurements = [row.measurement(name) for name in (*EAGER, *OPTIMIZED)]
    times = [f"{m.median_ms:.2f}" if m else "-" for m in measurements]
    ratios = [row.ratio(*pair) for pair in zip(EAGER, OPTIMIZED, strict=True)]
    eager, ours, best = fastest(row, EAGER), fastest(row, OPTIMIZED), gain(row)
    between = row.ratio_quartiles(eager, ours) if eager and ours else None
    return (
        row.parameters["model"],
        f"{row.parameters['size']}²",
        *times,
        *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios),
        f"{SLOWER if best < NOT_SLOWER else ''} {best:.2f}×".lstrip() if best else "-",
        "{:.2f}–{:.2f}".format(*between) if between else "-",
        _error_text(row),
        "" if agrees(row) else WRONG,
    )


def _error_text(row: Row) -> str:
    eager, ours = _worst_error(row, EAGER), _worst_error(row, OPTIMIZED)
    return f"{ours / eager:.2f}" if eager and ours is not None else "-"


def _worst_error(row: Row, names: Sequence[str]) -> float | None:
    """None where nothing ran, or an output is not finite."""
    errors = [m.error for name in names if (m := row.measurement(name))]
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None


def summary(rows: Sequence[Row]) -> str:
    """What the table comes to."""
    gains = {row.parameters["model"]: ratio for row in rows if (ratio := gain(row))}
    if not gains:
        return "nothing was measured"
    slower = [name for name, ratio in gains.items() if ratio < NOT_SLOWER]
    wrong = [row.parameters["model"] for row in rows if not agrees(row)]
    means = [f"{statistics.geometric_mean(gains.values()):.2f}× best against best"]
    for title, *pair in zip(("NCHW", "channels-last"), EAGER, OPTIMIZED, strict=True):
        if ratios := [ratio for row in rows if (ratio := row.ratio(*pair))]:
            means.append(f"{statistics.geometric_mean(ratios):.2f}× in {title}")
    return (
        f"{len(gains)} models, geometric mean {', '.join(means)}; "
        f"below {NOT_SLOWER}: {len(slower)}{_listed(slower)}; outputs that disagree: {len(wrong)}{_listed(wrong)}"
    )


def overview(result: Result) -> str:
    """A line a number of threads: mean, least and greatest gain."""
    lines = []
    for threads in sorted({row.parameters["threads"] for row in result.rows}):
        rows = [row for row in result.rows if row.parameters["threads"] == threads]
        gains = sorted((ratio, row.parameters["model"]) for row in rows if (ratio := gain(row)))
        mean = statistics.geometric_mean(ratio for ratio, _ in gains)
        ends = [f"{ratio:.2f}× ({name})" for ratio, name in (gains[0], gains[-1])]
        below = sum(ratio < NOT_SLOWER for ratio, _ in gains)
        lines.append((str(threads), str(len(gains)), f"{mean:.2f}×", *ends, str(below)))
    headers = ("threads", "models", "geometric mean", "least", "greatest", f"below {NOT_SLOWER}")
    return f"{machine_line(result.machine)}, timm {result.extra['timm']}:\n\n{markdown(headers, lines)}"


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def failures(result: Result) -> list[str]:
    """A line for each model that failed, and for each contender of one."""
    failed = [f"{name}: {reason}" for name, reason in result.extra["failed"].items()]
    return failed + [
        f"{row.case}: {m.contender}: {m.reason}" for row in result.rows for m in row.measurements if m.reason
    ]


def report(result: Result) -> str:
    """Machine, a table and a summary a number of threads, and what failed."""
    parts = [f"machine: {machine_line(result.machine)}, timm {result.extra['timm']}", NOTE]
    for threads in sorted({row.parameters["threads"] for row in result.rows}):
        rows = [row for row in result.rows if row.parameters["threads"] == threads]
        parts += filter(None, [f"## Threads: {threads}", table(rows), summary(rows), compiled_table(rows)])
    if lines := failures(result):
        parts += ["## Failed", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)
