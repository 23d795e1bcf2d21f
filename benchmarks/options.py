"""Shared by the command lines: parsers, and types of options."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable

#: What a user wrote to get here, for usage and errors: ``ffnet-kernels bench`` is another name.
program = f"python -m {__package__}"


def parser_of(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{program} {command}", description=description, epilog=epilog)


def numbers(text: str) -> tuple[int, ...]:
    """Raises argparse's error for anything but positive integers with commas between."""
    return tuple(dict.fromkeys(positive(part.strip()) for part in text.split(",")))


def positive(text: str) -> int:
    """An option's integer, 1 or more. Raises argparse's error for anything else."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def names(text: str) -> tuple[str, ...]:
    """The names between commas, without duplicates."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def some_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option: names of those known, with commas between, or ``all``."""
    return functools.partial(_chosen, known=tuple(known))


def _chosen(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    found = known if text == "all" else names(text)
    unknown = [name for name in found if name not in known]
    if unknown or not found:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {next(iter(unknown), text)!r}")
    return found
