"""``python -m benchmarks compare A.json B.json``: what changed, and what only seems to.

A machine drifts between two runs, and some of its noise is of a run, not of a sample: where memory lay, who else ran.
So ours is compared with the baselines of the same rounds: a *score* is the logarithm of its time over the geometric
mean of theirs, and a change is that of the median score. The baselines' code is the same in both runs.
How far each of them seems to change, measured against the others in just that way, is what nothing at all looks like on
this machine: by half more than nearly all of these false changes has one of ours to change to be called significant.

All cases of an operator, a direction and a dtype are also looked at together, by the same rule: where a single case
drowns in the machine's noise, their median does not.
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

#: How many times the false changes one of ours has to exceed, but for the largest share of them; and what it has to
#: exceed on the quietest machine, or where too few false changes are known to tell how quiet it is.
MARGIN, WILD, LEAST_CHANGE, LEAST_UNKNOWN = 1.5, 0.03, 0.04, 0.15
#: Of the spread of its own rounds, in standard errors of the difference of two medians.
OWN_ERRORS = 4.0
#: Standard error of a median over that of a mean, of normally distributed values.
MEDIAN_OVER_MEAN = 1.2533
#: Fewer false changes than this say too little of the machine, of cases and of groups (as many as are independent: of
#: the baselines of a round, one gains what others lose); so many cases make a group.
LEAST_FALSE_CHANGES, LEAST_FALSE_GROUPS, LEAST_GROUP = 20, 3, 4
COMPARABLE = ("processor", "threads", "torch", "runtimes")


@dataclass(frozen=True)
class Change:
    """Of one case, as logarithms of time: 0 is none, positive is slower.

    Attributes:
        contender: which changed.
        group: what it is looked at together with.
        size: change of the median score.
        error: standard error of it, from the spread of the rounds.
        before_ms, after_ms: medians as they were measured.
    """

    case: str
    contender: str
    group: str
    size: float
    error: float
    before_ms: float
    after_ms: float


@dataclass(frozen=True)
class Group:
    """The changes of several cases together: their median."""

    name: str
    cases: int
    size: float


@dataclass(frozen=True)
class Comparison:
    """Changes of ours, and those of what did not change.

    Attributes:
        changes: in the order of the second result.
        false: of baselines against each other.
        left_out: cases that are in one result only, or without a baseline in both.
    """

    changes: list[Change]
    false: list[Change]
    left_out: list[str]

    @property
    def limit(self) -> float:
        """What the change of one case has to exceed."""
        sizes = sorted(abs(change.size) for change in self.false)
        if len(sizes) < LEAST_FALSE_CHANGES:
            return max(LEAST_UNKNOWN, MARGIN * max(sizes, default=0.0))
        return max(LEAST_CHANGE, MARGIN * sizes[-1 - int(WILD * len(sizes))])

    @property
    def group_limit(self) -> float | None:
        """What the change of a group has to exceed; None where too few false ones are known."""
        groups, contenders = _groups(self.false), {change.contender for change in self.false}
        independent = len(groups) * max(1, len(contenders) - 1) / max(1, len(contenders))
        if independent < LEAST_FALSE_GROUPS:
            return None
        return max(LEAST_CHANGE, MARGIN * max(abs(group.size) for group in groups))

    def groups(self) -> list[Group]:
        return _groups(self.changes)

    @property
    def significant(self) -> list[Change | Group]:
        """Cases and groups that changed."""
        cases = [c for c in self.changes if abs(c.size) > max(self.limit, OWN_ERRORS * c.error)]
        limit = self.group_limit
        return [*cases, *(group for group in self.groups() if limit is not None and abs(group.size) > limit)]

    @property
    def slower(self) -> list[Change | Group]:
        return [change for change in self.significant if change.size > 0]


def _groups(changes: Sequence[Change]) -> list[Group]:
    """Of each contender by itself."""
    sizes: dict[tuple[str, str], list[float]] = {}
    for change in changes:
        sizes.setdefault((change.contender, change.group), []).append(change.size)
    return [Group(name, len(s), statistics.median(s)) for (_, name), s in sizes.items() if len(s) >= LEAST_GROUP]


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
            false += [_change(old, new, peer, [p for p in peers if p != peer]) for peer in peers]
    if len(false) < LEAST_FALSE_CHANGES:
        raise NotComparable(
            f"only {len(false)} measurements of baselines are in both results: {LEAST_FALSE_CHANGES} are needed to "
            "know what the machine does by itself (two baselines a case, or more cases)"
        )
    measured = {change.case for change in changes}
    left_out = [name for name in dict.fromkeys((*rows, *(row.case for row in after.rows))) if name not in measured]
    return Comparison(changes, false, left_out)


def within(rows: Sequence[Row], before: str, again: str) -> Comparison:
    """Of rows in which the former code takes part as two contenders, side by side with ours."""
    changes = [_against(row, OURS, before) for row in rows if row.measurement(OURS) and row.measurement(before)]
    false = [_against(row, again, before) for row in rows if row.measurement(again) and row.measurement(before)]
    measured = {change.case for change in changes}
    return Comparison(changes, false, [row.case for row in rows if row.case not in measured])


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation around 0, from the median of the absolute values: a few wild ones do not count."""
    return 1.4826 * statistics.median(map(abs, values))


