"""``python -m benchmarks``: runs a suite and prints its table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import goals
from .chart import ChartError, ratio_chart
from .machine import machine_line
from .peers import CONTENDERS, DEFAULT_CONTENDERS, OURS
from .report import report
from .results import Result, write_json
from .runner import DEFAULT_SAMPLES, DEFAULT_SECONDS, LEAST_SAMPLES, Runner, run_cases
from .specs import SUITES, Case, suite

INTERRUPTED = 130  # as shells report a process that Ctrl-C ended


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where ours failed or was wrong, 2 for options that make no sense, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    cases = suite(options.suite, options.filter)
    if not cases:
        print(f"no case of the suite '{options.suite}' has {options.filter!r} in its name", file=sys.stderr)
        return 2
    unwritable = [path for path in (options.json, options.chart) if path and not path.resolve().parent.is_dir()]
    if unwritable:
        print(f"{unwritable[0].parent}: no such folder", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)

    samples = options.samples or (goals.SAMPLES if options.suite == "record" else DEFAULT_SAMPLES)

    def runner(case: Case) -> Runner:
        names = options.peers or (goals.peers(case) if options.suite == "record" else DEFAULT_CONTENDERS)
        contenders = [CONTENDERS[name] for name in dict.fromkeys((OURS, *names))]
        return Runner(contenders, samples, options.seconds)

    result = run_cases(cases, runner)
    print(report(result))
    if options.suite == "record":
        print(f"\n{goals.report(result)}")
    _save(result, options.json, options.chart, options.suite)
    if result.interrupted:
        return INTERRUPTED
    ours = [m for row in result.rows for m in row.measurements if m.contender == OURS]
    return 0 if all(m.passed for m in ours) else 1


def _save(result: Result, json_path: Path | None, chart_path: Path | None, suite_name: str) -> None:
    if json_path:
        write_json(result, json_path)
        print(f"\nwrote {json_path}")
    if chart_path:
        try:
            title = f"Time against ours, suite '{suite_name}'\n{machine_line(result.machine)}"
            ratio_chart(result, chart_path, title)
            print(f"wrote {chart_path}")
        except ChartError as error:
            print(f"no chart: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the operators and models of ffnet_kernels beside plain PyTorch and other runtimes.",
        epilog=f"Peers: {', '.join(name for name in CONTENDERS if name != OURS)}.",
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", help="what to measure (default: %(default)s)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with this text in their name")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument(
        "--peers",
        type=_peers,
        metavar="NAME,NAME",
        help=f"contenders beside ours, or 'all' (default: {','.join(DEFAULT_CONTENDERS[1:])}; suite 'record': by case)",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (default: torch's)")
    parser.add_argument(
        "--samples",
        type=_positive,
        metavar="N",
        help=f"per contender (default: {DEFAULT_SAMPLES}; suite 'record': {goals.SAMPLES})",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=DEFAULT_SECONDS,
        metavar="N",
        help=f"a case ends after them if it has {LEAST_SAMPLES} samples (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios into that PNG")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(CONTENDERS) if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CONTENDERS)}, got {unknown[0]!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
