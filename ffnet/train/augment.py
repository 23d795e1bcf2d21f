"""Random changes of training images: torchvision's transforms v2 where it is installed.

Otherwise random crop, flip, erasing, mixup and cutmix are done in Pillow and plain PyTorch, without RandAugment.
Evaluation uses `ffnet.preprocess` everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..preprocess import preprocess
from .options import TrainOptions

__all__ = ["Mixer", "eval_transform", "has_torchvision", "train_transform"]

RATIO = 3 / 4, 4 / 3  # of the sides of crops
ERASED = 0.02, 1 / 3  # share of the area
CROP_ATTEMPTS = 10


@functools.cache
def has_torchvision() -> bool:
    """Whether torchvision is installed and works with this torch; builds for another torch do not."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision.transforms.v2  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def eval_transform(config: Mapping[str, Any], size: int) -> Callable[[Image.Image], Tensor]:
    """`ffnet.preprocess` at one size."""
    return functools.partial(preprocess, config=config, size=size)


def train_transform(options: TrainOptions, config: Mapping[str, Any], size: int) -> Callable[[Image.Image], Tensor]:
    """Transform from an RGB picture to [3, size, size], normalised; random numbers come from torch.

    Raises:
        ImportError: If RandAugment is asked for and torchvision is not available.
    """
    if has_torchvision():
        return _with_torchvision(options, config, size)
    if options.rand_augment:
        raise ImportError(
            "RandAugment needs a torchvision that fits this torch: install it, or train with --rand-augment 0"
        )
    return PlainTransform(options, config, size)


def _with_torchvision(options: TrainOptions, config: Mapping[str, Any], size: int) -> Callable[[Image.Image], Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    fill = [round(255 * mean) for mean in config["mean"]]
    interpolation = InterpolationMode(config["interpolation"])
    steps: list[Any] = [
        v2.RandomResizedCrop(size, scale=(options.crop, 1), ratio=RATIO, interpolation=interpolation, antialias=True)
    ]
    if options.flip:
        steps.append(v2.RandomHorizontalFlip(options.flip))
    if options.rand_augment:
        steps.append(v2.RandAugment(magnitude=options.rand_augment, fill=fill))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    if options.erasing:
        steps.append(v2.RandomErasing(options.erasing, scale=ERASED, value="random"))
    steps.append(v2.ToPureTensor())
    return v2.Compose(steps)


class PlainTransform:
    """Random crop, flip and erasing without torchvision."""

    def __init__(self, options: TrainOptions, config: Mapping[str, Any], size: int) -> None:
        self.crop, self.flip, self.erasing, self.size = options.crop, options.flip, options.erasing, size
        self.filter = Image.Resampling[config["interpolation"].upper()]
        self.mean = torch.tensor(config["mean"])[:, None, None]
        self.std = torch.tensor(config["std"])[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        left, top, width, height = _random_box(image.width, image.height, (self.crop, 1), fallback_to_all=True)
        image = image.resize((self.size, self.size), self.filter, box=(left, top, left + width, top + height))
        if torch.rand(()) < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
        pixels = ((pixels - self.mean) / self.std).contiguous()
        if torch.rand(()) < self.erasing:
            left, top, width, height = _random_box(self.size, self.size, ERASED)
            pixels[:, top : top + height, left : left + width] = torch.randn(3, height, width)
        return pixels


def _random_box(
    width: int, height: int, share: tuple[float, float], fallback_to_all: bool = False
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a box with a random share of the area and random proportions."""
    low, high = (math.log(side) for side in RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * torch.empty(()).uniform_(*share).item()
        ratio = math.exp(torch.empty(()).uniform_(low, high).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            return left, int(torch.randint(height - h + 1, ())), w, h
    return (0, 0, width, height) if fallback_to_all else (0, 0, 0, 0)


class Mixer:
    """Mixup or cutmix of a batch, chosen at random if both are enabled.

    ``mixer(images [N, C, H, W], labels [N])`` returns images and targets: the labels if nothing is mixed, otherwise
    probabilities [N, classes].
    """

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        self.alphas = [("mixup", mixup)] * (mixup > 0) + [("cutmix", cutmix)] * (cutmix > 0)
        self.classes = classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.alphas or len(images) < 2:
            return images, labels
        kind, alpha = self.alphas[int(torch.randint(len(self.alphas), ()))]
        if has_torchvision():
            from torchvision.transforms import v2

            return (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=alpha, num_classes=self.classes)(images, labels)
        kept = torch.distributions.Beta(alpha, alpha).sample().item()
        others = images.roll(1, 0)
        if kind == "mixup":
            images = others.lerp(images, kept)
        else:
            height, width = images.shape[-2:]
            y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
            h, w = (int(side * math.sqrt(1 - kept) / 2) for side in (height, width))  # half a side of the patch
            top, bottom, left, right = max(y - h, 0), min(y + h, height), max(x - w, 0), min(x + w, width)
            images = images.clone()
            images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
            kept = 1 - (bottom - top) * (right - left) / (height * width)
        targets = torch.nn.functional.one_hot(labels, self.classes).to(images.dtype)
        return images, targets.roll(1, 0).lerp(targets, kept)
