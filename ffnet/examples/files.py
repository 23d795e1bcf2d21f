"""Shared by the examples: options, and the files that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
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
    folder: Path,
    result: dict[str, Any],
    write_picture: Callable[[IO[bytes]], Any],
    model: nn.Module | None = None,
    inputs: Mapping[str, Callable[[IO[bytes]], Any]] | None = None,
) -> None:
    """Writes result.json, picture.png and, of a model, model.pth and inputs to try it on into a folder, and says so."""
    files: dict[str, Callable[[IO[bytes]], Any]] = {
        "result.json": lambda file: file.write(f"{json.dumps(result, indent=2)}\n".encode()),
        "picture.png": write_picture,
    }
    if model is not None:
        files["model.pth"] = lambda file: torch.save({"state_dict": model.state_dict()}, file)
    files |= inputs or {}
    for name, write in files.items():
        with new_file(folder / name) as file:
            write(file)
    print(f"wrote {', '.join(files)} to {folder}")
