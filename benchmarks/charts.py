"""Results as PNG charts, with matplotlib where it is installed: bars of time and of speed-up, and rates under the
machine's roofline."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import OURS, Measurement, Roofs, Row, baselines_of, replacing, shared_words

OURS_COLOR, BASELINE_COLOR, SLOWER_BAR_COLOR = "#1b6ca8", "#b4bcc4", "#ecc5c0"
#: By contender, the same in every chart; other contenders get one of OTHER_COLORS.
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
MARKERS = ("o", "s", "^", "D", "v", "P")


class ChartError(RuntimeError):
    """No chart can be drawn; the message says why."""


def latency_chart(row: Row, path: Path, title: str) -> None:
    """One case: a bar a contender, fastest first, quartiles as whiskers.

    Raises:
        ChartError: if matplotlib is missing or nothing was measured.
    """
    measured = sorted((m for m in row.measurements if m.samples_ms), key=lambda m: m.median_ms, reverse=True)
    if not measured:
        raise ChartError("nothing was measured, so there is no chart")
    figure, axes = _bar_axes(1.6 * len(measured), title)
    medians = [m.median_ms for m in measured]
    low, high = zip(*(m.quartiles_ms for m in measured), strict=True)
    axes.barh(
        [m.contender for m in measured], medians, height=0.62,
        color=[OURS_COLOR if m.contender == OURS else BASELINE_COLOR for m in measured],
        xerr=([m - q for m, q in zip(medians, low, strict=True)], [q - m for m, q in zip(medians, high, strict=True)]),
        error_kw={"ecolor": TEXT_COLOR, "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    for position, m in enumerate(measured):
        ratio = row.ratio(m.contender)
        versus = "" if ratio is None or m.contender == OURS else f"   {ratio:.2f}× ours"
        end, weight = max(m.median_ms, m.quartiles_ms[1]), "bold" if m.contender == OURS else "normal"
        _label(axes, f"{m.median_ms:.1f} ms{versus}", (end, position), (6, 0), va="center", weight=weight)
    axes.set_xlim(0, 1.3 * max(high))
    axes.set_xlabel("milliseconds a call, median and quartiles; shorter is faster")
    _save(figure, path)


def speedup_chart(rows: Sequence[Row], path: Path, title: str) -> None:
    """A line a case: the time over ours of every baseline as a mark, and a bar up to the fastest of them.

    Raises:
        ChartError: if matplotlib is missing or nothing was measured.
    """
    rows = [row for row in rows if row.ratios()]
    if not rows:
        raise ChartError("no baseline was measured beside ours, so there is no chart")
    figure, axes = _bar_axes(len(rows), title)
    found = [row.ratios() for row in rows]
    for position, ratios in enumerate(found):
        least = min(ratios.values())
        axes.barh(position, least - 1, left=1, height=0.6, color=BASELINE_COLOR if least >= 1 else SLOWER_BAR_COLOR)
        _label(
            axes, f"{least:.2f}×", (1, position), (6, 0), xycoords=("axes fraction", "data"), va="center", fontsize=8,
            color=SLOWER_COLOR if least < 1 else TEXT_COLOR, weight="bold" if least < 1 else "normal",
        )  # fmt: skip
    for name in baselines_of(rows):
        if points := [(ratios[name], position) for position, ratios in enumerate(found) if name in ratios]:
            axes.scatter(*zip(*points, strict=True), s=22, color=_color(name), label=name, zorder=3)
    axes.axvline(1, color=TEXT_COLOR, linewidth=1.2, zorder=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    ends = [ratio for ratios in found for ratio in ratios.values()]
    axes.set_xlim(min(0.7, 0.95 * min(ends)), 1.1 * max(2, *ends))
    shared = shared_words(rows)
    axes.set_yticks(range(len(rows)), [row.case.removesuffix(shared) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # first case on top
    axes.set_xlabel("time over ours: right of the line ours is faster. Bar, number: the fastest baseline (red: faster)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, fontsize=8, handletextpad=0.1)
    _save(figure, path)


def roofline_chart(rows: Sequence[Row], roofs: Roofs | None, path: Path, title: str) -> None:
    """GFLOP/s of ours (filled) and of the fastest baseline (hollow) over operations per byte, a panel a dtype.

    Raises:
        ChartError: if matplotlib or the roofline is missing, or nothing was measured.
    """
    by_dtype: dict[str, list[tuple[Row, Measurement]]] = {}
    for row in rows:
        dtype, ours = row.parameters.get("dtype", ""), row.measurement(OURS)
        if ours and roofs and dtype in roofs.gflops:
            by_dtype.setdefault(dtype, []).append((row, ours))
    if roofs is None or not by_dtype:
        raise ChartError("no roof was measured, so there is no roofline")
    figure = _figure(9, 1 + 5 * len(by_dtype), title)
    for panel, (dtype, found) in enumerate(by_dtype.items(), 1):
        axes = figure.add_subplot(len(by_dtype), 1, panel)
        markers: dict[str, str] = {}
        for row, ours in found:
            kind = row.parameters.get("operator", row.parameters.get("kind", ""))
            marker = markers.setdefault(kind, MARKERS[len(markers) % len(MARKERS)])
            intensity, name = row.flops / row.bytes, row.best_baseline()
            if name and (theirs := row.measurement(name)):
                axes.plot([intensity] * 2, [row.gflops(theirs), row.gflops(ours)], color="#c9cfd4", lw=1, zorder=1)
                axes.scatter(intensity, row.gflops(theirs), s=26, marker=marker, fc="white", ec="#8d99ae", zorder=2)
            axes.scatter(intensity, row.gflops(ours), s=30, marker=marker, color=OURS_COLOR, zorder=3)
        for kind, marker in markers.items():
            axes.scatter([], [], marker=marker, color=OURS_COLOR, label=kind)
        axes.scatter([], [], marker="o", fc="white", ec="#8d99ae", label="fastest baseline, same mark")
        intensities = [row.flops / row.bytes for row, _ in found]
        _draw_roofs(axes, roofs, dtype, (0.7 * min(intensities), 1.5 * max(intensities)))
        axes.set_title(dtype, loc="left", fontsize=10)
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    _save(figure, path)


def _draw_roofs(axes: Any, roofs: Roofs, dtype: str, ends: tuple[float, float]) -> None:
    """The axes, and above them the most arithmetic and copies that the machine was seen to do."""
    peak = roofs.gflops[dtype]
    for size, rate in (max(roofs.copies, key=lambda copy: copy[1]), roofs.copies[-1]):
        xs = sorted({*ends, min(ends[1], max(ends[0], peak / rate))})
        axes.plot(xs, [min(peak, rate * x) for x in xs], color="#c9a26b", lw=1, ls="--", zorder=0)
        text = f"copies of {size / 2**20:g} MiB: {rate:.0f} GB/s"
        _label(axes, text, (ends[0], ends[0] * rate), (4, 4), fontsize=8, color="#8a6a35")
    axes.axhline(peak, color=TEXT_COLOR, lw=1)
    _label(axes, f"{peak:.0f} GFLOP/s", (ends[1], peak), (-4, 4), ha="right", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=ends, xlabel="operations per byte that has to be moved", ylabel="GFLOP/s")
    for axis in (axes.yaxis, axes.xaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.grid(color=GRID_COLOR)
    axes.set_axisbelow(True)


def _color(contender: str) -> str:
    return COLORS.get(contender) or OTHER_COLORS[zlib.crc32(contender.encode()) % len(OTHER_COLORS)]


def _label(axes: Any, text: str, at: tuple[float, float], offset: tuple[int, int], **options: Any) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **options)


def _figure(width: float, height: float, title: str) -> Any:
    """A matplotlib figure with a title, drawn without a display.

    Raises:
        ChartError: if matplotlib is missing.
    """
    try:
        # The object interface: without global state, or a search for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartError(f"charts need matplotlib (pip install matplotlib): {error}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=TEXT_COLOR)
    return figure


def _bar_axes(bars: float, title: str) -> tuple[Any, Any]:
    figure = _figure(9, 1.5 + BAR_INCHES * max(bars, 5), title)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID_COLOR)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
