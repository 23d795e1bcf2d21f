"""``python -m benchmarks compare A.json B.json``: which cases changed, and which only seem to.

A machine drifts between two runs, and some of its noise is of a run, not of a sample: where memory lay, what else ran.
So ours is not compared with itself, but with the peers that were measured in the same rounds: a *score* is the
logarithm of its time over the geometric mean of theirs, and a change is that of the median score. The peers' code is
the same in both runs. How far each of them seems to change, measured against the others in just that way, is what
nothing at all looks like on this machine: from these false changes comes the limit beyond which one of ours is called
significant.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .machine import machine_line
from .peers import OURS
from .results import Result, Row, different, peers_of
from .text import markdown

#: Standard deviations of the false changes, robustly estimated, that one of ours has to exceed, and what it has to
#: exceed however quiet the machine was. Of a hundred changes that are none, the limit lets pass far less than one.
DEVIATIONS, LEAST_CHANGE = 5.0, 0.04
#: Of the spread of its own rounds, in standard errors of the difference of two medians.
OWN_ERRORS = 4.0
#: Fewer false changes than this say too little of the machine.
LEAST_FALSE_CHANGES = 20
COMPARABLE = ("processor", "threads", "torch", "runtimes")


@dataclass(frozen=True)
class Change:
    """Of one case, as logarithms of time: 0 is none, positive is slower.

    Attributes:
        size: change of the median score.
        error: standard error of it, from the spread of the rounds.
        before_ms, after_ms: medians as they were measured.
    """

    case: str
    size: float
    error: float
    before_ms: float
    after_ms: float

    def significant(self, limit: float) -> bool:
        return abs(self.size) > max(limit, OWN_ERRORS * self.error)


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    changes: of ours, in the order of the second result.
    false: of peers against each other.
    limit: what a significant change exceeds, as a logarithm.
    left_out: cases that are in one result only, or without a peer in both.
    """

    changes: list[Change]
    false: list[float]
    limit: float
    left_out: list[str]

    @property
    def significant(self) -> list[Change]:
        return [change for change in self.changes if change.significant(self.limit)]


class NotComparable(ValueError):
    """Two results of different machines or versions, or with too little in common; the text says why."""


def compare(before: Result, after: Result) -> Comparison:
    """Raises NotComparable."""
    if reason := different(before.machine, after.machine, COMPARABLE):
        raise NotComparable(f"results of different machines or versions: {reason}")
    rows = {row.case: row for row in before.rows}
    pairs = [(rows[row.case], row) for row in after.rows if row.case in rows]
    changes, false = [], []
    for old, new in pairs:
        peers = [p for p in peers_of([new], OURS) if old.measurement(p) and new.measurement(p)]
        if peers and old.measurement(OURS) and new.measurement(OURS):
            changes.append(_change(old, new, OURS, peers))
        if len(peers) > 1:
            false += [_change(old, new, peer, [p for p in peers if p != peer]).size for peer in peers]
    if len(false) < LEAST_FALSE_CHANGES:
        raise NotComparable(
            f"only {len(false)} measurements of peers are in both results: {LEAST_FALSE_CHANGES} are needed to know "
            "what the machine does by itself (two peers a case, or more cases)"
        )
    measured = {change.case for change in changes}
    left_out = [name for name in dict.fromkeys((*rows, *(row.case for row in after.rows))) if name not in measured]
    return Comparison(changes, false, max(LEAST_CHANGE, DEVIATIONS * deviation(false)), left_out)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation around 0, from the median of the absolute values: a few wild ones do not count."""
    return 1.4826 * statistics.median(map(abs, values))


def _change(old: Row, new: Row, contender: str, peers: Sequence[str]) -> Change:
    scores = [_scores(row, contender, peers) for row in (old, new)]
    error = math.hypot(*(_error_of_median(values) for values in scores))
    size = statistics.median(scores[1]) - statistics.median(scores[0])
    medians = [m.median_ms for row in (old, new) if (m := row.measurement(contender))]
    return Change(new.case, size, error, *medians)


def _scores(row: Row, contender: str, peers: Sequence[str]) -> list[float]:
    """Round by round, the logarithm of its time over the geometric mean of the peers'."""
    found = [m for name in (contender, *peers) if (m := row.measurement(name)) is not None]
    logarithms = [[math.log(sample) for sample in m.samples_ms] for m in found]
    return [own - statistics.fmean(others) for own, *others in zip(*logarithms, strict=False)]


def _error_of_median(values: Sequence[float]) -> float:
    """Standard error, as of normally distributed values."""
    middle = statistics.median(values)
    return 1.2533 * deviation([value - middle for value in values]) / math.sqrt(len(values))


def report(comparison: Comparison, before: Result, after: Result) -> str:
    """Both machines, every case that changed, and how many did not."""
    limit = 100 * math.expm1(comparison.limit)
    lines = [_line(change, comparison.limit) for change in comparison.changes]
    slower = [change for change in comparison.significant if change.size > 0]
    parts = [
        f"before: {machine_line(before.machine)}\nafter:  {machine_line(after.machine)}",
        markdown(("case", "before ms", "after ms", "change", "±", ""), lines, left=(0, 5)),
        f"{len(comparison.significant)} of {len(comparison.changes)} cases changed significantly, {len(slower)} of "
        f"them for the slower: by more than {limit:.1f} %, and than {OWN_ERRORS:g} standard errors of their own (±). "
        "change is of the time relative to the peers', round by round. Their own changes relative to each other, which "
        f"are noise, have a standard deviation of {100 * deviation(comparison.false):.1f} % "
        f"({len(comparison.false)} of them).",
    ]
    if comparison.left_out:
        parts.append(f"not compared, for want of the case or of peers in both: {', '.join(comparison.left_out)}")
    return "\n\n".join(parts)


def _line(change: Change, limit: float) -> tuple[str, ...]:
    verdict = "" if not change.significant(limit) else "SLOWER" if change.size > 0 else "faster"
    return (
        change.case,
        f"{change.before_ms:.3f}",
        f"{change.after_ms:.3f}",
        f"{100 * math.expm1(change.size):+.1f} %",
        f"{100 * change.error:.1f} %",
        verdict,
    )


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where a case became significantly slower, 2 where results cannot be read or compared."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description="Says which cases changed between two results."
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    options = parser.parse_args(argv)
    try:
        before, after = (Result.from_json(path.read_text()) for path in (options.before, options.after))
        comparison = compare(before, after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report(comparison, before, after))
    return 1 if any(change.size > 0 for change in comparison.significant) else 0
