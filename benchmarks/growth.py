"""How time grows with work: exponents fitted to the cases that differ in one dimension only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .cases import parameters
from .peers import OURS
from .results import Row, peers_of
from .suites import GROWTH_FROM
from .text import markdown

#: Fields of a case that grow, and what they are called; maps are square, so a size counts as its pixels.
DIMENSIONS = {"batch": "batch", "size": "pixels", "channels": "channels", "kernel": "kernel size"}
LEAST_POINTS = 3
NOTE = (
    "Time is taken to be a power of what grows, all else as in {base}: the exponent of the line through the "
    "logarithms (least squares), and in brackets by how much the point that is farthest from it is off. "
    "arithmetic is the exponent of the multiply–adds: a smaller one says that something is spared or shared as "
    "work grows, a larger one that something runs out."
)


@dataclass(frozen=True)
class Series:
    """One operator as one dimension grows; rows in that order."""

    operator: str
    dimension: str
    rows: tuple[Row, ...]

    @property
    def values(self) -> list[int]:
        """Of the dimension, in rows' order: pixels for a size."""
        found = [row.parameters[self.dimension] for row in self.rows]
        return [value**2 for value in found] if self.dimension == "size" else found

    def times(self, contender: str) -> list[tuple[int, float]]:
        """(value, median milliseconds), of the rows in which it ran."""
        pairs = zip(self.values, self.rows, strict=True)
        return [(value, m.median_ms) for value, row in pairs if (m := row.measurement(contender)) is not None]


def series(rows: Sequence[Row]) -> Iterator[Series]:
    """Of the rows that differ from a call of `GROWTH_FROM` in one dimension only, those with at least three points."""
    for base in GROWTH_FROM.values():
        start = parameters(base)
        for dimension in DIMENSIONS:
            fixed = {name: value for name, value in start.items() if name != dimension}
            found = [row for row in rows if fixed.items() <= row.parameters.items() and "width" not in row.parameters]
            found.sort(key=lambda row: row.parameters[dimension])
            if len(found) >= LEAST_POINTS:
                yield Series(base.operator, dimension, tuple(found))


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Exponent, and the largest deviation of a point from the fitted power, as a share of the fit."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    exponent = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - x_mean) ** 2 for x in xs
    )
    deviations = [abs(math.expm1(y - y_mean - exponent * (x - x_mean))) for x, y in zip(xs, ys, strict=True)]
    return exponent, max(deviations)


def table(rows: Sequence[Row]) -> str:
    """A line a series; empty where there is none."""
    found = list(series(rows))
    if not found:
        return ""
    contenders = [OURS, *peers_of([row for one in found for row in one.rows], OURS)]
    lines = []
    for one in found:
        work = fit([(value, row.flops) for value, row in zip(one.values, one.rows, strict=True)])[0]
        cells = [_fit_text(one.times(contender)) for contender in contenders]
        range_ = f"{one.values[0]}..{one.values[-1]}"
        lines.append((one.operator, DIMENSIONS[one.dimension], range_, f"{work:.2f}", *cells))
    headers = ("operator", "grows", "from..to", "arithmetic", *contenders)
    base = next(iter(GROWTH_FROM.values()))
    start = f"{base.batch}×{base.channels}×{base.size}×{base.size}, {base.kernel}×{base.kernel}, {base.dtype}"
    return f"{NOTE.format(base=start)}\n\n{markdown(headers, lines, left=(0, 1))}"


def _fit_text(points: Sequence[tuple[float, float]]) -> str:
    if len(points) < LEAST_POINTS:
        return "-"
    exponent, deviation = fit(points)
    return f"{exponent:.2f} ({100 * deviation:.0f} %)"
