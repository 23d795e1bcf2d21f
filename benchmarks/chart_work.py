"""Charts of time against work: rates under the machine's roofs, and how time grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import growth
from .chart import GRID_COLOR, TEXT_COLOR, ChartError, blank_figure, color, save
from .peers import OURS
from .results import Row, best_peer, peers_of
from .roofs import Roofs

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


def growth_chart(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time as batch, pixels, channels and kernel size grow, a row of panels an operator, both axes logarithmic.

    Raises:
        ChartError: where matplotlib is missing or no series was measured.
    """
    found = list(growth.series(rows))
    if not found:
        raise ChartError("no dimension was varied alone, so there is no chart of growth")
    operators = list(dict.fromkeys(one.operator for one in found))
    dimensions = list(growth.DIMENSIONS)
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
                label = contender if len(points) < growth.LEAST_POINTS else f"{contender} {growth.fit(points)[0]:.2f}"
                axes.plot(*zip(*points, strict=True), marker="o", ms=3.5 if ours else 2.5, lw=2 if ours else 1,
                          color=color(contender), label=label, zorder=3 if ours else 2)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(one.values, [str(value) for value in one.values], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(f"{one.operator}: {growth.DIMENSIONS[one.dimension]}", loc="left", fontsize=9)
        axes.grid(color=GRID_COLOR)
        axes.set_axisbelow(True)
        axes.legend(fontsize=7, frameon=False, title="exponent", title_fontsize=7, alignment="left")
    for line in grid:
        line[0].set_ylabel("milliseconds a call")
    save(figure, path)


def _label(row: Row) -> str:
    kind = row.parameters.get("kind", "")
    return row.parameters.get("operator", kind)
