"""Results as PNG charts, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .peers import OURS
from .results import Result, Row, peers_of, replacing

OURS_COLOR, PEER_COLOR = "#1b6ca8", "#b4bcc4"
PEER_COLORS = ("#b4bcc4", "#7fa8c9", "#e0a458", "#9c6b98", "#6ba368")
TEXT_COLOR, SLOWER_COLOR, GRID_COLOR = "#222222", "#b03a2e", "#e3e6e8"
BAR_INCHES = 0.2


class ChartError(RuntimeError):
    """No chart can be drawn; the text says why."""


def latency_chart(row: Row, path: Path, title: str) -> None:
    """One case: a bar a contender, fastest first, quartiles as whiskers.

    Raises:
        ChartError: where matplotlib is missing or nothing was measured.
    """
    measured = sorted((m for m in row.measurements if m.samples_ms), key=lambda m: m.median_ms, reverse=True)
    if not measured:
        raise ChartError("nothing was measured, so there is no chart")
    figure, axes = _axes(1.6 * len(measured), title)
    medians = [m.median_ms for m in measured]
    low, high = zip(*(m.quartiles_ms for m in measured), strict=True)
    axes.barh(
        [m.contender for m in measured],
        medians,
        height=0.62,
        color=[OURS_COLOR if m.contender == OURS else PEER_COLOR for m in measured],
        xerr=([m - q for m, q in zip(medians, low, strict=True)], [q - m for m, q in zip(medians, high, strict=True)]),
        error_kw={"ecolor": TEXT_COLOR, "elinewidth": 1, "capsize": 2},
    )
    for position, m in enumerate(measured):
        ratio = row.ratio(m.contender, OURS)
        versus = "" if ratio is None or m.contender == OURS else f"   {ratio:.2f}× ours"
        axes.annotate(
            f"{m.median_ms:.1f} ms{versus}",
            (max(m.median_ms, m.quartiles_ms[1]), position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if m.contender == OURS else "normal",
        )
    axes.set_xlim(0, 1.3 * max(high))
    axes.set_xlabel("milliseconds a call, median and quartiles; shorter is faster")
    _save(figure, path)


def ratio_chart(result: Result, path: Path, title: str) -> None:
    """All cases: the time of each peer over ours; beyond the line at 1 ours is faster.

    Raises:
        ChartError: where matplotlib is missing or nothing was measured.
    """
    peers = [p for p in peers_of(result.rows, OURS) if any(row.ratio(p, OURS) for row in result.rows)]
    if not peers:
        raise ChartError("no peer was measured beside ours, so there is no chart")
    figure, axes = _axes(len(result.rows) * (len(peers) + 0.6), title)
    height = 0.8 / len(peers)
    longest = 1.0
    for index, peer in enumerate(peers):
        points = [(i, ratio) for i, row in enumerate(result.rows) if (ratio := row.ratio(peer, OURS)) is not None]
        positions = [i + (index - (len(peers) - 1) / 2) * height for i, _ in points]
        ratios = [ratio for _, ratio in points]
        longest = max(longest, *ratios)
        axes.barh(positions, ratios, height=0.9 * height, color=PEER_COLORS[index % len(PEER_COLORS)], label=peer)
        for position, ratio in zip(positions, ratios, strict=True):
            axes.annotate(
                f"{ratio:.2f}×",
                (1 if 0.7 < ratio < 1 else ratio, position),  # clear of the line at 1
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=SLOWER_COLOR if ratio < 1 else TEXT_COLOR,
                weight="bold" if ratio < 1 else "normal",
            )
    axes.axvline(1, color=TEXT_COLOR, linewidth=1)
    axes.set_yticks(range(len(result.rows)), _short_names(result.rows))
    axes.set_ylim(len(result.rows) - 0.4, -0.6)  # first case on top
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel("time of the peer / time of ours; beyond 1 ours is faster, red: ours is slower")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(peers), frameon=False)
    _save(figure, path)


def _short_names(rows: Sequence[Row]) -> list[str]:
    """Without the words that all cases end in."""
    words = [row.case.split() for row in rows]
    shared = 0
    while len(rows) > 1 and all(len(w) > shared + 1 and w[-1 - shared] == words[0][-1 - shared] for w in words):
        shared += 1
    return [" ".join(w[: len(w) - shared]) for w in words]


def _axes(bars: float, title: str) -> tuple[Any, Any]:
    try:
        # The object interface: no global state, and no display is looked for.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartError(f"charts need matplotlib (pip install matplotlib): {error}") from error
    figure = Figure(figsize=(9, 1.5 + BAR_INCHES * max(bars, 5)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=TEXT_COLOR)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID_COLOR)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
