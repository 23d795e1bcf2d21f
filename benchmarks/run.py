"""``python -m benchmarks run``: measures suites, prints a table, and keeps results, report and charts in a folder."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import compare, goals
from .cases import (
    DEFAULT_SUITES,
    FOLDER,
    SUITES,
    Case,
    add_shape_arguments,
    chosen,
    own_cases,
    positive,
    suite,
)
from .contenders import CONTENDERS, DEFAULT_CONTENDERS, OURS
from .report import colored, report, write_report
from .results import Result, different, machine, write_json
from .runner import DEFAULT_SAMPLES, DEFAULT_SECONDS, INTERRUPTED, LEAST_SAMPLES, Runner, run_cases

RESULTS = "results.json"
#: The second comes minutes after the first: what disturbed one half of the samples spared the other.
DEFAULT_PASSES = 2


class CannotResume(ValueError):
    """Results that are there are not of this run; the text says why."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where ours failed or was wrong, 2 for options that make no sense, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        cases = _cases(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    ignored = [name for name in ("peers", "passes", "resume") if options.base and getattr(options, name)]
    if ignored:
        print(f"--base does nothing with --{' and --'.join(ignored)}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        compare.serve(cases)
        return 0
    try:
        if options.base:
            return compare.run_base(options.base, cases, options, options.samples or DEFAULT_SAMPLES)
        kept = _kept(options.out, options.resume)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
    except (compare.CannotBuild, CannotResume, OSError) as error:
        print(error, file=sys.stderr)
        return 2

    def save(result: Result) -> None:
        if options.out:
            write_json(result, options.out / RESULTS)

    passes = options.passes or (1 if _of_record(options) else DEFAULT_PASSES)
    result = run_cases(cases, lambda case: runner_of(case, options, passes), passes, kept, save)
    text = report(result, details=False)
    print(colored(text) if sys.stdout.isatty() else text)
    if _of_record(options):
        print(f"\n{goals.report(result)}")
    if options.out:
        print(f"\nwrote {options.out / RESULTS}")
        write_report(result, options.out)
    if result.interrupted:
        return INTERRUPTED
    ours = [m for row in result.rows for m in row.measurements if m.contender == OURS]
    return 0 if all(m.passed for m in ours) else 1


def _cases(options: argparse.Namespace) -> list[Case]:
    """What is asked for; fills in what the options leave open.

    Raises:
        ValueError: where that is nothing, or contradicts itself.
    """
    own = own_cases(options)
    if own and (other := (options.suite and "--suite") or (options.base and "--base")):
        raise ValueError(f"expected --shape or {other}, got both")
    options.suite = options.suite or DEFAULT_SUITES
    if own and options.out is None:
        options.out = FOLDER
    cases = [case for case in own if options.filter in case.name]
    if not own:
        cases = suite(options.suite, options.filter, quick=options.quick)
    if not cases:
        raise ValueError(
            f"no case of {'--shape' if own else ', '.join(options.suite)} has {options.filter!r} in its name"
        )
    return cases


def runner_of(case: Case, options: argparse.Namespace, passes: int = 1) -> Runner:
    """Contenders of a case, and the samples of one pass."""
    names = options.peers or (goals.peers(case) if _of_record(options) else DEFAULT_CONTENDERS)
    contenders = [CONTENDERS[name] for name in dict.fromkeys((OURS, *names))]
    samples = options.samples or (goals.SAMPLES if _of_record(options) else DEFAULT_SAMPLES)
    return Runner(contenders, math.ceil(samples / passes), options.seconds / passes)


def _of_record(options: argparse.Namespace) -> bool:
    return set(options.suite) == {"record"}


def _kept(folder: Path | None, resume: bool) -> Result | None:
    """What is there, of the same machine, versions and commit.

    Raises:
        CannotResume: for results of something else, or that cannot be read.
    """
    if not resume or folder is None or not (folder / RESULTS).exists():
        return None
    try:
        there = Result.from_json((folder / RESULTS).read_text())
    except ValueError as error:
        raise CannotResume(f"{folder / RESULTS}: {error}") from error
    if reason := different(there.machine, machine()):
        raise CannotResume(
            f"{folder / RESULTS} is of another run ({reason}); choose another --out, or leave out --resume"
        )
    return there


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__} run",
        description="Measures operators, layers, models and training steps beside plain PyTorch and other runtimes.",
        epilog=f"Suites: {', '.join(SUITES)}. Baselines: {', '.join(name for name in CONTENDERS if name != OURS)}.",
    )
    add = parser.add_argument
    default = ",".join(DEFAULT_SUITES)
    add("--suite", type=_some(SUITES), help=f"what to measure (default: {default})", metavar="NAME,NAME")
    add("--quick", action="store_true", help="the suites' quick forms, minutes: most of it FFNet-1 in float32")
    add("--filter", default="", metavar="TEXT", help="only cases with this text in their name")
    add("--list", action="store_true", help="print the names of the cases and stop")
    default = ",".join(DEFAULT_CONTENDERS[1:])
    text = f"contenders beside ours, or 'all' (default: {default}; suite 'record': by case)"
    add("--baselines", "--peers", dest="peers", type=_some(CONTENDERS), help=text, metavar="NAME,NAME")
    add("--threads", type=positive, metavar="N", help="threads (default: torch's)")
    text = f"per contender (default: {DEFAULT_SAMPLES}; suite 'record': {goals.SAMPLES})"
    add("--samples", type=positive, metavar="N", help=text)
    text = f"go through all cases so often, taking a part of the samples (default: {DEFAULT_PASSES}; 'record': 1)"
    add("--passes", type=positive, metavar="N", help=text)
    text = f"a case ends after them if each pass has {LEAST_SAMPLES} samples (default: %(default)s)"
    add("--seconds", type=positive, default=DEFAULT_SECONDS, metavar="N", help=text)
    text = f"keep {RESULTS}, written after every case, report.md and charts there"
    add("--out", type=Path, metavar="FOLDER", help=text)
    text = "keep what is in --out, and measure only what it lacks"
    add("--resume", action="store_true", help=text)
    text = "build that commit beside, measure ours in both by turns, and say what changed"
    add("--base", metavar="REV", help=text)
    add_shape_arguments(parser)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _some(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    return functools.partial(chosen, known=tuple(known))
