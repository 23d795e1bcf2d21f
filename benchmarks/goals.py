"""What the CPU kernels are to reach, and whether results of the suite "record" hold it.

``python -m benchmarks goals PART.json ...`` puts the parts of a run together and prints a line a shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from .cases import LARGE_FILTERS, Case, LayerCase, ModelCase, OperatorCase, TrainingCase, suite
from .contenders import OURS
from .report import error_text, markdown
from .results import Result, Row, best_peer, machine_line, read, write_json

SAMPLES = 9  # of each contender: the suite has hundreds of cases
NHWC, NCHW = "eager channels-last", "eager nchw"
HEADERS = (
    "case", "ours ms", "GFLOP/s", "best peer", "peer ms", "ratio", "quartiles", "busy", "must", "", "aim", "",
)  # fmt: skip
NOTES = (
    "ratio: time of the best peer over ours, round by round, median and quartiles. The best peer is the one with the "
    "least ratio among those that a goal is set against, also where its own error is over the limit (marked with *). "
    "busy: samples of ours in which another process took a core. Which peers were measured: `benchmarks.goals.peers`.",
    "The aim of the channel mixer is 95 % of the processor's peak, no ratio: see GFLOP/s.",
)


@dataclass(frozen=True)
class Goal:
    """Times as fast as the best baseline; ``against`` names the only one that counts, where there is one."""

    must: float
    aim: float | None
    against: str | None = None


_LARGE = {"forward": Goal(2, 4), "backward": Goal(10, 40)}  # filters of 31×31


def goal(case: Case) -> Goal | None:
    """What a case is to reach; None where nothing was set."""
    half = case.dtype != "float32"
    if isinstance(case, TrainingCase) and case.autocast:
        return Goal(1.5, None)
    if isinstance(case, TrainingCase):
        return None if half else Goal(1.6, 2.2, NHWC)
    if isinstance(case, LayerCase):
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
        return Goal(6, 15, NHWC)
    if half:
        return Goal(2, 3)
    return Goal(1.4, 1.8) if case.operator == "depthwise_conv2d" else Goal(1.5, 2)


def peers(case: Case) -> tuple[str, ...]:
    """The strongest baselines of a case, so that the suite is done in minutes.

    torch.compile is left out: its code calls the same convolutions as eager PyTorch, it was not the best of FFNet-1
    in trials, and compiling takes longer than measuring all others. ``--baselines all`` adds it. 16-bit filters of
    31×31 are not run by eager PyTorch forward: it has to do without oneDNN there, and took hundreds of times OpenVINO's
    time.
    """
    if isinstance(case, OperatorCase) and case.dtype != "float32" and case.kernel > 7:
        return ("openvino",) if case.direction == "forward" else (NHWC,)
    if isinstance(case, OperatorCase):
        return (NCHW, NHWC) if case.direction == "backward" else (NCHW, NHWC, "onnxruntime", "openvino")
    return (NCHW, NHWC) if isinstance(case, TrainingCase) else (NHWC, "onnxruntime", "openvino")


def report(result: Result) -> str:
    """Machine, a line a case, and how many of the goals hold."""
    pairs = _pairs(result)
    parts = [f"machine: {machine_line(result.machine)}", *NOTES]
    parts.append(markdown(HEADERS, [_line(row, goal(case)) for row, case in pairs], left=(0, 3, 9, 11)))
    wrong = [
        f"{row.case}: {m.contender} has an error of {error_text(m)}, over the limit"
        for row, _ in pairs for m in row.measurements if m.samples_ms and not m.passed
    ]  # fmt: skip
    absent = {f"{m.contender}: {m.reason}" for row, _ in pairs for m in row.measurements if m.reason}
    parts += ["\n".join(lines) for lines in (wrong, sorted(absent)) if lines]
    parts.append(summary(result))
    if missing := len(suite("record")) - len(pairs):
        parts.append(f"{missing} of {len(suite('record'))} cases of the suite are not in these results")
    return "\n\n".join(parts)


def _pairs(result: Result) -> list[tuple[Row, Case]]:
    cases = {case.name: case for case in suite("record")}
    return [(row, cases[row.case]) for row in result.rows if row.case in cases]


def _line(row: Row, goal: Goal | None) -> tuple[str, ...]:
    ours, peer = row.measurement(OURS), best_peer(row, OURS, goal.against if goal else None)
    if ours is None or peer is None:
        return (row.case, f"{ours.median_ms:.3f}" if ours else "-", *["-"] * (len(HEADERS) - 2))
    theirs, ratio, spread = row.measurement(peer), row.ratio(peer, OURS), row.ratio_quartiles(peer, OURS)
    assert theirs
    assert ratio
    assert spread
    return (
        row.case, f"{ours.median_ms:.3f}", f"{row.gflops(ours):.0f}", peer if theirs.passed else f"{peer} *",
        f"{theirs.median_ms:.3f}", f"{ratio:.2f}x", f"{spread[0]:.2f}..{spread[1]:.2f}",
        f"{ours.disturbed}/{len(ours.samples_ms)}", *_verdict(ratio, goal.must if goal else None),
        *_verdict(ratio, goal.aim if goal else None),
    )  # fmt: skip


def _verdict(ratio: float, wanted: float | None) -> tuple[str, str]:
    return ("-", "") if wanted is None else (f"{wanted:g}x", "holds" if ratio >= wanted else "no")


def summary(result: Result) -> str:
    """How many of the goals hold: a line a kind of case."""
    found: dict[str, list[tuple[float, Goal]]] = {}
    for row, case in _pairs(result):
        set_for = goal(case)
        peer = best_peer(row, OURS, set_for.against) if set_for else None
        ratio = row.ratio(peer, OURS) if peer else None
        if set_for and ratio:
            found.setdefault(_kind(case), []).append((ratio, set_for))
    lines = []
    for kind, results in found.items():
        ratios = sorted(ratio for ratio, _ in results)
        aims = [ratio >= of.aim for ratio, of in results if of.aim is not None]
        musts = sum(ratio >= of.must for ratio, of in results)
        lines.append(
            (kind, f"{musts} of {len(ratios)}", f"{sum(aims)} of {len(aims)}" if aims else "-",
             f"{ratios[0]:.2f}x", f"{statistics.median(ratios):.2f}x", f"{ratios[-1]:.2f}x")
        )  # fmt: skip
    return markdown(("goal", "must holds", "aim holds", "least ratio", "median", "largest"), lines)


def _kind(case: Case) -> str:
    if isinstance(case, LayerCase):
        return f"layer {case.dtype}"
    if isinstance(case, ModelCase):
        return f"model {case.dtype}"
    if isinstance(case, TrainingCase):
        return "training step autocast" if case.autocast else f"training step {case.dtype}"
    size = f" {case.kernel}x{case.kernel}" if case.kernel > 7 else ""
    return f"{case.operator}{size} {case.direction} {case.dtype}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 2 where parts cannot be read or do not belong together."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} goals", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART.json", help="a later one replaces equal cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all parts into this one")
    options = parser.parse_args(argv)
    try:
        result = read(options.parts)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report(result))
    if options.json:
        write_json(result, options.json)
        print(f"\nwrote {options.json}")
    return 0
