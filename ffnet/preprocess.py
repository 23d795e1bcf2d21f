"""Evaluation preprocessing of a model's ``config``: photograph → normalised tensor. Needs Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["load_image", "preprocess"]


def load_image(path: str | PathLike[str]) -> Image.Image:
    """Reads a picture as RGB.

    Raises:
        OSError: If it cannot be read, or is no picture Pillow knows.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what decoders raise on broken files
        raise OSError(f"broken picture: {error}") from error


def preprocess(image: Image.Image, config: Mapping[str, Any], size: int | None = None) -> Tensor:
    """An RGB picture as the published accuracies are measured with: [3, S, S], float32.

    The shorter side is resized to ``floor(S / crop_pct)`` with an antialiasing filter, the centre S×S is cut out, and
    each channel is normalised.

    Args:
        image: The picture.
        config: ``model.config``: ``crop_pct``, ``interpolation``, ``mean``, ``std``, ``input_size``.
        size: S; by default that of ``config``.
    """
    size = config["input_size"][-1] if size is None else size
    image = _resized(image, math.floor(size / config["crop_pct"]), config["interpolation"])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(config["mean"])) / torch.tensor(config["std"])).permute(2, 0, 1).contiguous()


def _resized(image: Image.Image, shorter: int, interpolation: str) -> Image.Image:
    side = min(image.size)
    size = (int(shorter * image.width / side), int(shorter * image.height / side))
    return image if size == image.size else image.resize(size, Image.Resampling[interpolation.upper()])
