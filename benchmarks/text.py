"""Text in and out: numbers of options; tables that read as text and render as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def positive(text: str) -> int:
    """An option's integer, 1 or more. Raises argparse's error for anything else."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def chosen(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """An option's names, each once: some of those known, with commas between, or ``all``. Raises argparse's error for
    others."""
    names = tuple(known) if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {next(iter(unknown), text)!r}")
    return tuple(dict.fromkeys(names))


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """An aligned Markdown table, columns right-aligned but those in ``left``."""
    widths = [max(3, *(len(line[i]) for line in (headers, *lines))) for i in range(len(headers))]

    def format_line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([format_line(headers), f"|{rule}|", *map(format_line, lines)])
