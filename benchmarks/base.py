"""Measures another commit beside this one: builds it in a worktree, and runs every case in both, one after the other.

Each commit has a process of its own, with its own library and packages under this commit's benchmarks; which of the
two goes first changes from case to case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import compare, progress
from .cases import Case
from .machine import machine
from .results import Result, Row, write_json
from .runner import Runner
from .work import build

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffnet_kernels", "ffnet")
ROW = "row: "  # what a line of a worker begins with, lest something else that prints is taken for one


class CannotBuild(RuntimeError):
    """A commit cannot be checked out, built or measured; the text says why."""


def run(revision: str, cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Prints what changed from that commit to this one; writes both results where there is ``--out``.

    Returns:
        0; 1 where a case became significantly slower.

    Raises:
        CannotBuild: where there is no such commit, or it does not build or run.
    """
    folder = prepare(revision)
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(place, options)) for place in (folder, ROOT)]
        results = [Result(ask("machine")) for ask in workers]
        bar = stack.enter_context(progress.bar(len(cases), "cases", leave=True))
        for number, case in enumerate(cases):
            for side in (0, 1) if number % 2 else (1, 0):
                results[side].rows += Result.from_json(json.dumps(workers[side](case.name))).rows
            bar.update()
    before, after = results
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for result, name in ((before, "before.json"), (after, "after.json")):
            write_json(result, options.out / name)
    comparison = compare.compare(before, after)
    print(compare.report(comparison, before, after))
    return 1 if any(change.size > 0 for change in comparison.significant) else 0


def prepare(revision: str) -> Path:
    """A folder from which Python imports that commit's packages, built, and these benchmarks. It is kept for later."""
    commit = _git("rev-parse", "--verify", "--short=12", f"{revision}^{{commit}}")
    place = ROOT / "build" / "base" / commit
    if not (place / "source").exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", str(place / "source"), commit)
    source = place / "source"
    command = [sys.executable, "csrc/build.py", "--out", "ffnet_kernels/lib", "--work", "build/native"]
    done = subprocess.run(
        command, cwd=source, env={**os.environ, "FFNET_CUDA_ARCHS": "none"}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise CannotBuild(f"{commit} does not build: {(done.stderr or done.stdout).strip()}")
    for name, target in (*((name, source / name) for name in PACKAGES), ("benchmarks", ROOT / "benchmarks")):
        link = place / name
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
    return place


@contextlib.contextmanager
def _worker(place: Path, options: argparse.Namespace) -> Iterator[Callable[[str], dict]]:
    """A process that imports from that folder; the function asks it for a case by name, or for its machine."""
    given = ["--suite", ",".join(options.suite), "--seconds", str(options.seconds)]
    given += ["--quick"] * options.quick
    given += ["--peers", ",".join(options.peers)] if options.peers else []
    for name in ("threads", "samples"):
        given += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", "--worker", *given],
        cwd=place,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(text: str) -> dict:
        print(text, file=stdin, flush=True)
        for line in stdout:
            if line.startswith(ROW):
                return json.loads(line[len(ROW) :])
        raise CannotBuild(f"the process of {place} ended in {text!r}: what it said is above")

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def serve(cases: Sequence[Case], runner_of: Callable[[Case], Runner]) -> int:
    """The other end of a worker: measures the cases whose names it reads."""
    by_name = {case.name: case for case in cases}
    for line in sys.stdin:
        if line.strip() == "machine":
            print(ROW + json.dumps(machine()), flush=True)
            continue
        case = by_name[line.strip()]
        row: Row = runner_of(case).run(case, build(case)).row
        print(ROW + json.dumps(json.loads(Result({}, [row]).to_json())), flush=True)
    return 0


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"git does not run: {error}") from error
    if done.returncode != 0:
        raise CannotBuild(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
