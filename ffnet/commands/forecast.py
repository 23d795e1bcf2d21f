"""``ffnet forecast``: forecasts a series in a CSV file with FFNet for time series."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import CommandError, model_of, new_file, require_place

#: What a value of float64 has behind the point, if it is near to 1.
MOST_DECIMALS = 15


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "forecast",
        help="what follows a series",
        description="Reads a CSV file with a line of names, a line for each step, the latest last, and a column for "
        "each variable; a first column without numbers (dates) is left out. Columns are parted by commas, semicolons "
        "or tabs; with semicolons, numbers may have decimal commas. Writes the steps that follow, as CSV with commas.",
    )
    parser.add_argument("series", type=Path, metavar="CSV", help="the series")
    parser.add_argument("--horizon", type=int, metavar="H", help="steps to forecast; default: the checkpoint's")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="trained weights")
    parser.add_argument(
        "--columns", metavar="NAMES", help="variables, parted by commas, in the model's order; default: all there are"
    )
    parser.add_argument(
        "--lookback", type=int, metavar="L",
        help="steps that the model reads, if its patches do not overlap by half, as those of published models do",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV file to write; default: standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name in ("horizon", "lookback"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise CommandError(f"expected --{name} of 1 or more, got {getattr(options, name)}")
    if options.out is not None:
        require_place(options.out)
    names, rows = series_from(options.series, options.columns)
    model = _model(options.checkpoint, options.lookback)
    horizon = model.horizon if options.horizon is None else options.horizon
    if horizon > model.horizon:
        raise CommandError(f"{options.checkpoint} forecasts {model.horizon} steps, got --horizon {horizon}")
    if len(names) != model.variables:
        raise CommandError(
            f"{options.series}: expected {model.variables} variables, as {options.checkpoint} has, got {len(names)}: "
            f"{', '.join(names)} (--columns chooses)"
        )
    if len(rows) < model.lookback:
        raise CommandError(
            f"{options.series}: expected {model.lookback} steps or more to look back at, got {len(rows)}"
        )
    check_known(options.series, names, rows, model.lookback)
    import torch

    try:
        forecast = model.forecast(torch.tensor(rows, dtype=torch.float64))[:horizon]
    except ValueError as error:  # of values that are too large for the model's dtype
        raise CommandError(f"{options.series}: {error}") from error
    decimals = [decimals_of(column) for column in zip(*rows[-model.lookback :], strict=True)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *names])
    for step, row in enumerate(forecast.tolist(), 1):
        writer.writerow([step, *(f"{value:.{count}f}" for value, count in zip(row, decimals, strict=True))])
    if options.out is None:
        sys.stdout.write(text.getvalue())
    else:
        with new_file(options.out) as file:
            file.write(text.getvalue().encode())
        print(f"{options.out}: {horizon} steps of {len(names)} variables")
    return 0


def series_from(path: Path, columns: str | None = None) -> tuple[list[str], list[list[float]]]:
    """Names and values of a series; missing values are NaN.

    Args:
        path: The file.
        columns: Names of variables, as a line of CSV; by default all but a first column without numbers.

    Raises:
        CommandError: If it cannot be read, or has no numbers, lines of different lengths, text among the numbers, or
            not the columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        separator = _separator(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(lines) < 2:
        raise CommandError(f"{path}: expected a line of names and a line for each step, got {len(lines)} lines")
    names, body = [name.strip() for name in lines[0][1]], lines[1:]
    for number, cells in body:
        if len(cells) != len(names):
            raise CommandError(f"{path}, line {number}: expected {len(names)} columns, got {len(cells)}")
    leading = [_number(cells[0], separator) for _, cells in body if cells[0].strip()]
    first = 1 if leading and all(value is None for value in leading) else 0
    if columns is not None:
        wanted = [name.strip() for name in next(csv.reader([columns]), [])]
        if not wanted or not set(wanted) <= set(names):
            raise CommandError(f"{path}: expected --columns of {', '.join(names)}; got {columns}")
        chosen = [names.index(name) for name in wanted]
    else:
        chosen = list(range(first, len(names)))
    if not chosen:
        raise CommandError(f"{path}: expected columns of numbers, got none")
    # Names may be numbers, as pandas makes them, behind an empty name or a word; behind a date they are values.
    may_be_values = first == 0 or any(letter.isdigit() for letter in names[0])
    if may_be_values and all(_number(name, separator) is not None for name in names[first:]) and columns is None:
        raise CommandError(f"{path}: expected a first line of names, got numbers")
    rows = []
    for number, cells in body:
        row = []
        for i in chosen:
            value = _number(cells[i], separator) if cells[i].strip() else math.nan
            if value is None:
                raise CommandError(f"{path}, line {number}, column {names[i]}: expected a number, got {cells[i]!r}")
            row.append(value)
        rows.append(row)
    return [names[i] for i in chosen], rows


def decimals_of(values: Sequence[float]) -> int:
    """Decimals that show six digits of the range of values, whatever their distance from zero."""
    spread = max(values) - min(values)
    return min(max(5 - math.floor(math.log10(spread)), 0), MOST_DECIMALS) if spread > 0 else 6


def check_known(path: Path, names: list[str], rows: list[list[float]], lookback: int) -> None:
    """Raises CommandError if a value in the look-back window is missing or not finite."""
    for step in range(len(rows) - lookback, len(rows)):
        for name, value in zip(names, rows[step], strict=True):
            if not math.isfinite(value):
                raise CommandError(
                    f"{path}, step {step + 1} of {len(rows)}, column {name}: expected a finite number, got "
                    f"{'none' if math.isnan(value) else value}; fill gaps of the last {lookback} steps first"
                )


def _separator(text: str) -> str:
    """Of tab, semicolon and comma the first that parts the first two lines into as many columns, more than one."""
    head = [line for line in text.splitlines() if line.strip()][:2]
    for separator in "\t;,":
        columns = {len(cells) for cells in csv.reader(head, delimiter=separator)}
        if len(columns) == 1 and 1 not in columns:
            return separator
    return ","


def _number(text: str, separator: str) -> float | None:
    try:
        return float(text.replace(",", ".") if separator == ";" else text)
    except ValueError:
        return None


def _model(checkpoint: Path, lookback: int | None) -> Any:
    from ..forecasting import ForecastFFNet, forecast_arguments

    return model_of(checkpoint, lambda state: ForecastFFNet(**forecast_arguments(state, lookback)))
