"""``python -m benchmarks tables``: writes tables and chart of the README and of docs/results.md from the results of
record, or checks them.

On a page a table is between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; nothing there is written by hand.
Long tables, such as that of the suite "record", are files of their own beside the results.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from . import goals, memory, timm_models
from .contenders import EAGER, EAGER_NCHW
from .options import parser_of
from .report import SLOWER, WRONG, error_text, growth_table, markdown, range_text, share_text
from .results import OURS, Result, Roofs, Row, machine_line, replacing
from .timm_models import by_threads, gains_of, mean_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: {} -->", "<!-- end of table -->"


def demo(result: Result) -> str:
    """The contenders of the demo and their times."""
    (row,) = result.rows
    lines = [
        (m.contender, f"{m.median_ms:.2f}", range_text(m.quartiles_ms, 2, "–"), _ratio_text(row.ratio(m.contender)),
         error_text(m))
        for m in row.measurements if m.samples_ms
    ]  # fmt: skip
    table = markdown(("contender", "median ms", "quartiles", "time / ours", "error"), lines)
    return f"{_measured(result)}\n\n{table}"


def operators(result: Result) -> str:
    """Forward passes of operators in float32: a line per shape, columns for each batch size."""
    shapes: dict[tuple[str, int, int, int], dict[int, Row]] = {}
    wanted = {"kind": "operator", "dtype": "float32", "direction": "forward", "layout": "channels_last"}
    for row in result.rows:
        p = row.parameters
        if wanted.items() <= p.items():
            shapes.setdefault((p["operator"], p["channels"], p["size"], p["kernel"]), {})[p["batch"]] = row
    lines = []
    for (operator, channels, size, kernel), by_batch in shapes.items():
        if {1, 8} <= by_batch.keys():  # others belong to the suite "growth"
            cells = [cell for batch in (1, 8) for cell in _against_best(by_batch[batch], result)]
            lines.append((f"`{operator}`", f"{channels} × {size}²", f"{kernel}×{kernel}", *cells))
    headers = (
        "operator", "C × H²", "kernel", "B = 1: ms", "of roof", "fastest baseline", "its time",
        "B = 8: ms", "of roof", "fastest baseline", "its time",
    )  # fmt: skip
    return f"{_measured(result)}\n\n{markdown(headers, lines, left=(0, 1, 2, 5, 9))}"


def whole(result: Result) -> str:
    """Layers, models and training steps, a line each."""
    rows = [r for r in result.rows if r.parameters.get("kind") in ("layer", "model", "training")]
    lines = [(row.case, *_against_best(row, result)) for row in rows]
    return markdown(("case", "ms", "of roof", "fastest baseline", "its time"), lines, left=(0, 3))


def against_pytorch(result: Result) -> str:
    """Models or training steps against the better eager layout and torch.compile."""
    lines = []
    for row in result.rows:
        ours = row.measurement(OURS)
        ratios = [ratio for name in (EAGER_NCHW, EAGER) if (ratio := row.ratio(name)) is not None]
        if ours is None or not ratios:
            continue
        share = share_text(row, ours, Roofs.of(result.machine))
        compiled = _ratio_text(row.ratio("torch.compile"))
        lines.append((row.case, f"{ours.median_ms:.1f}", share, _ratio_text(min(ratios)), compiled))
    table = markdown(("case", "ms", "of roof", "better eager layout", "torch.compile"), lines)
    return f"{_measured(result)}\n\n{table}"


def record(result: Result) -> str:
    """How many goals are reached, by group."""
    return f"{_measured(result)}\n\n{goals.summary(result)}"


def peak_memory(result: dict) -> str:
    return f"Measured on {machine_line(result['machine'])}.\n\n{memory.table(result['rows'])}"


def timm(result: Result) -> str:
    return f"Measured on {timm_models.overview(result)}"


def headline(result: Result) -> str:
    """The README's paragraph on timm models."""
    means, gains = [], []
    for threads, rows in by_threads(result).items():
        gains = gains_of(rows)
        (least, slowest), (most, fastest) = gains[0], gains[-1]
        means.append(
            f"{mean_of(gains):.2f}× on {threads} thread{'s' if threads > 1 else ''} ({least:.2f}× `{slowest}` to "
            f"{most:.2f}× `{fastest}`)"
        )
    return (
        f"Geometric mean over {len(gains)} models of timm: {', '.join(means)}. Float32, batch 1, the better layout of "
        f"each. Measured on {machine_line(result.machine)}."
    )


# The README's chart as SVG. It is not drawn by matplotlib, whose output changes with every version, so that it can be
# checked for drift.

#: Models from many families that are named if there is room. The slowest and the fastest always are.
NAMED = (
    "convnext_tiny", "mobilenetv3_large_100", "efficientnet_b0", "fastvit_t8", "repvit_m1", "mobilenetv4_conv_large",
    "convnext_nano", "fastvit_sa12", "efficientvit_m0", "inception_next_atto", "ghostnet_100", "mobilenetv2_100",
    "starnet_s1", "davit_tiny", "efficientformerv2_s0", "coatnet_pico_rw_224", "mobilevitv2_100", "mixnet_s",
)  # fmt: skip
THREADS = 2
WIDTH, TOP, BOTTOM, LEFT, RIGHT, NAMES_HEIGHT = 880, 64, 284, 116, 12, 130
#: Least number of bars between two names, so that slanted text does not overlap.
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
    return svg_chart(result, LIGHT)


def dark(result: Result) -> str:
    """The chart of the results of ``timm``, for dark pages."""
    return svg_chart(result, DARK)


