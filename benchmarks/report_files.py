"""``python -m benchmarks report``: the tables and charts of results that were kept."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .chart import ChartError, speedup_chart
from .chart_work import growth_chart, roofline_chart
from .machine import machine_line
from .report import KINDS, kind_of, report
from .results import Result, merge, replacing
from .roofs import Roofs


def write_report(result: Result, folder: Path) -> None:
    """report.md in the folder, and beside it the charts that can be drawn; says what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    line = machine_line(result.machine)
    drawn = [chart for chart in _charts(result) if _drawn(chart, folder, line)]
    pictures = "\n\n".join(f"![{chart.title}]({chart.name})" for chart in drawn)
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(f"# Benchmark report\n\n{pictures}\n\n{report(result)}\n")
    print(f"wrote {folder / 'report.md'}" + "".join(f", {chart.name}" for chart in drawn))


class _Chart(NamedTuple):
    name: str
    title: str
    draw: Callable[[Path, str], None]


def _charts(result: Result) -> Iterator[_Chart]:
    rows, roofs = result.rows, Roofs.from_plain(result.machine.get("roofs"))
    for kind, title in KINDS.items():
        if of_kind := [row for row in rows if kind_of(row) == kind]:
            draw = functools.partial(speedup_chart, of_kind)
            yield _Chart(f"speedup-{kind or 'cases'}.png", f"{title}: time over ours", draw)
    yield _Chart("roofline.png", "Rates under the roofs", functools.partial(roofline_chart, rows, roofs))
    yield _Chart("growth.png", "Time as work grows", functools.partial(growth_chart, rows))


def _drawn(chart: _Chart, folder: Path, line: str) -> bool:
    try:
        chart.draw(folder / chart.name, f"{chart.title}\n{line}")
    except ChartError as error:
        print(f"no {chart.name}: {error}", file=sys.stderr)
        (folder / chart.name).unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 2 where results cannot be read or do not belong together."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} report", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", type=Path, metavar="RESULTS.json", help="a later one replaces equal cases")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write report.md and charts there, in place of printing"
    )
    options = parser.parse_args(argv)
    try:
        result = merge([Result.from_json(path.read_text()) for path in options.parts])
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.out:
        write_report(result, options.out)
    else:
        print(report(result))
    return 0
