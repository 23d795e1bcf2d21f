"""``run --base REV``: measures another commit beside this one, and says what changed.

The other commit is built in a worktree. Samples of both are taken alternately, in one process each, with its own
library and packages, but this commit's benchmarks; no baselines take part. The other commit has a second process: the
differences between its two processes show how much noise there is. To be called significant, a change has to exceed
nearly all of these false changes by half.

All cases of an operator, a direction and a dtype are also judged together, by the same rule: their median stands out
where single cases are lost in noise.
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
from .contenders import CONTENDERS
from .report import markdown
from .results import OURS, Result, Row, git, machine, machine_line, write_json
from .runner import INTERRUPTED, LEAST_SAMPLES, Prepared, Runner, measuring, no_garbage_collection, progress, rotated
from .work import build

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffnet_kernels", "ffnet")
BASE, AGAIN = "base", "base again"
ANSWER = "answer: "  # marks a worker's answers among whatever else is printed

#: A change has to exceed MARGIN times the false changes, of which the largest WILD share is ignored; and at least
#: LEAST_CHANGE, or LEAST_UNKNOWN if too few false changes are known.
MARGIN, WILD, LEAST_CHANGE, LEAST_UNKNOWN = 1.5, 0.03, 0.04, 0.15
#: It also has to exceed so many standard errors of the median of its own rounds.
OWN_ERRORS = 4.0
#: Standard error of a median over that of a mean, of normally distributed values.
MEDIAN_OVER_MEAN = 1.2533
#: With fewer false changes of cases or groups, the noise is unknown; a group has at least so many cases.
LEAST_FALSE_CHANGES, LEAST_FALSE_GROUPS, LEAST_GROUP = 20, 3, 4


@dataclass(frozen=True)
class Change:
    """Of one case, or of a group: the median of its cases.

    Attributes:
        group: the group that a case is judged in.
        size: logarithm of the time now over the time before, median of the rounds: positive is slower.
        error: standard error of it, from the spread of the rounds; 0 for a group.
        times: for printing: medians before and after, or the number of cases.
    """

    name: str
    group: str
    size: float
    error: float = 0.0
    times: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Changes from the other commit to this one, and false changes.

    Attributes:
        changes: in the order of the cases.
        false: between two processes of the other commit.
    """

    changes: list[Change]
    false: list[Change]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Comparison:
        return cls(*([change for row in rows if (change := _change(row, name))] for name in (OURS, AGAIN)))

    @property
    def limit(self) -> float:
        """The limit that the change of one case has to exceed."""
        sizes = sorted(abs(change.size) for change in self.false)
        if len(sizes) < LEAST_FALSE_CHANGES:
            return max(LEAST_UNKNOWN, MARGIN * max(sizes, default=0.0))
        return max(LEAST_CHANGE, MARGIN * sizes[-1 - int(WILD * len(sizes))])

    @property
    def group_limit(self) -> float | None:
        """The limit that the change of a group has to exceed; None if too few false ones are known."""
        groups = _groups(self.false)
        if len(groups) < LEAST_FALSE_GROUPS:
            return None
        return max(LEAST_CHANGE, MARGIN * max(abs(group.size) for group in groups))

    def groups(self) -> list[Change]:
        return _groups(self.changes)

    @property
    def significant(self) -> list[Change]:
        """Cases and groups that changed significantly."""
        cases = [c for c in self.changes if abs(c.size) > max(self.limit, OWN_ERRORS * c.error)]
        limit = self.group_limit
        return [*cases, *(group for group in self.groups() if limit is not None and abs(group.size) > limit)]

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.significant if change.size > 0]


def _change(row: Row, contender: str) -> Change | None:
    """The change from the other commit to a contender; None if one did not run."""
    before, after = row.measurement(BASE), row.measurement(contender)
    if before is None or after is None:
        return None
    rounds = [math.log(b / a) for a, b in zip(before.samples_ms, after.samples_ms, strict=False)]
    size = statistics.median(rounds)
    # From the median absolute deviation, which outliers do not affect.
    deviation = 1.4826 * statistics.median(abs(value - size) for value in rounds)
    error = MEDIAN_OVER_MEAN * deviation / math.sqrt(len(rounds))
    return Change(row.case, group_of(row), size, error, (f"{before.median_ms:.3f}", f"{after.median_ms:.3f}"))


def group_of(row: Row) -> str:
    """An operator's cases of one direction and dtype; layers, models and training steps by dtype."""
    p = row.parameters
    first = "operator" if "operator" in p else "kind"
    return " ".join(p[name] for name in (first, "direction", "dtype") if name in p) or "cases"


def _groups(changes: Sequence[Change]) -> list[Change]:
    sizes: dict[str, list[float]] = {}
    for change in changes:
        sizes.setdefault(change.group, []).append(change.size)
    found = [(name, of_group) for name, of_group in sizes.items() if len(of_group) >= LEAST_GROUP]
    return [Change(name, name, statistics.median(s), times=(str(len(s)),)) for name, s in found]


