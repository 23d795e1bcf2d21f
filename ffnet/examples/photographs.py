"""Photographs that scikit-learn and scikit-image ship, read from their folders without importing the packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["grey", "photograph"]

_FOLDERS = {"scikit-learn": ("sklearn", "datasets/images"), "scikit-image": ("skimage", "data")}


def photograph(package: str, name: str) -> Any:
    """A picture that a package ships, as RGB. Ends the program with one line if the package is not installed."""
    module, folder = _FOLDERS[package]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        sys.exit(f"the pictures of {package} are needed: pip install 'ffnet-kernels[examples]' brings them")
    from ..preprocess import load_image

    return load_image(Path(found.origin).parent / folder / name)


def grey(image: Any) -> Tensor:
    """A picture's brightness, normalised to mean 0 and standard deviation 1: [1, H, W]."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))[None]
    return (pixels - pixels.mean()) / pixels.std()