def group_of(row: Row) -> str:
    """An operator's cases of one direction and dtype; layers, models and training steps by dtype."""
    p = row.parameters
    first = "operator" if "operator" in p else "kind"
    return " ".join(p[name] for name in (first, "direction", "dtype") if name in p) or "cases"


def _change(old: Row, new: Row, contender: str, peers: Sequence[str]) -> Change:
    scores = [_scores(row, contender, peers) for row in (old, new)]
    error = math.hypot(*(_error_of_median(values) for values in scores))
    size = statistics.median(scores[1]) - statistics.median(scores[0])
    medians = [m.median_ms for row in (old, new) if (m := row.measurement(contender))]
    return Change(new.case, contender, group_of(new), size, error, *medians)


def _against(row: Row, contender: str, before: str) -> Change:
    scores = _scores(row, contender, [before])
    medians = [m.median_ms for name in (before, contender) if (m := row.measurement(name))]
    return Change(row.case, contender, group_of(row), statistics.median(scores), _error_of_median(scores), *medians)


def _scores(row: Row, contender: str, peers: Sequence[str]) -> list[float]:
    """Round by round, the logarithm of its time over the geometric mean of the baselines'."""
    found = [m for name in (contender, *peers) if (m := row.measurement(name)) is not None]
    logarithms = [[math.log(sample) for sample in m.samples_ms] for m in found]
    return [own - statistics.fmean(others) for own, *others in zip(*logarithms, strict=False)]


def _error_of_median(values: Sequence[float]) -> float:
    """Standard error, as of normally distributed values."""
    middle = statistics.median(values)
    return MEDIAN_OVER_MEAN * _deviation([value - middle for value in values]) / math.sqrt(len(values))


def report(comparison: Comparison) -> str:
    """Every case and group, marked where it changed, and what that means."""
    changed = comparison.significant
    lines = [_line(change, change in changed) for change in comparison.changes]
    limit = comparison.group_limit
    groups = [(g.name, str(g.cases), _percent(g.size), _verdict(g.size, g in changed)) for g in comparison.groups()]
    cases = sum(isinstance(change, Change) for change in changed)
    false = f"{len(comparison.false)} false changes, of what is the same in both"
    parts = [
        markdown(("case", "before ms", "after ms", "change", "±", ""), lines, left=(0, 5)),
        markdown(("together", "cases", "median change", ""), groups, left=(0, 3)) if groups else "",
        f"{cases} of {len(comparison.changes)} cases and {len(changed) - cases} of {len(groups)} groups changed "
        f"significantly, {len(comparison.slower)} for the slower: a case by more than {_percent(comparison.limit)}, "
        f"and than {OWN_ERRORS:g} standard errors (±) of its own rounds; a group by more than "
        f"{'-' if limit is None else _percent(limit)}. Both limits come from {false}.",
    ]
    if comparison.left_out:
        parts.append(f"not compared, for want of the case or of baselines in both: {', '.join(comparison.left_out)}")
    return "\n\n".join(part for part in parts if part)


def _line(change: Change, significant: bool) -> tuple[str, ...]:
    return (
        change.case,
        f"{change.before_ms:.3f}",
        f"{change.after_ms:.3f}",
        _percent(change.size),
        f"{100 * change.error:.1f} %",
        _verdict(change.size, significant),
    )


def _percent(logarithm: float) -> str:
    return f"{100 * math.expm1(logarithm):+.1f} %"


def _verdict(size: float, significant: bool) -> str:
    return "" if not significant else "SLOWER" if size > 0 else "faster"


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something became significantly slower, 2 where results cannot be read or compared."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__} compare", description="Says what changed between two results."
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
    print(f"before: {machine_line(before.machine)}\nafter:  {machine_line(after.machine)}\n\n{report(comparison)}")
    return 1 if comparison.slower else 0
