"""``python -m benchmarks compare A.json B.json``: what changed, and what only seems to.

A machine drifts between two runs, and some of its noise is of a run, not of a sample: where memory lay, who else ran.
So ours is compared with the baselines of the same rounds: a *score* is the logarithm of its time over the geometric
mean of theirs, and a change is that of the median score. The baselines' code is the same in both runs.
How far each of them seems to change, measured against the others in just that way, is what nothing at all looks like on
this machine: by half more than nearly all of these false changes has one of ours to change to be called significant.

All cases of an operator, a direction and a dtype are also looked at together, by the same rule: where a single case
drowns in the machine's noise, their median does not.

``run --base REV`` measures another commit beside this one: builds it in a worktree, and takes samples of both by turns.
Each commit has a process of its own, with its own library and packages under this commit's benchmarks, and the other
commit has a second one: how far its two processes seem to differ tells what a difference means. No baselines take part.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnet_kernels import native

from .cases import Case
from .contenders import CONTENDERS, OURS
from .report import markdown
from .results import Result, Row, different, machine, machine_line, peers_of, write_json
from .runner import INTERRUPTED, LEAST_SAMPLES, Prepared, Runner, no_garbage_collection, progress
from .work import build

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
    # From the median of the absolute values: a few wild ones do not count.
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return MEDIAN_OVER_MEAN * deviation / math.sqrt(len(values))


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
        change.case, f"{change.before_ms:.3f}", f"{change.after_ms:.3f}", _percent(change.size),
        f"{100 * change.error:.1f} %", _verdict(change.size, significant),
    )  # fmt: skip


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


# Another commit beside this one.

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffnet_kernels", "ffnet")
BASE, AGAIN = "base", "base again"
ANSWER = "answer: "  # what a line of a worker begins with, lest something else that prints is taken for one


class CannotBuild(RuntimeError):
    """A commit cannot be checked out, built or measured; the text says why."""


def run_base(revision: str, cases: Sequence[Case], options: argparse.Namespace, samples: int) -> int:
    """Prints what changed from that commit to this one, as it is built; writes the rows where there is ``--out``.

    Returns:
        0; 1 where something became significantly slower, 130 after Ctrl-C.

    Raises:
        CannotBuild: where there is no such commit, or it does not build or run.
    """
    place = prepare_base(revision)
    interrupted = False
    with contextlib.ExitStack() as stack:
        ask = {
            name: stack.enter_context(worker(folder, options))
            for name, folder in ((OURS, ROOT), (BASE, place), (AGAIN, place))
        }
        machines = {name: ask[name]("machine") for name in (BASE, OURS)}
        result = Result(machines[OURS], extra={"base": machines[BASE]})
        try:
            with progress(len(cases), "cases", leave=True) as bar:
                for case in cases:
                    result.rows.append(measured(case, ask, samples, options.seconds))
                    bar.update()
        except KeyboardInterrupt:
            interrupted = result.interrupted = True
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(result, options.out / "base.json")
    comparison = within(result.rows, BASE, AGAIN)
    print(f"before: {machine_line(machines[BASE])}\nafter:  {machine_line(machines[OURS])}\n")
    print(report(comparison))
    return INTERRUPTED if interrupted else int(bool(comparison.slower))


def measured(case: Case, ask: dict[str, Callable[[str], dict]], samples: int, seconds: float) -> Row:
    """One case; the processes sleep but for the one whose turn it is."""
    for name in ask:
        ask[name](f"prepare {case.name}")
    order, begun = list(ask), time.monotonic()
    for number in range(samples):
        if number >= LEAST_SAMPLES and time.monotonic() - begun > seconds:
            break
        for name in order[number % len(order) :] + order[: number % len(order)]:
            ask[name]("sample")
    rows = {name: Result.from_plain(ask[name]("row")).rows[0] for name in ask}
    measurements = [dataclasses.replace(rows[name].measurements[0], contender=name) for name in ask]
    return dataclasses.replace(rows[OURS], measurements=tuple(measurements))


def prepare_base(revision: str) -> Path:
    """A folder from which Python imports that commit's packages, built, and these benchmarks. It is kept for later.

    Raises:
        CannotBuild: as `run`.
    """
    _git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))  # not somebody else's repository around a copy
    commit = _git("rev-parse", "--verify", "--short=12", f"{revision}^{{commit}}")
    place = ROOT / "build" / "base" / commit
    source, whole = place / "source", place / ".checked-out"
    if not whole.exists():
        shutil.rmtree(source, ignore_errors=True)
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", str(source), commit)
        whole.touch()
    print(f"building {commit} in {source.relative_to(ROOT)}", file=sys.stderr)
    command = [sys.executable, "csrc/build.py", "--out", "ffnet_kernels/lib", "--work", "build/native"]
    environment = {**os.environ, "FFNET_CUDA_ARCHS": "none"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotBuild(f"{commit} does not build: {(done.stderr or done.stdout).strip()}")
    for name, target in (*((name, source / name) for name in PACKAGES), ("benchmarks", ROOT / "benchmarks")):
        link = place / name
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
    return place


@contextlib.contextmanager
def worker(place: Path, options: argparse.Namespace) -> Iterator[Callable[[str], dict]]:
    """A process that imports from that folder; the function asks it something.

    Raises:
        CannotBuild: where it ends, or imports from elsewhere.
    """
    given = ["--suite", ",".join(options.suite), *["--quick"] * options.quick]
    given += ["--threads", str(options.threads)] if options.threads else []
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", "--worker", *given],
        cwd=place,
        # Nothing that leads to other packages or another library, or to other kernels in both.
        env={name: value for name, value in os.environ.items() if not name.startswith(("FFNET_", "PYTHON"))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(text: str) -> dict:
        with contextlib.suppress(BrokenPipeError):  # then there is nothing to read either
            print(text, file=stdin, flush=True)
        for line in stdout:
            if line.startswith(ANSWER):
                return json.loads(line[len(ANSWER) :])
        raise CannotBuild(f"the process of {place} ended at {text!r}: what it said is above")

    try:
        library = Path(ask("library")["library"])
        if not library.is_relative_to((place / "ffnet_kernels").resolve()):
            raise CannotBuild(f"the process of {place} loads {library}")
        yield ask
    finally:
        process.kill()
        process.wait()


def serve(cases: Sequence[Case]) -> None:
    """The other end of a worker: prepares the case that is named, and takes samples of it as it is told."""
    by_name, runner = {case.name: case for case in cases}, Runner([CONTENDERS[OURS]])
    work: Any = None
    prepared: Prepared | None = None
    with contextlib.suppress(KeyboardInterrupt):  # whoever asks ends this process
        for line in sys.stdin:
            what, _, name = line.strip().partition(" ")
            answer: dict = {}
            if what == "machine":
                answer = machine()
            elif what == "library":
                answer = {"library": str(native.library_dir().resolve())}
            elif what == "prepare":
                work = build(by_name[name])
                with runner.clock.mode(work):
                    prepared = runner.prepare(by_name[name], work)
            elif prepared is not None:
                with runner.clock.mode(work), no_garbage_collection():
                    if what == "sample":
                        for entry in prepared.entries:
                            runner.clock.sample(entry)
                    else:
                        answer = Result({}, [runner.outcome(prepared).row]).to_plain()
            print(ANSWER + json.dumps(answer), flush=True)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"git does not run: {error}") from error
    if done.returncode != 0:
        raise CannotBuild(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
