"""Writes the pictures of docs/kernels.md: a row as a product with a banded matrix, rolling rows, where bytes go.

    python tools/draw_kernels.py [FOLDER]       # default: docs/pictures

Each is drawn on a card of its own and follows the colour scheme of the reader's system, so it can be read on any page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
STYLE = """
.card{fill:#ffffff;stroke:#d0d7de}.t{fill:#1f2328}.q{fill:#59636e}.cell{fill:#eef2f5;stroke:#c3ccd4}
.own{fill:#9cc3e0;stroke:#5a93bd}.out{fill:#b7dfc0;stroke:#5fa573}.tap{fill:#f3c48a;stroke:#c98a3a}
.hot{fill:#1b6ca8;stroke:#1b6ca8}.over{fill:#ffffff}.arrow{stroke:#59636e;fill:none}.w{fill:#f3c48a}.r{fill:#9cc3e0}
@media (prefers-color-scheme:dark){
.card{fill:#161b22;stroke:#30363d}.t{fill:#e6edf3}.q{fill:#9198a1}.cell{fill:#21262d;stroke:#3d444d}
.own{fill:#2b5f87;stroke:#58a6e8}.out{fill:#2c5a3a;stroke:#5fa573}.tap{fill:#8a5a1c;stroke:#e8a552}
.hot{fill:#58a6e8;stroke:#58a6e8}.over{fill:#0d1117}.arrow{stroke:#9198a1}.w{fill:#a86e2a}.r{fill:#2b5f87}}
""".strip()
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Drawing:
    """An SVG with a heading that grows by rectangles, text and arrows; ``label`` is for those who cannot see it."""

    def __init__(self, width: int, height: int, label: str, heading: str, below: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            f'aria-label="{escape(label)}" font-family="{FONT}" font-size="13"><style>{STYLE}</style>',
            f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10"/>',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            '<path class="q" d="M0 0L8 4L0 8z"/></marker></defs>',
        ]
        self.text(24, 34, heading, size=16, weight=600)
        self.text(24, 56, below, "q")

    def box(self, x: float, y: float, width: float, height: float, style: str = "cell", text: str = "") -> None:
        self.parts.append(f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>')
        if text:
            over = "over" if style == "hot" else "t"
            self.text(x + width / 2, y + height / 2 + 4, text, over, "middle", size=11)

    def text(
        self, x: float, y: float, text: str, style: str = "t", anchor: str = "start", size: int = 13, weight: int = 400
    ) -> None:
        self.parts.append(
            f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
            f'font-weight="{weight}">{escape(text)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<path class="arrow" d="M{x1:g} {y1:g}L{x2:g} {y2:g}" marker-end="url(#head)"/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def banded_matrix() -> Drawing:
    """A window of 8 columns with 4 on each side, times the matrix that holds a row of a 7×7 filter."""
    cell, taps, own, halo = 21, 7, 8, 4
    drawing = Drawing(
        880, 500, "A row of a depthwise convolution as a product with a banded matrix",
        "One row of a 7×7 filter on a row of the map: 16 numbers in, 8 out",
        "The matrix is the same for every window, row and image of a channel: a warp keeps it in registers.",
    )  # fmt: skip
    left, top = 24, 104
    drawing.text(left, top - 10, "16 windows of a channel (rows of the fragment)", "q", size=12)
    for row in range(16):
        for column in range(own + 2 * halo):
            inside = halo <= column < halo + own
            drawing.box(left + cell * column, top + cell * row, cell - 2, cell - 2, "own" if inside else "cell")
    drawing.text(left, top + 16 * cell + 18, "4 left", "q", size=12)
    drawing.text(left + cell * halo, top + 16 * cell + 18, "8 columns of its own", "q", size=12)
    drawing.text(left + cell * (halo + own) + 8, top + 16 * cell + 18, "4 right", "q", size=12)
    drawing.text(left + 16 * cell + 16, top + 8 * cell, "×", size=22)
    left += 16 * cell + 46
    drawing.text(left, top - 10, "the filter row w₀ … w₆", "q", size=12)
    for row in range(own + 2 * halo):
        for column in range(own):
            tap = row - column - halo + taps // 2
            held = 0 <= tap < taps
            drawing.box(left + cell * column, top + cell * row, cell - 2, cell - 2, "tap" if held else "cell",
                        f"{tap}" if held else "")  # fmt: skip
    drawing.text(left, top + 16 * cell + 18, "empty: zeros", "q", size=12)
    drawing.text(left + 8 * cell + 14, top + 8 * cell, "=", size=22)
    left += 8 * cell + 46
    drawing.text(left, top - 10, "128 results", "q", size=12)
    for row in range(16):
        for column in range(own):
            drawing.box(left + cell * column, top + cell * row, cell - 2, cell - 2, "out")
    drawing.text(left, top + 16 * cell + 18, "added to those of", "q", size=12)
    drawing.text(left, top + 16 * cell + 34, "the other 6 filter rows", "q", size=12)
    drawing.text(24, 484, "One mma.m16n8k16 does it. 56 of 128 elements are taps; the others multiply zeros.", "q")
    return drawing


def rolling_rows() -> Drawing:
    """The token mixer: seven rows of the middle map exist at a time."""
    drawing = Drawing(
        880, 380, "Rolling rows in the token mixer",
        "The token mixer rolls the rows: the middle map never exists as a whole",
        "FFNified attention, 7×7: the step that completes row h of the result.",
    )  # fmt: skip
    height, width, top = 22, 170, 100
    lefts = {"q": 40, "middle": 355, "y": 670}
    drawing.text(lefts["q"], top - 12, "q, in memory", weight=600)
    drawing.text(lefts["middle"], top - 12, "middle map: a ring of 7 rows", weight=600)
    drawing.text(lefts["y"], top - 12, "result, in memory", weight=600)
    for row in range(10):
        y = top + height * row
        read = row >= 3
        drawing.box(lefts["q"], y, width, height - 3, "own" if read else "cell", _row(row - 3))
        if 0 <= row <= 6:
            drawing.box(lefts["middle"], y, width, height - 3, "hot" if row == 6 else "tap", _row(row - 3))
        if row <= 3:
            drawing.box(lefts["y"], y, width, height - 3, "hot" if row == 3 else "out", _row(row - 3))
    middle = top + 6.4 * height
    drawing.arrow(lefts["q"] + width + 8, middle, lefts["middle"] - 8, middle)
    drawing.text((lefts["q"] + width + lefts["middle"]) / 2, middle - 10, "conv K, + b₁, GELU", "q", "middle", 12)
    drawing.arrow(lefts["middle"] + width + 8, top + 3.4 * height, lefts["y"] - 8, top + 3.4 * height)
    drawing.text((lefts["middle"] + width + lefts["y"]) / 2, top + 3.4 * height - 10, "conv V, + b₂", "q", "middle", 12)
    drawing.text((lefts["middle"] + width + lefts["y"]) / 2, top + 3.4 * height + 18, "· s, + r", "q", "middle", 12)
    drawing.text(
        24,
        346,
        "Row h+3 of the middle map is made from rows h … h+6 of q; it takes the place of row h−4, which is done with.",
        "q",
    )
    drawing.text(
        24,
        365,
        "CPU: the ring is in L1. Tensor cores: sums of seven rows of the result wait in rotating accumulators.",
        "q",
    )
    return drawing


def _row(offset: int) -> str:
    return f"h{offset:+d}".replace("-", "−") if offset else "h"


#: (pass, maps read, maps written) of plain PyTorch, in maps [C, H, W]; the hidden map has three times the width.
PLAIN = {
    "ffnified_attention": [("conv K", 1, 1), ("GELU", 1, 1), ("conv V", 1, 1), ("· s", 1, 1), ("+ r", 2, 1)],
    "channel_mixer": [("DW", 1, 1), ("W₁", 1, 3), ("GELU", 3, 3), ("W₂", 3, 1), ("· s", 1, 1), ("+ r", 2, 1)],
}
#: Of the fused operators: the input and the residual read, the result written.
FUSED = (2, 1)


def bytes_moved() -> Drawing:
    """Maps that plain PyTorch and the fused operators move."""
    drawing = Drawing(
        880, 330, "Maps moved by plain PyTorch and by the fused operators",
        "Where bytes go: maps that are read and written",
        "Counted, in maps of C × H × W; the hidden map of the channel mixer counts three. Weights are left out.",
    )  # fmt: skip
    unit, left, y = 28.0, 175, 84
    for name, passes in PLAIN.items():
        total = sum(read + written for _, read, written in passes)
        drawing.text(24, y + 20, name, weight=600)
        drawing.text(left - 10, y + 42, "plain, call by call", "q", "end", 12)
        x = float(left)
        for what, read, written in passes:
            drawing.box(x, y + 26, unit * read - 1, 24, "r")
            drawing.box(x + unit * read, y + 26, unit * written - 2, 24, "w")
            drawing.text(x + unit * (read + written) / 2, y + 20, what, "q", "middle", 11)
            x += unit * (read + written)
        drawing.text(x + 8, y + 43, f"{total}", weight=600)
        drawing.text(left - 10, y + 75, "one operator", "q", "end", 12)
        drawing.box(left, y + 59, unit * FUSED[0] - 1, 24, "r")
        drawing.box(left + unit * FUSED[0], y + 59, unit * FUSED[1] - 2, 24, "w")
        drawing.text(left + unit * sum(FUSED) + 8, y + 76, f"{sum(FUSED)}", weight=600)
        y += 104
    drawing.box(24, 300, 14, 14, "r")
    drawing.text(44, 312, "read", "q", size=12)
    drawing.box(90, 300, 14, 14, "w")
    drawing.text(110, 312, "written", "q", size=12)
    drawing.text(
        175,
        312,
        "One operator: as on the CPU, where all that is in between stays in registers, L1 or L2.",
        "q",
        size=12,
    )
    return drawing


def pictures() -> Iterator[tuple[str, str]]:
    """File names, and what belongs into them."""
    for draw in (banded_matrix, rolling_rows, bytes_moved):
        yield f"{draw.__name__.replace('_', '-')}.svg", str(draw())


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else PICTURES
    for name, text in pictures():
        (folder / name).write_text(text)
        print(f"wrote {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
