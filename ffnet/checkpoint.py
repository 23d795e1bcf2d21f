"""Loads checkpoints into a model, and reports exactly what does not fit."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["KeyReport", "load_checkpoint", "read_state_dict"]

# Averaged weights first, as published accuracies are measured with those.
CONTAINER_KEYS = ("state_dict_ema", "state_dict", "model")
PREFIX = "module."
SHOWN = 8


class KeyReport(NamedTuple):
    """Keys that the checkpoint lacks, keys that the model lacks, and keys whose shapes differ."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def __str__(self) -> str:
        return "; ".join(
            f"{len(keys)} {kind}: {_shortened(keys)}" for kind, keys in zip(self._fields, self, strict=True) if keys
        )


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True, prefix: str = ""
) -> KeyReport:
    """Loads a checkpoint file into ``model``.

    The file holds a state dict, bare or under ``state_dict_ema``, ``state_dict`` or ``model`` (the first of these that
    is there), with or without a ``module.`` prefix on all keys. It is read without running pickled code; a name ending
    in ``.safetensors`` is read with safetensors. Tensors are cast to the dtype and device of the model's.

    Args:
        model: The model, changed only if the checkpoint is accepted.
        path: The file.
        strict: Accept only exactly the model's keys and shapes. Otherwise load those that fit and leave the rest.
        prefix: Prefix of the keys to read, such as ``"backbone."`` to load a detector's checkpoint into its backbone.

    Returns:
        The keys that do not fit, all three lists empty if ``strict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint, if its keys or shapes differ from the model's with ``strict``, or
            if nothing fits.
        ImportError: If the file needs safetensors, which is not installed.
    """
    loaded, own = read_state_dict(path), model.state_dict()
    loaded = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
    report = KeyReport(
        missing=[key for key in own if key not in loaded],
        unexpected=[key for key in loaded if key not in own],
        mismatched=[key for key in own if key in loaded and own[key].shape != loaded[key].shape],
    )
    fitting = {key: loaded[key] for key in own if key in loaded and key not in report.mismatched}
    if any(report) and (strict or not fitting):
        shapes = "".join(
            f"\n  {key}: expected {list(own[key].shape)}, got {list(loaded[key].shape)}"
            for key in report.mismatched[:SHOWN]
        )
        raise ValueError(f"{path} does not fit {type(model).__name__}: {report}{shapes}")
    model.load_state_dict(fitting, strict=False)
    return report


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a checkpoint file, found and read as by `load_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint.
        ImportError: If the file needs safetensors, which is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    return _state_dict(_read(path), path)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs the safetensors package") from error
        read: Any = load_file
    else:
        read = _torch_load
    try:
        return read(path)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """In place of PyTorch's advice to read without ``weights_only``."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error)
    kind = re.search(r"GLOBAL (\S+)", str(error))
    return "expected what torch.save wrote, tensors and plain values" + (f", got {kind[1]} in it" if kind else " only")


def _torch_load(path: Path) -> Any:
    # Training scripts store their parsed arguments beside the weights; a namespace is inert.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        content = next((content[key] for key in CONTAINER_KEYS if content.get(key)), content)
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, bare or under one of {', '.join(CONTAINER_KEYS)}"
        )
    prefix = PREFIX if all(key.startswith(PREFIX) for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _shortened(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
