"""Results as PNG charts, with matplotlib where it is installed: bars of time and of speed-up, rates under the machine's
roofs, and how time grows."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import GROWTH_FROM, parameters
from .contenders import OURS
from .results import Roofs, Row, best_peer, peers_of, replacing, shared_words

OURS_COLOR, PEER_COLOR = "#1b6ca8", "#b4bcc4"
#: By contender, the same in every chart; others take what follows.
COLORS = {
    OURS: OURS_COLOR,
    "eager nchw": "#e0a458",
    "eager channels-last": "#c8553d",
    "torch.compile": "#6ba368",
    "onnxruntime": "#9c6b98",
    "openvino": "#4f9d9d",
}
OTHER_COLORS = ("#8d99ae", "#b08968", "#d4a5a5", "#7a9e9f")
TEXT_COLOR, SLOWER_COLOR, GRID_COLOR = "#222222", "#b03a2e", "#e3e6e8"
BAR_INCHES = 0.2


class ChartError(RuntimeError):
    """No chart can be drawn; the text says why."""


def color(contender: str) -> str:
    return COLORS.get(contender) or OTHER_COLORS[zlib.crc32(contender.encode()) % len(OTHER_COLORS)]


def latency_chart(row: Row, path: Path, title: str) -> None:
    """One case: a bar a contender, fastest first, quartiles as whiskers.

    Raises:
        ChartError: where matplotlib is missing or nothing was measured.
    """
    measured = sorted((m for m in row.measurements if m.samples_ms), key=lambda m: m.median_ms, reverse=True)
    if not measured:
        raise ChartError("nothing was measured, so there is no chart")
    figure, axes = _bar_axes(1.6 * len(measured), title)
    medians = [m.median_ms for m in measured]
    low, high = zip(*(m.quartiles_ms for m in measured), strict=True)
    axes.barh(
        [m.contender for m in measured], medians, height=0.62,
        color=[OURS_COLOR if m.contender == OURS else PEER_COLOR for m in measured],
        xerr=([m - q for m, q in zip(medians, low, strict=True)], [q - m for m, q in zip(medians, high, strict=True)]),
        error_kw={"ecolor": TEXT_COLOR, "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    for position, m in enumerate(measured):
        ratio = row.ratio(m.contender, OURS)
        versus = "" if ratio is None or m.contender == OURS else f"   {ratio:.2f}× ours"
        axes.annotate(
            f"{m.median_ms:.1f} ms{versus}", (max(m.median_ms, m.quartiles_ms[1]), position), xytext=(6, 0),
            textcoords="offset points", va="center", weight="bold" if m.contender == OURS else "normal",
        )  # fmt: skip
    axes.set_xlim(0, 1.3 * max(high))
    axes.set_xlabel("milliseconds a call, median and quartiles; shorter is faster")
    save(figure, path)


def speedup_chart(rows: Sequence[Row], path: Path, title: str) -> None:
    """A line a case: the time over ours of every baseline as a mark, and a bar up to the fastest of them.

    Raises:
        ChartError: where matplotlib is missing or nothing was measured.
    """
    found = [(row, ratios) for row in rows if (ratios := _ratios(row))]
    if not found:
        raise ChartError("no baseline was measured beside ours, so there is no chart")
    figure, axes = _bar_axes(len(found), title)
    for position, (_, ratios) in enumerate(found):
        least = min(ratios.values())
        axes.barh(position, least - 1, left=1, height=0.6, color=PEER_COLOR if least >= 1 else "#ecc5c0", zorder=1)
    for peer in peers_of([row for row, _ in found], OURS):
        points = [(ratios[peer], position) for position, (_, ratios) in enumerate(found) if peer in ratios]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, color=color(peer), label=peer, zorder=3)
    largest = max(max(ratios.values()) for _, ratios in found)
    for position, (_, ratios) in enumerate(found):
        least = min(ratios.values())
        axes.annotate(
            f"{least:.2f}×", (1, position), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8, color=SLOWER_COLOR if least < 1 else TEXT_COLOR,
            weight="bold" if least < 1 else "normal",
        )  # fmt: skip
    axes.axvline(1, color=TEXT_COLOR, linewidth=1.2, zorder=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlim(min(0.7, 0.95 * min(min(ratios.values()) for _, ratios in found)), 1.1 * max(2, largest))
    axes.set_yticks(range(len(found)), _names([row for row, _ in found]), fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)  # first case on top
    axes.set_xlabel("time over ours: right of the line ours is faster. Bar, number: the fastest baseline (red: faster)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, fontsize=8, handletextpad=0.1)
    save(figure, path)


def _names(rows: Sequence[Row]) -> list[str]:
    return [row.case.removesuffix(shared_words(rows)) for row in rows]


def _ratios(row: Row) -> dict[str, float]:
    return {peer: ratio for peer in peers_of([row], OURS) if (ratio := row.ratio(peer, OURS)) is not None}


def blank_figure(width: float, height: float, title: str) -> Any:
    """A matplotlib figure with a title, drawn without a display.

    Raises:
        ChartError: where matplotlib is missing.
    """
    try:
        # The object interface: no global state, and no display is looked for.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartError(f"charts need matplotlib (pip install matplotlib): {error}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=TEXT_COLOR)
    return figure


def _bar_axes(bars: float, title: str) -> tuple[Any, Any]:
    figure = blank_figure(9, 1.5 + BAR_INCHES * max(bars, 5), title)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID_COLOR)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


MARKERS = ("o", "s", "^", "D", "v", "P")


def roofline_chart(rows: Sequence[Row], roofs: Roofs | None, path: Path, title: str) -> None:
    """GFLOP/s of ours (filled) and of the fastest baseline (hollow) over operations per byte, a panel a dtype.

    Raises:
        ChartError: where matplotlib or the roofs are missing, or nothing was measured.
    """
    found_in = dict.fromkeys(row.parameters.get("dtype", "") for row in rows if row.measurement(OURS))
    dtypes = [dtype for dtype in found_in if roofs and dtype in roofs.gflops]
    if roofs is None or not dtypes:
        raise ChartError("no roof was measured, so there is no roofline")
    figure = blank_figure(9, 1 + 5 * len(dtypes), title)
    for panel, dtype in enumerate(dtypes):
        axes = figure.add_subplot(len(dtypes), 1, panel + 1)
        found = [row for row in rows if row.parameters.get("dtype") == dtype and row.measurement(OURS)]
        kinds = list(dict.fromkeys(_label(row) for row in found))
        for row in found:
            intensity, marker = row.flops / row.bytes, MARKERS[kinds.index(_label(row)) % len(MARKERS)]
            ours, peer = row.measurement(OURS), best_peer(row, OURS)
            assert ours
            theirs = row.measurement(peer) if peer else None
            if theirs:
                axes.plot([intensity] * 2, [row.gflops(theirs), row.gflops(ours)], color="#c9cfd4", lw=1, zorder=1)
                axes.scatter(intensity, row.gflops(theirs), s=26, marker=marker, fc="white", ec="#8d99ae", zorder=2)
            axes.scatter(intensity, row.gflops(ours), s=30, marker=marker, color=color(OURS), zorder=3)
        for kind, marker in zip(kinds, MARKERS * len(kinds), strict=False):
            axes.scatter([], [], marker=marker, color=color(OURS), label=kind)
        axes.scatter([], [], marker="o", fc="white", ec="#8d99ae", label="fastest baseline, same mark")
        ends = [0.7 * min(r.flops / r.bytes for r in found), 1.5 * max(r.flops / r.bytes for r in found)]
        peak = roofs.gflops[dtype]
        for size, rate in (max(roofs.copies, key=lambda copy: copy[1]), roofs.copies[-1]):
            xs = sorted({*ends, min(ends[1], max(ends[0], peak / rate))})
            axes.plot(xs, [min(peak, rate * x) for x in xs], color="#c9a26b", lw=1, ls="--", zorder=0)
            axes.annotate(f"copies of {size / 2**20:g} MiB: {rate:.0f} GB/s", (ends[0], ends[0] * rate),
                          xytext=(4, 4), textcoords="offset points", fontsize=8, color="#8a6a35")  # fmt: skip
        axes.axhline(peak, color=TEXT_COLOR, lw=1)
        axes.annotate(f"{peak:.0f} GFLOP/s", (ends[1], peak), xytext=(-4, 4), textcoords="offset points",
                      ha="right", fontsize=8)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.yaxis, axes.xaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.set_xlim(*ends)
        axes.set_title(dtype, loc="left", fontsize=10)
        axes.set_xlabel("operations per byte that has to be moved")
        axes.set_ylabel("GFLOP/s")
        axes.grid(color=GRID_COLOR)
        axes.set_axisbelow(True)
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    save(figure, path)


# How time grows with work: exponents fitted to the cases that differ in one dimension only.

#: Fields of a case that grow, and what they are called; maps are square, so a size counts as its pixels.
DIMENSIONS = {"batch": "batch", "size": "pixels", "channels": "channels", "kernel": "kernel size"}
LEAST_POINTS = 3


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


def growth_chart(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time as batch, pixels, channels and kernel size grow, a row of panels an operator, both axes logarithmic.

    Raises:
        ChartError: where matplotlib is missing or no series was measured.
    """
    found = list(series(rows))
    if not found:
        raise ChartError("no dimension was varied alone, so there is no chart of growth")
    operators = list(dict.fromkeys(one.operator for one in found))
    dimensions = list(DIMENSIONS)
    figure = blank_figure(3.2 * len(dimensions), 0.8 + 2.7 * len(operators), title)
    grid = figure.subplots(len(operators), len(dimensions), squeeze=False)
    contenders = [OURS, *peers_of([row for one in found for row in one.rows], OURS)]
    for axes in grid.flat:
        axes.set_visible(False)
    for one in found:
        axes = grid[operators.index(one.operator)][dimensions.index(one.dimension)]
        axes.set_visible(True)
        for contender in contenders:
            if points := one.times(contender):
                ours = contender == OURS
                label = contender if len(points) < LEAST_POINTS else f"{contender} {fit(points)[0]:.2f}"
                axes.plot(*zip(*points, strict=True), marker="o", ms=3.5 if ours else 2.5, lw=2 if ours else 1,
                          color=color(contender), label=label, zorder=3 if ours else 2)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(one.values, [str(value) for value in one.values], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(f"{one.operator}: {DIMENSIONS[one.dimension]}", loc="left", fontsize=9)
        axes.grid(color=GRID_COLOR)
        axes.set_axisbelow(True)
        axes.legend(fontsize=7, frameon=False, title="exponent", title_fontsize=7, alignment="left")
    for line in grid:
        line[0].set_ylabel("milliseconds a call")
    save(figure, path)


def _label(row: Row) -> str:
    kind = row.parameters.get("kind", "")
    return row.parameters.get("operator", kind)
