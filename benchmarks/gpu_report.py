"""The results of ``benchmarks.gpu`` as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .gpu_timing import COMPILED, COPY, EAGER, EAGER_NCHW, OURS_NCHW
from .peers import OURS
from .report import error_text, markdown
from .results import Result, Row

HEADERS = ("case", "ours ms", "quartiles", "GB/s", "/ copy", *(OURS_NCHW, EAGER_NCHW, EAGER, COMPILED), "error", "")
MOST_FAILURES = 12


def summary(result: Result, left: Mapping[str, Sequence[str]]) -> tuple[str, bool]:
    """A line a part with what failed in it, and whether anything did; ``left``: steps that time did not allow."""
    lines, failed = [f"GPU: {result.machine['device']}; commit {result.machine['commit']}"], False
    for name, part in result.extra["parts"].items():
        rows = {**part["rows"], **(_bench_rows(result) if name == "bench" else {})}
        failures = [f"  {step}: {_reason(row)}" for step, row in rows.items() if not row["passed"]]
        failed |= bool(failures)
        over = f", {len(left[name])} left: run again to go on" if left.get(name) else ""
        lines.append(f"{name}: {len(rows) - len(failures)} of {len(rows)} passed{over}")
        lines += failures[:MOST_FAILURES]
        lines += [f"  and {len(failures) - MOST_FAILURES} more"] if len(failures) > MOST_FAILURES else []
    lines += list(dict.fromkeys(_peers_that_failed(result)))[:MOST_FAILURES]
    return "\n".join(lines), failed


def _bench_rows(result: Result) -> dict[str, dict[str, Any]]:
    """As rows of the other parts: ours has to run and to be right."""
    ours = {row.case: row.measurements[0] for row in result.rows}
    return {case: {"passed": m.passed, "error": m.reason or f"error {error_text(m)}"} for case, m in ours.items()}


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
        for m in row.measurements[1:]:
            if m.reason:
                yield f"{m.contender}: {_short(m.reason)}"


def table(result: Result) -> str:
    """A line a case: our time and rate, then the other contenders as multiples of our time."""
    notes = "Medians, cold caches; GB/s counts each tensor once; from the sixth column on: time / ours, ! where wrong."
    return f"{notes}\n\n{markdown(HEADERS, [_line(row) for row in result.rows], left=(0, 10))}"


def _line(row: Row) -> tuple[str, ...]:
    ours = row.measurement(OURS)
    if ours is None:
        return (row.case, *["-"] * 9, "did not run")
    first, third = ours.quartiles_ms
    over_copy = row.ratio(OURS, COPY)
    return (
        row.case,
        f"{ours.median_ms:.4f}",
        f"{first:.4f}..{third:.4f}",
        f"{row.gbytes(ours):.0f}",
        "-" if over_copy is None else f"{over_copy:.2f}x",
        *(_peer(row, name) for name in (OURS_NCHW, EAGER_NCHW, EAGER, COMPILED)),
        error_text(ours),
        "ok" if ours.passed else "WRONG",
    )


def _peer(row: Row, name: str) -> str:
    ratio, peer = row.ratio(name, OURS), row.measurement(name)
    return "-" if ratio is None or peer is None else f"{ratio:.2f}x{'' if peer.passed else '!'}"
