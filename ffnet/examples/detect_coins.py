"""A torchvision detector on an FFNet backbone learns to find coins: ``python -m ffnet.examples.detect_coins``.

The photograph ``coins.png`` of scikit-image shows 24 Greek coins in four rows; the boxes below were drawn by hand. Six
pieces of the first three rows are overfitted; the fourth row is held out. Needs torchvision.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .files import parser_of, save, started
from .photographs import grey, photograph

#: left, top, right, bottom of each coin, row by row.
COINS = (
    (22, 34, 67, 74), (81, 38, 120, 74), (132, 28, 179, 74), (192, 29, 240, 73), (255, 33, 297, 72), (305, 15, 365, 72),
    (24, 103, 67, 145), (84, 107, 123, 145), (133, 109, 174, 145), (185, 105, 227, 145), (245, 94, 296, 144),
    (317, 105, 356, 145),
    (25, 177, 63, 218), (80, 174, 125, 217), (135, 179, 174, 218), (189, 170, 237, 217), (251, 172, 297, 217),
    (315, 155, 380, 219),
    (18, 232, 75, 288), (92, 244, 136, 288), (144, 236, 201, 287), (219, 239, 269, 288), (275, 238, 327, 288),
    (335, 247, 381, 289),
)  # fmt: skip
#: Pieces of the photograph that do not cut a coin.
TRAINED_ON = (
    (0, 0, 180, 90), (180, 0, 384, 90), (0, 90, 180, 150), (180, 90, 384, 150), (0, 150, 180, 226), (180, 150, 384, 226)
)  # fmt: skip
HELD_OUT = ((0, 226, 210, 303), (210, 226, 384, 303))
MODEL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (32, 64, 128, 256), "stem_width": 32}
SCORE = IOU = 0.5


def piece(image: Tensor, area: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A part of the photograph [3, H, W] and the boxes of the coins in it [K, 4]."""
    left, top, right, bottom = area
    corner = torch.tensor([left, top, left, top], dtype=torch.float32)
    inside = [c for c in COINS if c[0] >= left and c[1] >= top and c[2] <= right and c[3] <= bottom]
    return image[:, top:bottom, left:right], torch.tensor(inside, dtype=torch.float32) - corner


def detector() -> Any:
    try:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
    except ImportError as error:
        sys.exit(f"torchvision is needed: {error}")
    from ..detection import pyramid_backbone

    backbone = pyramid_backbone("ffnet_1_features", out_channels=64, **MODEL)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.8, 1.0, 1.25),) * 5)
    # Pictures already have mean 0 and standard deviation 1.
    normalised = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    few = {"box_batch_size_per_image": 128, "rpn_pre_nms_top_n_train": 300, "rpn_post_nms_top_n_train": 300}
    sizes = {"min_size": 128, "max_size": 384}
    return FasterRCNN(backbone, 2, rpn_anchor_generator=anchors, **normalised, **few, **sizes)


def train(model: Any, pieces: Sequence[tuple[Tensor, Tensor]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        images, targets = [], []
        for image, boxes in pieces:
            image = image * (0.8 + 0.4 * torch.rand(()))
            if torch.rand(()) < 0.5:
                image = image.flip(2)
                boxes = torch.stack(
                    [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]], 1
                )
            images.append(image)
            targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def score(model: Any, pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any], list[Tensor]]:
    """Counts coins found (by a box with a score and an IoU of at least .5), their mean IoU, and false or duplicate
    boxes; also returns the boxes of each piece."""
    from torchvision.ops import box_iou

    model.eval()
    coins = found = false = 0
    overlaps: list[float] = []
    results = []
    for image, boxes in pieces:
        (out,) = model([image])
        kept = out["boxes"][out["scores"] >= SCORE]
        results.append(kept)
        best = box_iou(boxes, kept).amax(1) if len(kept) else torch.zeros(len(boxes))
        hits = best >= IOU
        coins, found, false = coins + len(boxes), found + int(hits.sum()), false + len(kept) - int(hits.sum())
        overlaps += best[hits].tolist()
    mean = sum(overlaps) / max(len(overlaps), 1)
    return {"coins": coins, "found": found, "false": false, "mean IoU of those found": round(mean, 3)}, results


def picture(image: Any, areas: Sequence[Sequence[int]], found: Sequence[Tensor]) -> Any:
    """The photograph with hand-drawn boxes in green and found ones in red; a line above the held-out row."""
    from PIL import ImageDraw

    scale = 2
    sheet = image.resize((image.width * scale, image.height * scale))
    draw = ImageDraw.Draw(sheet)
    for coin in COINS:
        draw.rectangle([scale * v for v in coin], outline=(0, 200, 0), width=2)
    for area, boxes in zip(areas, found, strict=True):
        for box in boxes.tolist():
            draw.rectangle([scale * (v + area[i % 2]) for i, v in enumerate(box)], outline=(255, 60, 60), width=2)
    draw.line([(0, scale * HELD_OUT[0][1]), (sheet.width, scale * HELD_OUT[0][1])], fill=(255, 255, 0), width=2)
    return sheet


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("detect_coins", __doc__)
    parser.add_argument("--steps", type=int, default=250, help="of training (default: %(default)s)")
    options = started(parser, argv)
    photo = photograph("scikit-image", "coins.png")
    image = grey(photo).expand(3, -1, -1)
    known, unknown = ([piece(image, area) for area in areas] for areas in (TRAINED_ON, HELD_OUT))
    model = detector()
    began = time.perf_counter()
    train(model, known, options.steps)
    seconds = round(time.perf_counter() - began)
    trained, boxes = score(model, known)
    held_out, more = score(model, unknown)
    result = {"steps": options.steps, "seconds": seconds, "trained on": trained, "held out": held_out}
    print(json.dumps(result, indent=2))
    sheet = picture(photo, (*TRAINED_ON, *HELD_OUT), [*boxes, *more])
    save(options.out, result, lambda file: sheet.save(file, format="png"))
    return result


if __name__ == "__main__":
    main()
