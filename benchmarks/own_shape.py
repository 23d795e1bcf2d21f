"""``--shape 320x16x16 --kernel 7``: operators on maps of the user's own, in place of a suite."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from .cases import OPERATORS, Case, OperatorCase
from .suites import DIRECTIONS, LAYOUTS
from .text import chosen, positive

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_KERNEL, DEFAULT_BATCH = 7, 1
#: Where results and chart go if nothing else is said.
FOLDER = Path("bench")


class Shape(NamedTuple):
    """A map of an image."""

    channels: int
    height: int
    width: int

    @property
    def case_width(self) -> int | None:
        """The width as `OperatorCase` has it: None for a square map."""
        return None if self.width == self.height else self.width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; all but ``--shape`` ask for it."""
    group = parser.add_argument_group(
        "maps of your own", f"--shape in place of --suite; results and chart go to --out (default: {FOLDER})"
    )
    group.add_argument("--shape", type=shapes, metavar="CxHxW", help="of one image, such as 320x16x16; or several: A,B")
    group.add_argument("--kernel", type=numbers, metavar="K,K", help=f"filter sizes (default: {DEFAULT_KERNEL})")
    group.add_argument("--batch", type=numbers, metavar="N,N", help=f"images in a call (default: {DEFAULT_BATCH})")
    for option, known, default in (
        ("operator", tuple(OPERATORS), "all"),
        ("dtype", DTYPES, DTYPES[0]),
        ("layout", LAYOUTS, LAYOUTS[0]),
        ("direction", DIRECTIONS, DIRECTIONS[0]),
    ):
        group.add_argument(
            f"--{option}",
            type=functools.partial(chosen, known=known),
            metavar="NAME,NAME",
            help=f"some of {', '.join(known)}, or 'all' (default: {default})",
        )


def cases(options: argparse.Namespace) -> list[Case]:
    """A case for each combination of what was asked for; none where there is no ``--shape``.

    Raises:
        ValueError: for options of shapes without a shape.
    """
    if options.shape is None:
        names = ("kernel", "batch", "operator", "dtype", "layout", "direction")
        if given := [f"--{name}" for name in names if getattr(options, name) is not None]:
            raise ValueError(f"expected --shape with {', '.join(given)}, such as --shape 320x16x16")
        return []
    return [
        OperatorCase(
            operator, batch, shape.channels, shape.height, kernel, layout, dtype, direction, width=shape.case_width
        )
        for dtype, shape, kernel, batch, operator, layout, direction in itertools.product(
            options.dtype or DTYPES[:1],
            options.shape,
            options.kernel or (DEFAULT_KERNEL,),
            options.batch or (DEFAULT_BATCH,),
            options.operator or tuple(OPERATORS),
            options.layout or LAYOUTS[:1],
            options.direction or DIRECTIONS[:1],
        )
    ]


def shapes(text: str) -> tuple[Shape, ...]:
    """Raises argparse's error for anything but maps CxHxW."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)[x×*](\d+)[x×*](\d+)", part.strip())
        sizes = tuple(map(int, match.groups())) if match else (0,)
        if min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"expected channels x height x width, such as 320x16x16, got {part!r}")
        found.append(Shape(*sizes))
    return tuple(dict.fromkeys(found))


def numbers(text: str) -> tuple[int, ...]:
    """Raises argparse's error for anything but positive integers with commas between."""
    return tuple(dict.fromkeys(positive(part.strip()) for part in text.split(",")))
