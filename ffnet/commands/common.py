"""Shared by commands: errors, models, pictures, and files that are written atomically."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..registry import create_model, list_models, model_entry

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

__all__ = [
    "CommandError",
    "add_model_options",
    "labels_from",
    "model_arguments",
    "model_from",
    "model_of",
    "new_file",
    "picture_from",
]


class CommandError(Exception):
    """An error that the user can fix; printed as one line, without a traceback."""


def add_model_options(parser: argparse.ArgumentParser, task: str | None, *, trained: bool = True) -> None:
    """Adds ``--model``, restricted to a task, ``--model-arguments``, ``--checkpoint`` and ``--classes``; for trained
    models ``--labels``, too."""
    parser.add_argument("--model", required=True, metavar="NAME", help=f"one of {', '.join(list_models(task))}")
    parser.add_argument("--model-arguments", default="{}", metavar="JSON", help="those of its class that differ")
    weights = "trained weights" if trained else "trained weights; default: random ones"
    parser.add_argument("--checkpoint", type=Path, required=trained, metavar="FILE", help=weights)
    parser.add_argument("--classes", type=int, metavar="N", help="classes of the checkpoint; default: the model's own")
    if trained:
        parser.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one a line")


def model_from(options: argparse.Namespace, task: str | None, **kwargs: Any) -> Any:
    """Builds the model that the options of `add_model_options` select, in eval mode, with its checkpoint's weights, and
    folded.

    Raises:
        CommandError: If the model is unknown or for another task, or the checkpoint cannot be read or does not fit.
    """
    from ..folding import reparameterize

    try:
        entry = model_entry(options.model)
    except ValueError as error:
        raise CommandError(f"unknown model: {error}") from error
    if task not in (None, entry.task):
        raise CommandError(f"expected a model for {task}, one of {', '.join(list_models(task))}; got {options.model}")
    kwargs |= model_arguments(options.model_arguments)
    if options.classes is not None:
        if options.classes < 1:
            raise CommandError(f"expected --classes of 1 or more, got {options.classes}")
        kwargs["num_classes"] = options.classes
    try:
        model = create_model(options.model, checkpoint=options.checkpoint, **kwargs)
    except (OSError, ValueError, ImportError, TypeError) as error:  # TypeError: an unknown keyword
        raise CommandError(one_line(error)) from error
    if model.config["input_size"][0] != 3:
        raise CommandError(f"expected a model of 3 channels, as pictures have; got {model.config['input_size'][0]}")
    return reparameterize(model.eval())


def model_of(checkpoint: Path, build: Callable[[dict[str, Any]], nn.Module]) -> Any:
    """Builds a model from a checkpoint's state dict, in eval mode, with its weights, and folded.

    Raises:
        CommandError: If the checkpoint cannot be read, or belongs to another kind of model.
    """
    from ..checkpoint import load_checkpoint, read_state_dict
    from ..folding import reparameterize

    try:
        model = build(read_state_dict(checkpoint))
        load_checkpoint(model, checkpoint)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(one_line(error)) from error
    return reparameterize(model.eval())


def one_line(error: Exception) -> str:
    """The message of an error, in one line."""
    return "; ".join(line.strip() for line in str(error).splitlines())


def model_arguments(text: str) -> dict[str, Any]:
    """Parses ``--model-arguments``.

    Raises:
        CommandError: If they are not a JSON object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CommandError(f"--model-arguments: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CommandError(f"--model-arguments: expected an object, such as {{}}, got {text}")
    return found


def picture_from(path: Path) -> Image:
    """Reads a picture as RGB, see `ffnet.preprocess.load_image`.

    Raises:
        CommandError: If it cannot be read or Pillow is not installed.
    """
    try:
        from ..preprocess import load_image
    except ModuleNotFoundError as error:
        raise CommandError(f"{error} (pip install 'ffnet-kernels[demo]' brings what it needs)") from error
    try:
        return load_image(path)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from error


def labels_from(path: Path | None, classes: int) -> list[str]:
    """Reads class names from a text file, one a line; without a file, their numbers.

    Raises:
        CommandError: If the file cannot be read or has the wrong number of lines.
    """
    if path is None:
        return [f"class {i}" for i in range(classes)]
    try:
        labels = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(labels) != classes:
        raise CommandError(f"{path}: expected {classes} lines, one a class, got {len(labels)}")
    return labels


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, which replaces an existing one only once it is complete.

    Raises:
        CommandError: If it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("xb") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
