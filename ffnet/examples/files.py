"""Shared by the examples: options, and the files that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from ..commands.common import new_file

__all__ = ["parser_of", "save", "started"]


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of an example, with ``--seed`` and ``--out``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m ffnet.examples.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    text = "folder of result.json, picture.png and, of most examples, model.pth (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("build") / name, metavar="FOLDER", help=text)
    return parser


def started(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options, makes the folder and seeds random numbers."""
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)  # so that it fails before minutes of training
    torch.manual_seed(options.seed)
    return options


def save(
    folder: Path, result: dict[str, Any], write_picture: Callable[[IO[bytes]], Any], model: nn.Module | None = None
) -> None:
    """Writes result.json, picture.png and, of a model, model.pth into a folder, and says so."""
    with new_file(folder / "result.json") as file:
        file.write(f"{json.dumps(result, indent=2)}\n".encode())
    with new_file(folder / "picture.png") as file:
        write_picture(file)
    if model is not None:
        with new_file(folder / "model.pth") as file:
            torch.save({"state_dict": model.state_dict()}, file)
    print(f"wrote result.json, picture.png{' and model.pth' if model is not None else ''} to {folder}")
