"""FFNet-Seg learns to tell five photographs apart by their texture: ``python -m ffnet.examples.segment_textures``.

Each input is a mosaic of random cells, and each cell shows a piece of one of five photographs, so the mask is exact.
Pictures are grey and each has the same mean and contrast, so that colour gives nothing away. Training uses the left
halves; reported scores are for mosaics of the right halves, which are held out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..commands.segment import as_picture
from ..registry import create_model
from .files import parser_of, save, started
from .photographs import grey, photograph

CLASSES = {
    "brick": ("scikit-image", "brick.png"),
    "grass": ("scikit-image", "grass.png"),
    "gravel": ("scikit-image", "gravel.png"),
    "temple": ("scikit-learn", "china.jpg"),
    "flower": ("scikit-learn", "flower.jpg"),
}
SIDE, CELLS, BATCH = 128, 5, 8
MODEL: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (16, 32, 64, 128),
    "stem_width": 16,
    "in_chans": 1,
    "num_classes": len(CLASSES),
    "head": {"width": 64, "align_width": 128, "blocks": 1},
}
TESTS = 64


def halves() -> tuple[list[Tensor], list[Tensor]]:
    """The left and the right half of each photograph."""
    pictures = [grey(photograph(*where)) for where in CLASSES.values()]
    return [p[..., : p.shape[-1] // 2] for p in pictures], [p[..., p.shape[-1] // 2 :] for p in pictures]


def mosaics(pieces: Sequence[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mosaics of photographs [N, 1, SIDE, SIDE] and the class of each pixel [N, SIDE, SIDE]."""

    def integer(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    images, masks = [], []
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for _ in range(count):
        centres = torch.randint(SIDE, (2, CELLS, 1, 1), generator=generator)
        nearest = ((rows - centres[0]) ** 2 + (columns - centres[1]) ** 2).argmin(0)
        classes = torch.randint(len(pieces), (CELLS,), generator=generator)
        mask = classes[nearest]
        crops = []
        for piece in pieces:
            top, left = integer(piece.shape[1] - SIDE + 1), integer(piece.shape[2] - SIDE + 1)
            crop = piece[0, top : top + SIDE, left : left + SIDE]
            crops.append(crop.flip(1) if integer(2) else crop)
        images.append(torch.stack(crops).gather(0, mask[None]))
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def train(model: nn.Module, pieces: Sequence[Tensor], steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        images, masks = mosaics(pieces, BATCH, generator)
        gain = 0.8 + 0.4 * torch.rand(BATCH, 1, 1, 1, generator=generator)
        logits = F.interpolate(model(images * gain), (SIDE, SIDE), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def score(model: Any, images: Tensor, masks: Tensor) -> dict[str, Any]:
    """Pixel accuracy, and intersection over union of each class and on average."""
    model.eval()
    found = torch.cat([model.predict(batch) for batch in images.split(BATCH)])
    count = len(CLASSES)
    confusion = torch.bincount(masks.flatten() * count + found.flatten(), minlength=count**2).reshape(count, count)
    correct = confusion.diag()
    union = correct / (confusion.sum(0) + confusion.sum(1) - correct)
    return {
        "pixel accuracy": correct.sum().item() / confusion.sum().item(),
        "mean IoU": union.mean().item(),
        "IoU": dict(zip(CLASSES, union.tolist(), strict=True)),
    }


def by_brightness(pieces: Sequence[Tensor], images: Tensor, masks: Tensor) -> float:
    """Accuracy without a model: each pixel is assigned to the photograph in which its brightness is most common."""

    def level(x: Tensor) -> Tensor:
        return (x * 16 + 64).clamp(0, 127).long()

    shares = torch.stack([level(p).flatten().bincount(minlength=128) / p.numel() for p in pieces])
    return (shares[:, level(images[:, 0])].argmax(0) == masks).double().mean().item()


@torch.no_grad()
def picture(model: Any, images: Tensor, masks: Tensor) -> Any:
    """Inputs, true masks and predicted ones, above each other."""
    from PIL import Image

    model.eval()
    rows = [
        [Image.fromarray((x[0] * 48 + 128).clamp(0, 255).byte().numpy()) for x in images],
        [as_picture(mask + 1) for mask in masks],
        [as_picture(mask + 1) for mask in model.predict(images)],
    ]
    gap = 4
    sheet = Image.new("RGB", ((SIDE + gap) * len(images) - gap, (SIDE + gap) * len(rows) - gap), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile.convert("RGB"), ((SIDE + gap) * j, (SIDE + gap) * i))
    return sheet


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("segment_textures", __doc__)
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    options = started(parser, argv)
    generator = torch.Generator().manual_seed(options.seed)
    left, right = halves()
    model = create_model("ffnet_seg_ade20k", **MODEL)
    began = time.perf_counter()
    train(model, left, options.steps, generator)
    seconds = time.perf_counter() - began
    images, masks = mosaics(right, TESTS, torch.Generator().manual_seed(options.seed + 1))
    result = {
        "steps": options.steps,
        "seconds": round(seconds),
        "held-out halves": score(model, images, masks),
        "halves trained on": score(model, *mosaics(left, TESTS, torch.Generator().manual_seed(options.seed + 2))),
        "pixel accuracy by brightness alone": by_brightness(left, images, masks),
    }
    print(json.dumps(result, indent=2))
    sheet = picture(model, images[:5], masks[:5])
    save(options.out, result, lambda file: sheet.save(file, format="png"), model)
    return result


if __name__ == "__main__":
    main()
