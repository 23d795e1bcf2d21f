"""Models and teachers of a run, by name and checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoint as checkpoints
from ..model import FFNet
from ..registry import create_model, list_models

__all__ = ["PRESETS", "build_model", "build_teacher", "checkpoint_file", "model_names", "recorded"]

# Models for small pictures, for examples and tests; not from the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "ffnet_tiny": {
        "depths": (1, 1, 2, 1),
        "dims": (24, 48, 96, 192),
        "token_kernels": (3, 3, 7, 7),
        "channel_kernel": 3,
        "stem_width": 16,
        "config": {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"},
    },
}
WEIGHTS = ("best.pth", "last.pth")


def model_names() -> list[str]:
    return [*list_models("classification"), *PRESETS]


def build_model(name: str, classes: int, *, checkpoint: str | None = None, drop_path: float | None = None) -> FFNet:
    """Builds a classifier with a checkpoint's weights; a head for other classes is initialised anew.

    Raises:
        ValueError: If there is no such model, or the checkpoint belongs to another one.
        FileNotFoundError: If there is no such checkpoint.
    """
    if name not in model_names():
        raise ValueError(f"expected --model of {', '.join(model_names())}, got {name!r}")
    options: dict[str, Any] = {"num_classes": classes}
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    model = FFNet(**{**PRESETS[name], **options}) if name in PRESETS else create_model(name, **options)
    if checkpoint is not None:
        _load_but_for_the_head(model, checkpoint_file(checkpoint))
    return model


def checkpoint_file(path: str) -> Path:
    """The checkpoint file; for the folder of a run, its best weights, or otherwise its last ones.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    where = Path(path)
    if not where.is_dir():
        return where
    found = next((where / name for name in WEIGHTS if (where / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no {' or '.join(WEIGHTS)} in {where}")
    return found


def recorded(path: str) -> dict[str, Any]:
    """The metadata that `ffnet train` stores with weights: model, classes, size; empty for other files."""
    file = checkpoint_file(path)
    if not file.is_file() or file.suffix == ".safetensors":
        return {}
    content = checkpoints._read(file)
    recipe = content.get("recipe") if isinstance(content, dict) else None
    return dict(recipe) if isinstance(recipe, dict) else {}


def build_teacher(name: str, classes: int, checkpoint: str | None) -> nn.Module:
    """Builds a teacher for distillation: ``timm/<name>`` with its published weights or a file's, or a model of ffnet.

    Raises:
        ValueError: If its number of classes differs, or a model of ffnet is given without weights.
        ImportError: If timm is needed but not installed.
    """
    if name.startswith("timm/"):
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"the teacher {name} needs timm, which is not installed") from error
        teacher = timm.create_model(
            name[len("timm/") :], pretrained=checkpoint is None, checkpoint_path=checkpoint or ""
        )
    else:
        if checkpoint is None:
            raise ValueError(f"expected --teacher-checkpoint for {name}; only timm's models bring weights")
        teacher = build_model(name, recorded(checkpoint).get("classes", classes))
        checkpoints.load_checkpoint(teacher, checkpoint_file(checkpoint))
    known = getattr(teacher, "num_classes", None) or getattr(teacher.get_classifier(), "out_features", classes)
    if known != classes:
        raise ValueError(f"expected a teacher of {classes} classes, as the data has, got {name} of {known}")
    return teacher.eval().requires_grad_(False)


def _load_but_for_the_head(model: FFNet, path: str | os.PathLike[str]) -> None:
    report = checkpoints.load_checkpoint(model, path, strict=False)
    others = [key for keys in report for key in keys if not key.startswith("head.")]
    if others:
        raise ValueError(f"{path} is not a checkpoint of this model: {report}")
    if any(report) and int(os.environ.get("RANK", "0")) == 0:
        print(f"ffnet train: the head starts anew: {report}", file=sys.stderr)
