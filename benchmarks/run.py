"""``python -m benchmarks run``: measures suites, or operators on maps of the user's own (``--shape 320x16x16 --kernel
7``), prints a table, and keeps results, report and charts in a folder."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import compare, goals
from .cases import DEFAULT_SUITES, DIRECTIONS, LAYOUTS, OPERATORS, SUITES, Case, OperatorCase, suite
from .contenders import CONTENDERS, DEFAULT_CONTENDERS
from .options import numbers, parser_of, positive, some_of
from .report import report, write_report
from .results import OURS, Result, different, machine, write_json
from .runner import DEFAULT_SAMPLES, DEFAULT_SECONDS, INTERRUPTED, LEAST_SAMPLES, Runner, run_cases

RESULTS = "results.json"
#: The second pass is minutes after the first, so that a disturbance affects only half of the samples.
DEFAULT_PASSES = 2
#: Default folder of results and chart with ``--shape``.
FOLDER = Path("bench")
SHAPE_DTYPES = ("float32", "bfloat16", "float16")
#: Options that go with ``--shape``, and their defaults.
SHAPE_DEFAULTS = {
    "kernel": (7,),
    "batch": (1,),
    "operator": tuple(OPERATORS),
    "dtype": SHAPE_DTYPES[:1],
    "layout": LAYOUTS[:1],
    "direction": DIRECTIONS[:1],
}


class CannotResume(ValueError):
    """The existing results are not of this run; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if ours failed or was wrong, 2 for options that make no sense, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        cases = _cases(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    ignored = [name for name in ("baselines", "passes", "resume") if options.base and getattr(options, name)]
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
    print(report(result, details=False))
    if _of_record(options):
        print(f"\n{goals.report(result)}")
    if options.out:
        print(f"\nwrote {options.out / RESULTS}")
        write_report(result, options.out)
    if result.interrupted:
        return INTERRUPTED
    return int(any(m.contender == OURS and not m.passed for row in result.rows for m in row.measurements))


def _cases(options: argparse.Namespace) -> list[Case]:
    """The cases asked for; also fills in defaults of the options.

    Raises:
        ValueError: if there are none, or options contradict each other.
    """
    own = own_cases(options)
    if own and (other := (options.suite and "--suite") or (options.base and "--base")):
        raise ValueError(f"expected --shape or {other}, got both")
    options.suite = options.suite or DEFAULT_SUITES
    if own and options.out is None:
        options.out = FOLDER
    cases = own or suite(options.suite, quick=options.quick)
    cases = [case for case in cases if options.filter in case.name]
    if not cases:
        raise ValueError(
            f"no case of {'--shape' if own else ', '.join(options.suite)} has {options.filter!r} in its name"
        )
    return cases


def own_cases(options: argparse.Namespace) -> list[Case]:
    """A case for each combination of the options; none without ``--shape``.

    Raises:
        ValueError: for such options without ``--shape``.
    """
    if options.shape is None:
        if given := [f"--{name}" for name in SHAPE_DEFAULTS if getattr(options, name) is not None]:
            raise ValueError(f"expected --shape with {', '.join(given)}, such as --shape 320x16x16")
        return []
    values = {name: getattr(options, name) or default for name, default in SHAPE_DEFAULTS.items()}
    found: list[Case] = []
    for (channels, height, width), *choice in itertools.product(options.shape, *values.values()):
        named = dict(zip(values, choice, strict=True))
        case = OperatorCase(channels=channels, size=height, **named)
        found.append(case if width == height else replace(case, width=width))
    return found


def shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Channels, height and width of maps. Raises argparse's error for anything but maps CxHxW."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)[x×*](\d+)[x×*](\d+)", part.strip())
        sizes = tuple(map(int, match.groups())) if match else (0,)
        if min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"expected channels x height x width, such as 320x16x16, got {part!r}")
        found.append(sizes)
    return tuple(dict.fromkeys(found))


def runner_of(case: Case, options: argparse.Namespace, passes: int = 1) -> Runner:
    """The runner of a case, for one pass."""
    names = options.baselines or (goals.baselines(case) if _of_record(options) else DEFAULT_CONTENDERS)
    contenders = [CONTENDERS[name] for name in dict.fromkeys((OURS, *names))]
    samples = options.samples or (goals.SAMPLES if _of_record(options) else DEFAULT_SAMPLES)
    return Runner(contenders, math.ceil(samples / passes), options.seconds / passes)


def _of_record(options: argparse.Namespace) -> bool:
    return set(options.suite) == {"record"}


def _kept(folder: Path | None, resume: bool) -> Result | None:
    """The existing results, if they are of the same machine, versions and commit.

    Raises:
        CannotResume: if they are of another run, or cannot be read.
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
    parser = parser_of(
        "run",
        "Measures operators, layers, models and training steps beside plain PyTorch and other runtimes.",
        f"Suites: {', '.join(SUITES)}. Baselines: {', '.join(name for name in CONTENDERS if name != OURS)}.",
    )
    add = parser.add_argument
    default = ",".join(DEFAULT_SUITES)
    add("--suite", type=some_of(SUITES), help=f"what to measure (default: {default})", metavar="NAME,NAME")
    add("--quick", action="store_true", help="the suites' quick forms, minutes: most of it FFNet-1 in float32")
    add("--filter", default="", metavar="TEXT", help="only cases with this text in their name")
    add("--list", action="store_true", help="print the names of the cases and stop")
    default = ",".join(DEFAULT_CONTENDERS[1:])
    text = f"contenders beside ours, or 'all' (default: {default}; suite 'record': by case)"
    add("--baselines", type=some_of(CONTENDERS), help=text, metavar="NAME,NAME")
    add("--threads", type=positive, metavar="N", help="threads (default: torch's)")
    text = f"per contender (default: {DEFAULT_SAMPLES}; suite 'record': {goals.SAMPLES})"
    add("--samples", type=positive, metavar="N", help=text)
    text = f"go through all cases so often, taking a part of the samples (default: {DEFAULT_PASSES}; 'record': 1)"
    add("--passes", type=positive, metavar="N", help=text)
    text = f"a case ends after them if each pass has {LEAST_SAMPLES} samples (default: %(default)s)"
    add("--seconds", type=positive, default=DEFAULT_SECONDS, metavar="N", help=text)
    text = f"keep {RESULTS}, written after every case, report.md and charts there"
    add("--out", type=Path, metavar="FOLDER", help=text)
    add("--resume", action="store_true", help="keep what is in --out, and measure only what it lacks")
    text = "build that commit beside, measure ours in both by turns, and say what changed"
    add("--base", metavar="REV", help=text)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add = parser.add_argument_group(
        "maps of your own", f"--shape in place of --suite; results and chart go to --out (default: {FOLDER})"
    ).add_argument
    add("--shape", type=shapes, metavar="CxHxW", help="of one image, such as 320x16x16; or several: A,B")
    add("--kernel", type=numbers, metavar="K,K", help=f"filter sizes (default: {SHAPE_DEFAULTS['kernel'][0]})")
    add("--batch", type=numbers, metavar="N,N", help=f"images in a call (default: {SHAPE_DEFAULTS['batch'][0]})")
    known = {"operator": tuple(OPERATORS), "dtype": SHAPE_DTYPES, "layout": LAYOUTS, "direction": DIRECTIONS}
    for option, names in known.items():
        default = "all" if SHAPE_DEFAULTS[option] == names else str(SHAPE_DEFAULTS[option][0])
        text = f"some of {', '.join(names)}, or 'all' (default: {default})"
        add(f"--{option}", type=some_of(names), metavar="NAME,NAME", help=text)
    return parser
