"""Goals for the CPU kernels, and whether results of the suite "record" reach them: ``report --goals`` and `tables`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from .cases import LARGE_FILTERS, Case, LayerCase, MemberCase, ModelCase, OperatorCase, TrainingCase, suite
from .contenders import EAGER, EAGER_NCHW
from .report import busy_text, error_text, markdown, range_text, ratio_text
from .results import OURS, Result, Row, machine_line

SAMPLES = 9  # per contender, as the suite has hundreds of cases
HEADERS = (
    "case", "ours ms", "GFLOP/s", "best baseline", "its ms", "ratio", "quartiles", "busy", "must", "", "aim", "",
)  # fmt: skip
NOTES = (
    "ratio: time of the best baseline over ours, round by round, median and quartiles. The best baseline is the one "
    "with the smallest ratio among those that the goal is set against, even if its own error is over the limit (marked "
    "*). busy: samples of ours in which another process took a core. Which baselines were measured: "
    "`benchmarks.goals.baselines`.",
    "The aim for the channel mixer is 95 % of the processor's peak, not a ratio: see GFLOP/s.",
)


class Goal(NamedTuple):
    """Speed-ups over the best baseline, or over the one named by ``against``."""

    must: float
    aim: float | None
    against: str | None = None


_LARGE = {"forward": Goal(2, 4), "backward": Goal(10, 40)}  # filters of 31×31


def goal(case: Case) -> Goal | None:
    """The goal of a case; None if none was set."""
    half = case.dtype != "float32"
    if isinstance(case, TrainingCase) and case.autocast:
        return Goal(1.5, None)
    if isinstance(case, TrainingCase):
        return None if half else Goal(1.6, 2.2, EAGER)
    if isinstance(case, LayerCase | MemberCase):
        return None
    if isinstance(case, ModelCase):
        return Goal(1.2, 1.35) if half else Goal(1.05, 1.12)
    if case.kernel >= min(kernel for *_, kernel in LARGE_FILTERS):
        return _LARGE[case.direction]
    if case.operator == "channel_mixer":
        if case.direction == "backward":
            return None
        narrow = case.channels <= 96
        return Goal((1.2 if narrow else 1.1) if half else (1.1 if narrow else 1.0), None)
    if case.direction == "backward":
        return Goal(6, 15, EAGER)
    if half:
        return Goal(2, 3)
    return Goal(1.4, 1.8) if case.operator == "depthwise_conv2d" else Goal(1.5, 2)


def baselines(case: Case) -> tuple[str, ...]:
    """The strongest baselines of a case, so that the suite takes minutes.

    torch.compile is left out: its code calls the same convolutions as eager PyTorch, it was not the best of FFNet-1 in
    trials, and compiling takes longer than measuring all others. ``--baselines all`` adds it. Forward passes of 16-bit
    filters of 31×31 are not run by eager PyTorch, which cannot use oneDNN there, and took hundreds of times as long as
    OpenVINO.
    """
    if isinstance(case, OperatorCase) and case.dtype != "float32" and case.kernel > 7:
        return ("openvino",) if case.direction == "forward" else (EAGER,)
    if isinstance(case, OperatorCase) and case.direction == "forward":
        return EAGER_NCHW, EAGER, "onnxruntime", "openvino"
    if isinstance(case, OperatorCase | TrainingCase):
        return EAGER_NCHW, EAGER
    return EAGER, "onnxruntime", "openvino"


class _Judged(NamedTuple):
    """A row of the suite, its goal, and the baseline that counts, if that and ours ran."""

    row: Row
    case: Case
    goal: Goal | None
    baseline: str | None


def _judged(result: Result) -> Iterator[_Judged]:
    cases = {case.name: case for case in suite("record")}
    for row in result.rows:
        if case := cases.get(row.case):
            goal_ = goal(case)
            yield _Judged(row, case, goal_, row.best_baseline(goal_.against if goal_ else None))


def report(result: Result) -> str:
    """Machine, a line a case, and how many of the goals are reached."""
    judged = list(_judged(result))
    ran = [(one.row, m) for one in judged for m in one.row.measurements]
    wrong = [
        f"{row.case}: {m.contender} has an error of {error_text(m)}, over the limit"
        for row, m in ran if m.samples_ms and not m.passed
    ]  # fmt: skip
    absent = {f"{m.contender}: {m.reason}" for _, m in ran if m.reason}
    missing, count = len(suite("record")) - len(judged), len(suite("record"))
    parts = [
        f"machine: {machine_line(result.machine)}", *NOTES,
        markdown(HEADERS, [_line(one) for one in judged], left=(0, 3, 9, 11)),
        "\n".join(wrong), "\n".join(sorted(absent)), summary(result),
        f"{missing} of {count} cases of the suite are not in these results" if missing else "",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _line(judged: _Judged) -> tuple[str, ...]:
    row, _, goal, baseline = judged
    ours, theirs = row.measurement(OURS), row.measurement(baseline) if baseline else None
    ratio, spread = (row.ratio(baseline), row.ratio_quartiles(baseline)) if baseline else (None, None)
    if not (ours and theirs and ratio and spread):
        return (row.case, f"{ours.median_ms:.3f}" if ours else "-", *["-"] * (len(HEADERS) - 2))
    return (
        row.case, f"{ours.median_ms:.3f}", f"{row.gflops(ours):.0f}", theirs.contender + " *" * (not theirs.passed),
        f"{theirs.median_ms:.3f}", ratio_text(ratio), range_text(spread, 2), busy_text(ours),
        *_verdict(ratio, goal.must if goal else None), *_verdict(ratio, goal.aim if goal else None),
    )  # fmt: skip


def _verdict(ratio: float, wanted: float | None) -> tuple[str, str]:
    return ("-", "") if wanted is None else (f"{wanted:g}x", "holds" if ratio >= wanted else "no")


def summary(result: Result) -> str:
    """How many of the goals are reached: a line a kind of case."""
    found: dict[str, list[tuple[float, Goal]]] = {}
    for row, case, goal, baseline in _judged(result):
        if goal and baseline and (ratio := row.ratio(baseline)):
            found.setdefault(_kind(case), []).append((ratio, goal))
    lines = []
    for kind, reached in found.items():
        ratios = [ratio for ratio, _ in reached]
        aims = [ratio >= goal.aim for ratio, goal in reached if goal.aim is not None]
        musts = sum(ratio >= goal.must for ratio, goal in reached)
        spread = map(ratio_text, (min(ratios), statistics.median(ratios), max(ratios)))
        lines.append((kind, f"{musts} of {len(ratios)}", f"{sum(aims)} of {len(aims)}" if aims else "-", *spread))
    return markdown(("goal", "must holds", "aim holds", "least ratio", "median", "largest"), lines)


def _kind(case: Case) -> str:
    if isinstance(case, LayerCase | ModelCase | MemberCase):
        return f"{'layer' if isinstance(case, LayerCase) else 'model'} {case.dtype}"
    if isinstance(case, TrainingCase):
        return "training step autocast" if case.autocast else f"training step {case.dtype}"
    size = f" {case.kernel}x{case.kernel}" if case.kernel > 7 else ""
    return f"{case.operator}{size} {case.direction} {case.dtype}"
