"""Evaluation preprocessing of a model's ``config``: photograph → normalised tensor. Needs Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["load_image", "normalised", "preprocess", "resized"]

#: Formats whose grey of 16 bits some versions of Pillow, or all, read as 32 bits.
SIXTEEN_BITS = ("PNG", "PPM")
#: Sides of longer pictures are cut to this ratio before they are resized, for a strip a pixel wide becomes a huge map.
LONGEST = 16


def load_image(path: str | PathLike[str] | IO[bytes]) -> Image.Image:
    """Reads a picture, from a path or an open file, as RGB, rotated according to its EXIF orientation.

    Palettes, CMYK and grey are converted to RGB. Of 16 bits the upper 8 are used; transparent pixels are blended with
    white; of an animation the first frame is read.

    Raises:
        OSError: If it cannot be read, is not a picture that Pillow knows, or has floating-point or 32-bit pixels, whose
            range is unknown.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "I" and image.format not in SIXTEEN_BITS:
                raise OSError("expected 8 or 16 bits a channel, got 32")
            return _as_rgb(ImageOps.exif_transpose(image))
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # raised by decoders for broken files
        raise OSError(f"broken picture: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise OSError("expected 8 or 16 bits a channel, got floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, config: Mapping[str, Any], size: int | None = None) -> Tensor:
    """Preprocesses an RGB picture as for the published accuracies: [3, S, S], float32.

    The shorter side is resized to ``floor(S / crop_pct)`` with an antialiasing filter, the centre S×S is cut out, and
    each channel is normalised. (Of pictures more than 16 times as long as wide, the middle is cut out first.)

    Args:
        image: The picture.
        config: ``model.config``: ``crop_pct``, ``interpolation``, ``mean``, ``std``, ``input_size``.
        size: S; by default the size in ``config``.
    """
    size = config["input_size"][-1] if size is None else size
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:
        image = _middle(image, min(image.width, longest), min(image.height, longest))
    image = resized(image, math.floor(size / config["crop_pct"]), config["interpolation"])
    return normalised(_middle(image, size, size), config)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalised(image: Image.Image, config: Mapping[str, Any]) -> Tensor:
    """A whole RGB picture, each channel normalised according to ``config``: [3, H, W], float32."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(config["mean"])) / torch.tensor(config["std"])).permute(2, 0, 1).contiguous()


def resized(image: Image.Image, shorter: int, interpolation: str) -> Image.Image:
    """Resizes a picture to a shorter side of ``shorter`` pixels, with an antialiasing filter."""
    side = min(image.size)
    size = (int(shorter * image.width / side), int(shorter * image.height / side))
    return image if size == image.size else image.resize(size, Image.Resampling[interpolation.upper()])