def report(comparison: Comparison) -> str:
    """A table of all cases and groups, marked where they changed, and the limits."""
    changed, groups, limit = comparison.significant, comparison.groups(), comparison.group_limit

    def line(change: Change, *error: str) -> tuple[str, ...]:
        verdict = "" if change not in changed else "SLOWER" if change.size > 0 else "faster"
        return (change.name, *change.times, _percent(change.size), *error, verdict)

    lines = [line(change, f"{100 * change.error:.1f} %") for change in comparison.changes]
    cases = sum(change in comparison.changes for change in changed)
    parts = [
        markdown(("case", "before ms", "after ms", "change", "±", ""), lines, left=(0, 5)),
        markdown(("together", "cases", "median change", ""), list(map(line, groups)), left=(0, 3)) if groups else "",
        f"{cases} of {len(comparison.changes)} cases and {len(changed) - cases} of {len(groups)} groups changed "
        f"significantly, {len(comparison.slower)} for the slower: a case by more than {_percent(comparison.limit)}, "
        f"and than {OWN_ERRORS:g} standard errors (±) of its own rounds; a group by more than "
        f"{'-' if limit is None else _percent(limit)}. Both limits come from {len(comparison.false)} false changes, "
        "between two processes of the other commit.",
    ]
    return "\n\n".join(part for part in parts if part)


def _percent(logarithm: float) -> str:
    return f"{100 * math.expm1(logarithm):+.1f} %"


class CannotBuild(RuntimeError):
    """A commit cannot be checked out, built or measured; the message says why."""


def run_base(revision: str, cases: Sequence[Case], options: argparse.Namespace, samples: int) -> int:
    """Prints what changed from that commit to this tree, as it is built; writes the rows to ``--out``, if given.

    Returns:
        0; 1 where something became significantly slower, 130 after Ctrl-C.

    Raises:
        CannotBuild: if there is no such commit, or it does not build or run.
    """
    place = prepare_base(revision)
    with contextlib.ExitStack() as stack:
        folders = {OURS: ROOT, BASE: place, AGAIN: place}
        ask = {name: stack.enter_context(worker(folder, options)) for name, folder in folders.items()}
        before, after = ask[BASE]("machine"), ask[OURS]("machine")
        result = Result(after, extra={"base": before})
        try:
            with progress(len(cases), "cases", leave=True) as bar:
                for case in cases:
                    result.rows.append(measured(case, ask, samples, options.seconds))
                    bar.update()
        except KeyboardInterrupt:
            result.interrupted = True
    if options.out:
        write_json(result, options.out / "base.json")
    comparison = Comparison.of(result.rows)
    print(f"before: {machine_line(before)}\nafter:  {machine_line(after)}\n\n{report(comparison)}")
    return INTERRUPTED if result.interrupted else int(bool(comparison.slower))


def measured(case: Case, ask: dict[str, Callable[[str], dict]], samples: int, seconds: float) -> Row:
    """Measures one case, one process at a time."""
    for name in ask:
        ask[name](f"prepare {case.name}")
    begun = time.monotonic()
    for number in range(samples):
        if number >= LEAST_SAMPLES and time.monotonic() - begun > seconds:
            break
        for name in rotated(list(ask), number):
            ask[name]("sample")
    rows = {name: Result.from_plain(ask[name]("row")).rows[0] for name in ask}
    measurements = [dataclasses.replace(rows[name].measurements[0], contender=name) for name in ask]
    return dataclasses.replace(rows[OURS], measurements=tuple(measurements))


def prepare_base(revision: str) -> Path:
    """Returns a folder from which Python imports that commit's packages, built, and these benchmarks. It is kept for
    later runs.

    Raises:
        CannotBuild: as `run_base`.
    """
    try:
        git(ROOT, "ls-files", "--error-unmatch", str(Path(__file__).resolve()))  # fails inside another repository
        commit = git(ROOT, "rev-parse", "--verify", "--short=12", f"{revision}^{{commit}}")
        place = ROOT / "build" / "base" / commit
        source, whole = place / "source", place / ".checked-out"
        if not whole.exists():
            shutil.rmtree(source, ignore_errors=True)
            git(ROOT, "worktree", "prune")
            git(ROOT, "worktree", "add", "--detach", str(source), commit)
            whole.touch()
    except OSError as error:
        raise CannotBuild(str(error)) from error
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
    """Starts a process that imports from that folder; the function sends it a request.

    Raises:
        CannotBuild: if it ends, or imports from elsewhere.
    """
    given = ["--suite", ",".join(options.suite), *["--quick"] * options.quick]
    given += ["--threads", str(options.threads)] if options.threads else []
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", "--worker", *given],
        cwd=place,
        # Without variables that would lead to other packages, libraries or kernels.
        env={name: value for name, value in os.environ.items() if not name.startswith(("FFNET_", "PYTHON"))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(text: str) -> dict:
        with contextlib.suppress(BrokenPipeError):  # then the loop below ends at once
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
    """Runs a worker: prepares the case that is named, and takes samples of it on request."""
    by_name, runner = {case.name: case for case in cases}, Runner([CONTENDERS[OURS]])
    work: Any = None
    prepared: Prepared | None = None
    with contextlib.suppress(KeyboardInterrupt):  # the parent ends this process
        for line in sys.stdin:
            what, _, name = line.strip().partition(" ")
            answer: dict = {}
            if what == "machine":
                answer = machine()
            elif what == "library":
                answer = {"library": str(native.library_dir().resolve())}
            elif what == "prepare":
                work = build(by_name[name])
                with measuring(work):
                    prepared = runner.prepare(by_name[name], work)
            elif prepared is not None:
                with measuring(work), no_garbage_collection():
                    if what == "sample":
                        for entry in prepared.entries:
                            runner.sample(entry)
                    else:
                        answer = Result({}, [prepared.outcome().row]).to_plain()
            print(ANSWER + json.dumps(answer), flush=True)
