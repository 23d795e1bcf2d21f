"""Shared by commands: errors, models, pictures, and files that are written atomically."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
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
    "input_size_of",
    "labels_from",
    "model_arguments",
    "model_from",
    "model_of",
    "new_file",
    "picture_from",
    "require_place",
]

#: Characters of a file's name that the name of its part begins with, so that it is not too long for a file system.
PART_NAME = 40


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
        CommandError: If the model is unknown or for another task, the checkpoint cannot be read or does not fit, or the
            model of a task does not take pictures of 3 channels.
    """
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
        model = _folded_with(create_model(options.model, **kwargs), options.checkpoint)
    except (OSError, ValueError, ImportError, TypeError) as error:  # TypeError: an unknown keyword
        raise CommandError(one_line(error)) from error
    if task is not None and model.config["input_size"][0] != 3:
        raise CommandError(f"expected a model of 3 channels, as pictures have; got {model.config['input_size'][0]}")
    return model


def model_of(checkpoint: Path, build: Callable[[dict[str, Any]], nn.Module]) -> Any:
    """Builds a model from a checkpoint's state dict, in eval mode, with its weights, and folded.

    Raises:
        CommandError: If the checkpoint cannot be read, or belongs to another kind of model.
    """
    from ..checkpoint import read_state_dict

    try:
        return _folded_with(build(read_state_dict(checkpoint)), checkpoint)
    except (OSError, ValueError, ImportError) as error:
        text = one_line(error)
        raise CommandError(text if str(checkpoint) in text else f"{checkpoint}: {text}") from error


def _folded_with(model: nn.Module, checkpoint: Path | None) -> Any:
    """A model in eval mode, folded, with the weights of a checkpoint, which may be those as trained or folded ones."""
    from ..checkpoint import load_checkpoint, read_state_dict
    from ..folding import reparameterize

    model.eval()
    if checkpoint is not None:
        keys = read_state_dict(checkpoint).keys()
        if keys != model.state_dict().keys():
            forms = (reparameterize(model, extra_folds=extra_folds) for extra_folds in (True, False))
            model = next((form for form in forms if form.state_dict().keys() == keys), model)
        load_checkpoint(model, checkpoint)
    return reparameterize(model)


def input_size_of(model: Any, side: int | None) -> tuple[int, ...]:
    """The shape of one input, with ``--size`` in place of a picture's own sides.

    Raises:
        CommandError: If there is a ``--size``, but the model takes no pictures.
    """
    size = tuple(model.config["input_size"])
    if side is None:
        return size
    if len(size) != 3:
        raise CommandError("expected no --size, as the model takes series; --model-arguments sets what they are like")
    return size[0], side, side


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


def require_place(path: Path) -> None:
    """Checks that `new_file` can write a file, for commands that would learn it after minutes of work.

    Raises:
        CommandError: If its folder is missing or not writable, or it is a folder itself.
    """
    if path.is_dir():
        raise CommandError(f"cannot write {path}: Is a directory")
    if not path.parent.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) and not _is_special(path):
        raise CommandError(f"cannot write {path}: its folder is not writable")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, which replaces an existing one only once it is complete and on the disk.

    What a link names is replaced, not the link; an existing file's permissions stay. A device or a pipe is written to.

    Raises:
        CommandError: If it cannot be written.
    """
    try:
        if _is_special(path):
            with path.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        part = target.with_name(f".{target.name[:PART_NAME]}.{os.getpid()}.part")
        try:
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.is_file():
                shutil.copymode(target, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error


def _is_special(path: Path) -> bool:
    """Whether there is something that cannot be replaced, such as ``/dev/stdout``."""
    return path.exists() and not path.is_file() and not path.is_dir()
