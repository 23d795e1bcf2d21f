"""Measures another commit beside this one: builds it in a worktree, and takes samples of both by turns.

Each commit has a process of its own, with its own library and packages under this commit's benchmarks, and the other
commit has a second one: how far its two processes seem to differ tells what a difference means. No baselines take part.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ffnet_kernels import native

from . import compare, progress
from .cases import Case
from .machine import machine, machine_line
from .peers import CONTENDERS, OURS
from .results import Result, Row, write_json
from .runner import LEAST_SAMPLES, Prepared, Runner
from .sampling import no_garbage_collection
from .work import build

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffnet_kernels", "ffnet")
BASE, AGAIN = "base", "base again"
ANSWER = "answer: "  # what a line of a worker begins with, lest something else that prints is taken for one


class CannotBuild(RuntimeError):
    """A commit cannot be checked out, built or measured; the text says why."""


def run(revision: str, cases: Sequence[Case], options: argparse.Namespace, samples: int) -> int:
    """Prints what changed from that commit to this one, as it is built; writes the rows where there is ``--out``.

    Returns:
        0; 1 where something became significantly slower, 130 after Ctrl-C.

    Raises:
        CannotBuild: where there is no such commit, or it does not build or run.
    """
    place = prepare(revision)
    interrupted = False
    with contextlib.ExitStack() as stack:
        ask = {
            name: stack.enter_context(worker(folder, options))
            for name, folder in ((OURS, ROOT), (BASE, place), (AGAIN, place))
        }
        machines = {name: ask[name]("machine") for name in (BASE, OURS)}
        result = Result(machines[OURS], extra={"base": machines[BASE]})
        try:
            with progress.bar(len(cases), "cases", leave=True) as bar:
                for case in cases:
                    result.rows.append(measured(case, ask, samples, options.seconds))
                    bar.update()
        except KeyboardInterrupt:
            interrupted = result.interrupted = True
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(result, options.out / "base.json")
    comparison = compare.within(result.rows, BASE, AGAIN)
    print(f"before: {machine_line(machines[BASE])}\nafter:  {machine_line(machines[OURS])}\n")
    print(compare.report(comparison))
    return progress.INTERRUPTED if interrupted else int(bool(comparison.slower))


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


def prepare(revision: str) -> Path:
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
    prepared: Prepared | None = None
    inference = False
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
                inference = work.inference
                with torch.inference_mode(inference):
                    prepared = runner.prepare(by_name[name], work)
            elif prepared is not None:
                with torch.inference_mode(inference), no_garbage_collection():
                    if what == "sample":
                        for entry in prepared.entries:
                            runner.sample(entry)
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