def svg_chart(result: Result, theme: Theme, threads: int = THREADS) -> str:
    """A bar per model: time of plain PyTorch over ours, each in its faster layout, on a logarithmic axis from 1.

    Raises:
        ValueError: if nothing was measured on that number of threads.
    """
    gains = gains_of(by_threads(result).get(threads, []))
    if not gains:
        raise ValueError(f"expected results of {threads} threads, got none")
    # The axis ends at the next power of two, and begins at 1 or at the least, if that is lower.
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
    mean = mean_of(gains)
    parts += [
        _line(LEFT, WIDTH - RIGHT, height(mean), theme.mean, dashed=True),
        _text(LEFT + 6, height(mean) - 6, f"geometric mean {mean:.2f}×", theme.mean, weight=600),
        "</svg>",
    ]
    return "\n".join(parts)


def places_of_names(names: list[str]) -> set[int]:
    """The bars that are named: both ends, and models of `NAMED`, in that order, for which there is room."""
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


class Table(NamedTuple):
    """A table of a page, and the results it is made from."""

    file: str
    make: Callable[..., str]


README_TABLES = {"headline": Table("cpu-zen5-timm-2026-11-30.json", headline)}
TABLES = {
    "demo": Table("cpu-zen5-2threads-demo.json", demo),
    "operators": Table("cpu-zen5-2threads-quick.json", operators),
    "whole": Table("cpu-zen5-2threads-quick.json", whole),
    "family": Table("cpu-zen5-2threads-family-2026-11-30.json", against_pytorch),
    "training": Table("cpu-zen5-2threads-training-2026-11-30.json", against_pytorch),
    "growth": Table("cpu-zen5-2threads-quick.json", lambda result: growth_table(result.rows)),
    "record": Table("cpu-zen5-2threads-record.json", record),
    "memory": Table("cpu-zen5-2threads-memory.json", peak_memory),
    "timm": Table("cpu-zen5-timm-2026-11-30.json", timm),
    "timm, AVX2": Table("cpu-zen3-timm-2026-11-30.json", timm),
    "operators, AVX2": Table("cpu-zen3-2threads-quick-2026-11-30.json", operators),
    "whole, AVX2": Table("cpu-zen3-2threads-quick-2026-11-30.json", whole),
    "training, AVX2": Table("cpu-zen3-2threads-training-2026-11-30.json", against_pytorch),
}
#: The pages with tables.
PAGES = {ROOT / "README.md": README_TABLES, ROOT / "docs" / "results.md": TABLES}
#: Files that are written whole.
FILES = {
    RESULTS / "cpu-zen5-2threads-record.md": Table("cpu-zen5-2threads-record.json", goals.report),
    RESULTS / "cpu-zen5-timm-2026-11-30.md": Table("cpu-zen5-timm-2026-11-30.json", timm_models.report),
    RESULTS / "cpu-zen3-timm-2026-11-30.md": Table("cpu-zen3-timm-2026-11-30.json", timm_models.report),
    ROOT / "docs" / "pictures" / "speedup-light.svg": Table("cpu-zen5-timm-2026-11-30.json", light),
    ROOT / "docs" / "pictures" / "speedup-dark.svg": Table("cpu-zen5-timm-2026-11-30.json", dark),
}


def fresh(page: str, tables: dict[str, Table], folder: Path) -> str:
    """The text of a page with its tables written anew.

    Raises:
        ValueError: if the page lacks the place for a table, or has one for an unknown table.
    """
    places = re.findall(BEGIN.format("(.*?)"), page)
    if sorted(places) != sorted(tables):
        raise ValueError(f"expected a place for each of {', '.join(sorted(tables))}, got {', '.join(sorted(places))}")
    for name, table in tables.items():
        begin = BEGIN.format(name)
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the table '{name}' has no end")
        text = f"{begin}\n{made(table, folder)}\n{END}"
        page = pattern.sub(lambda _, text=text: text, page)  # type: ignore[misc]
    return page


def made(table: Table, folder: Path) -> str:
    """The text of a table."""
    text = (folder / table.file).read_text()
    return table.make(json.loads(text) if table.make is peak_memory else Result.from_json(text))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if ``--check`` found a table that differs from its results, 2 if something is missing."""
    parser = parser_of("tables", "Writes tables and chart of README and docs/results.md from the results of record.")
    parser.add_argument("--check", action="store_true", help="change nothing, and say what would change")
    options = parser.parse_args(argv)
    try:
        texts = {page: fresh(page.read_text(), tables, RESULTS) for page, tables in PAGES.items()}
        texts |= {path: f"{made(table, RESULTS)}\n" for path, table in FILES.items()}
    except (OSError, ValueError) as error:
        print(f"{error} (the tables are those of a source tree)", file=sys.stderr)
        return 2
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is not what its results say' if options.check else 'written'}")
        if not options.check:
            with replacing(path) as temporary:
                temporary.write_text(texts[path])
    if stale and options.check:
        print(f"python -m {__package__} tables writes them", file=sys.stderr)
        return 1
    return 0


def _measured(result: Result) -> str:
    return f"Measured on {machine_line(result.machine)}."


def _ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}×" if ratio >= 1 else f"{SLOWER} {ratio:.2f}×"


def _against_best(row: Row, result: Result) -> tuple[str, str, str, str]:
    """Our milliseconds, share of the roofline, the fastest baseline, and its time over ours."""
    ours, baseline = row.measurement(OURS), row.best_baseline()
    if ours is None:
        return ("-",) * 4
    theirs = row.measurement(baseline) if baseline else None
    name = f"{baseline} {WRONG}" if theirs and not theirs.passed else baseline or "-"
    share = share_text(row, ours, Roofs.of(result.machine))
    return f"{ours.median_ms:.3f}", share, name, _ratio_text(row.ratio(baseline) if baseline else None)
