"""``ffnet forecast``: forecasts a series in a CSV file with FFNet for time series."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

from .common import CommandError, model_of, new_file


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "forecast",
        help="what follows a series",
        description="Reads a CSV file with a line of names, a line for each step, the latest last, and a column for "
        "each variable; a first column that is no number (a date) is left out. Writes the steps that follow, as CSV.",
    )
    parser.add_argument("series", type=Path, metavar="CSV", help="the series")
    parser.add_argument("--horizon", type=int, metavar="H", help="steps to forecast; default: the checkpoint's")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="trained weights")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV file to write; default: standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.horizon is not None and options.horizon < 1:
        raise CommandError(f"expected --horizon of 1 or more, got {options.horizon}")
    names, rows = series_from(options.series)
    model = _model(options.checkpoint)
    horizon = model.horizon if options.horizon is None else options.horizon
    if horizon > model.horizon:
        raise CommandError(f"{options.checkpoint} forecasts {model.horizon} steps, got --horizon {horizon}")
    if len(names) != model.variables:
        raise CommandError(
            f"{options.series}: expected {model.variables} variables, as {options.checkpoint} has, got {len(names)}: "
            f"{', '.join(names)}"
        )
    if len(rows) < model.lookback:
        raise CommandError(
            f"{options.series}: expected {model.lookback} steps or more to look back at, got {len(rows)}"
        )
    check_known(options.series, names, rows, model.lookback)
    import torch

    forecast = model.forecast(torch.tensor(rows, dtype=torch.float64))[:horizon]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *names])
    writer.writerows([step, *(f"{value:.7g}" for value in row)] for step, row in enumerate(forecast.tolist(), 1))
    if options.out is None:
        sys.stdout.write(text.getvalue())
    else:
        with new_file(options.out) as file:
            file.write(text.getvalue().encode())
        print(f"{options.out}: {horizon} steps of {len(names)} variables")
    return 0


def series_from(path: Path) -> tuple[list[str], list[list[float]]]:
    """Names and values of a series; missing values are NaN.

    Raises:
        CommandError: If it cannot be read, or has no numbers, lines of different lengths, or text among the numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(reader_line, cells) for reader_line, cells in _numbered(csv.reader(file)) if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(lines) < 2:
        raise CommandError(f"{path}: expected a line of names and a line for each step, got {len(lines)} lines")
    names, body = [name.strip() for name in lines[0][1]], lines[1:]
    if all(_is_number(name) for name in names):
        raise CommandError(f"{path}: expected a first line of names, got numbers")
    first = 0 if _is_number(body[0][1][0]) else 1
    if len(names) == first:
        raise CommandError(f"{path}: expected columns of numbers, got none")
    rows = []
    for number, cells in body:
        if len(cells) != len(names):
            raise CommandError(f"{path}, line {number}: expected {len(names)} columns, got {len(cells)}")
        for name, cell in zip(names[first:], cells[first:], strict=True):
            if cell.strip() and not _is_number(cell):
                raise CommandError(f"{path}, line {number}, column {name}: expected a number, got {cell!r}")
        rows.append([float(cell) if cell.strip() else math.nan for cell in cells[first:]])
    return names[first:], rows


def check_known(path: Path, names: list[str], rows: list[list[float]], lookback: int) -> None:
    """Raises CommandError if a value in the look-back window is missing or not finite."""
    for step in range(len(rows) - lookback, len(rows)):
        for name, value in zip(names, rows[step], strict=True):
            if not math.isfinite(value):
                raise CommandError(
                    f"{path}, step {step + 1} of {len(rows)}, column {name}: expected a finite number, got "
                    f"{'none' if math.isnan(value) else value}; fill gaps of the last {lookback} steps first"
                )


def _numbered(reader: Any) -> Any:
    for cells in reader:
        yield reader.line_num, cells


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _model(checkpoint: Path) -> Any:
    from ..forecasting import ForecastFFNet, forecast_arguments

    return model_of(checkpoint, lambda state: ForecastFFNet(**forecast_arguments(state)))
