"""The README's chart as SVG, in colours for light and for dark pages: the same bytes from the same results.

matplotlib, which draws the other charts, writes other bytes in every version, so nothing could be checked for drift.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple
from xml.sax.saxutils import escape

from .results import Result
from .timm_report import gain

#: Models that are named where there is room, from many families. The slowest and the fastest always are.
NAMED = (
    "convnext_tiny", "mobilenetv3_large_100", "efficientnet_b0", "fastvit_t8", "repvit_m1", "mobilenetv4_conv_large",
    "convnext_nano", "fastvit_sa12", "efficientvit_m0", "inception_next_atto", "ghostnet_100", "mobilenetv2_100",
    "starnet_s1", "davit_tiny", "efficientformerv2_s0", "coatnet_pico_rw_224", "mobilevitv2_100", "mixnet_s",
)  # fmt: skip
THREADS = 2
WIDTH, TOP, BOTTOM, LEFT, RIGHT, NAMES_HEIGHT = 880, 64, 284, 116, 12, 130
#: Bars between two names, so that slanted text of 11 pixels does not overlap.
APART = 2
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Theme(NamedTuple):
    """Colours of a page."""

    text: str
    quiet: str
    grid: str
    bar: str
    named_bar: str
    mean: str


LIGHT = Theme("#1f2328", "#59636e", "#d8dee4", "#9cc3e0", "#1b6ca8", "#b35900")
DARK = Theme("#e6edf3", "#9198a1", "#30363d", "#2b5f87", "#58a6e8", "#e8a552")


def light(result: Result) -> str:
    """The chart of the results of ``timm``, for light pages."""
    return chart(result, LIGHT)


def dark(result: Result) -> str:
    """The chart of the results of ``timm``, for dark pages."""
    return chart(result, DARK)


def chart(result: Result, theme: Theme, threads: int = THREADS) -> str:
    """A bar a model: time of plain PyTorch over ours, each in its faster layout, on a logarithmic axis from 1.

    Raises:
        ValueError: where nothing was measured on that number of threads.
    """
    gains = gains_of(result, threads)
    if not gains:
        raise ValueError(f"expected results of {threads} threads, got none")
    # The axis ends at the next power of two; it begins at 1, or below the least.
    ends = min(0.0, math.log2(gains[0][0])), math.ceil(math.log2(gains[-1][0]))

    def height(ratio: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log2(ratio) - ends[0]) / (ends[1] - ends[0])

    pitch = (WIDTH - LEFT - RIGHT) / len(gains)
    named = places_of_names([name for _, name in gains])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {BOTTOM + NAMES_HEIGHT}" width="{WIDTH}" '
        f'role="img" aria-label="{escape(_title(gains, threads))}" font-family="{FONT}" font-size="12">',
        _text(16, 20, _title(gains, threads), theme.text, size=15, weight=600),
        _text(16, 39, _where(result), theme.quiet),
    ]
    for power in range(math.ceil(ends[0]), ends[1] + 1):
        y = height(2.0**power)
        parts += [_line(LEFT, WIDTH - RIGHT, y, theme.grid), _text(LEFT - 6, y + 4, f"{2**power}×", theme.quiet, "end")]
    for place, (ratio, name) in enumerate(gains):
        x, y = LEFT + pitch * place, height(ratio)
        color = theme.named_bar if place in named else theme.bar
        low, high = sorted((y, height(1.0)), reverse=True)
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{high:.1f}" width="{pitch - 2:.1f}" height="{low - high:.1f}" fill="{color}">'
            f"<title>{escape(name)}: {ratio:.2f}×</title></rect>"
        )
        if place in named:
            x, y = x + pitch / 2, BOTTOM + 10
            text = f"{name} {ratio:.2f}×"
            parts.append(
                f'<text transform="translate({x + 3:.1f} {y:.1f}) rotate(-42)" text-anchor="end" font-size="10.5" '
                f'fill="{theme.text}">{escape(text)}</text>'
            )
    mean = statistics.geometric_mean(ratio for ratio, _ in gains)
    parts += [
        _line(LEFT, WIDTH - RIGHT, height(mean), theme.mean, dashed=True),
        _text(LEFT + 6, height(mean) - 6, f"geometric mean {mean:.2f}×", theme.mean, weight=600),
        "</svg>",
    ]
    return "\n".join(parts)


def gains_of(result: Result, threads: int) -> list[tuple[float, str]]:
    """Speed-up and name of each model on so many threads, the least first."""
    rows = [row for row in result.rows if row.parameters["threads"] == threads]
    return sorted((ratio, row.parameters["model"]) for row in rows if (ratio := gain(row)))


def places_of_names(names: list[str]) -> set[int]:
    """Which bars are named: both ends, and those of `NAMED` for which there is room, the first ones first."""
    places = {0, len(names) - 1}
    for name in NAMED:
        place = names.index(name) if name in names else None
        if place is not None and all(abs(place - other) >= APART for other in places):
            places.add(place)
    return places


def _title(gains: list[tuple[float, str]], threads: int) -> str:
    return f"Speed-up of {len(gains)} timm models by optimize(model), on the CPU, {threads} threads"


def _where(result: Result) -> str:
    machine = result.machine
    return (
        f"times as fast as plain PyTorch, the better layout of each; float32, batch 1; {machine['processor']}, "
        f"{machine['isa']}, torch {machine['torch']}, timm {result.extra['timm']}"
    )


def _line(x1: float, x2: float, y: float, color: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"{dashes}/>'


def _text(x: float, y: float, text: str, color: str, anchor: str = "start", size: int = 12, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{color}">{escape(text)}</text>'
    )
