"""A small FFNet-SR trained on photographs that packages ship, against bicubic interpolation.

python -m ffnet.examples.super_resolution [--scale 2] [--steps 1500] [--out build/super_resolution]

Photographs are reduced by Pillow's bicubic filter and rounded to 8 bits. Scores are PSNR of luma, without a border of
``scale`` pixels, as usual for super-resolution, on held-out photographs. With scikit-image, five of its photographs are
used for training, and a sixth and scikit-learn's two are held out; without it, one of scikit-learn's is used for
training and the other held out.

The last of those held out, reduced, is then enlarged by

python -m ffnet upscale build/super_resolution/small.png --checkpoint build/super_resolution/model.pth --out large.png
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..profile import count_parameters
from ..super_resolution import SCALES, FFNetSR, upscale
from .files import parser_of, save, started
from .photographs import photograph

#: Of scikit-image.
TRAINED_ON = ("astronaut.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg")
HELD_OUT = "chelsea.png"
#: Of scikit-learn; used for training if scikit-image is missing, otherwise held out.
SPARE = "china.jpg"
PATCH, BATCH, RATE = 32, 16, 2e-3
TILE = 256


def photographs() -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
    """By name: photographs to train on, and those held out."""
    held_out = {name: photograph("scikit-learn", name) for name in (SPARE, "flower.jpg")}
    if importlib.util.find_spec("skimage") is None:
        return {SPARE: held_out.pop(SPARE)}, held_out
    held_out[HELD_OUT] = photograph("scikit-image", HELD_OUT)
    return {name: photograph("scikit-image", name) for name in TRAINED_ON}, held_out


def pair(image: Image.Image, scale: int) -> tuple[Image.Image, Image.Image]:
    """A reduced photograph and the original, cropped to a multiple of the scale."""
    small = image.width // scale, image.height // scale
    image = image.crop((0, 0, scale * small[0], scale * small[1]))
    return image.resize(small, Image.Resampling.BICUBIC), image


def tensor(image: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def luma(pixels: Tensor) -> Tensor:
    """ITU-R BT.601 luma (16 to 235 of 255) of [3, H, W] in [0, 1]."""
    weights = pixels.new_tensor([65.481, 128.553, 24.966])
    return (16 + torch.einsum("chw,c->hw", pixels, weights)) / 255


def psnr(result: Tensor, truth: Tensor, border: int) -> float:
    """PSNR of luma in decibels, of pixels rounded to 8 bits."""
    inside = (slice(border, -border), slice(border, -border))
    result = (result.clamp(0, 1) * 255).round() / 255
    error = (luma(result) - luma(truth))[inside].double().square().mean()
    return float(-10 * error.log10())


def batch_of(pairs: list[tuple[Tensor, Tensor]], scale: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Patches of random photographs, places and orientations."""
    areas = np.array([small.shape[1] * small.shape[2] for small, _ in pairs], dtype=float)
    patches = []
    for i in draw.choice(len(pairs), BATCH, p=areas / areas.sum()):
        small, large = pairs[i]
        top, left = (int(draw.integers(side - PATCH + 1)) for side in small.shape[1:])
        turns, flip = int(draw.integers(4)), bool(draw.integers(2))
        patch = []
        for image, s in ((small, 1), (large, scale)):
            cut = image[:, s * top : s * (top + PATCH), s * left : s * (left + PATCH)].rot90(turns, (1, 2))
            patch.append(cut.flip(2) if flip else cut)
        patches.append(patch)
    small_batch, large_batch = (torch.stack(side) for side in zip(*patches, strict=True))
    return small_batch.contiguous(memory_format=torch.channels_last), large_batch  # suits PyTorch


def train(model: FFNetSR, pairs: list[tuple[Tensor, Tensor]], steps: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        small, large = batch_of(pairs, model.scale, draw)
        loss = F.l1_loss(model(small), large)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"step {step:5} of {steps}: mean absolute error {np.mean(losses[-100:]):.4f}", flush=True)
    model.eval()


def compare(model: FFNetSR, held_out: dict[str, Image.Image]) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """PSNR of each photograph by method, and the pictures [3, H, W]."""
    scores, pictures = {}, {}
    for name, image in held_out.items():
        small, large = pair(image, model.scale)
        results = {
            "nearest": tensor(small.resize(large.size, Image.Resampling.NEAREST)),
            "bicubic": tensor(small.resize(large.size, Image.Resampling.BICUBIC)),
            "FFNet-SR": upscale(model, tensor(small)[None], tile=TILE)[0].clamp(0, 1),
        }
        truth = tensor(large)
        scores[name] = {method: psnr(result, truth, model.scale) for method, result in results.items()}
        pictures[name] = {**results, "photograph": truth}
    return scores, pictures


def draw(scores: dict[str, dict[str, float]], pictures: dict[str, Any], scale: int, side: int = 120) -> Any:
    """Crops of each photograph side by side, where they have most detail."""
    from matplotlib.figure import Figure

    methods = [method for method in next(iter(pictures.values())) if method != "nearest"]
    figure = Figure(figsize=(1.8 * len(methods), 2.05 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), len(methods), squeeze=False)
    for row, (name, results) in zip(axes, pictures.items(), strict=True):
        detail = F.avg_pool2d(luma(results["photograph"]).diff(dim=1).abs()[None], side, side // 4)[0]
        place = divmod(int(detail.argmax()), detail.shape[1])
        top, left = (side // 4 * index for index in place)
        for axis, method in zip(row, methods, strict=True):
            cut = results[method][:, top : top + side, left : left + side]
            axis.imshow(cut.permute(1, 2, 0).numpy(), interpolation="nearest")
            score = f"{scores[name][method]:.2f} dB" if method in scores[name] else name
            axis.set_title(f"{method}\n{score}", fontsize=9)
            axis.set_axis_off()
    figure.suptitle(
        f"Photographs that training did not see, enlarged ×{scale}; PSNR of the whole photograph", fontsize=9
    )
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("super_resolution", __doc__)
    parser.add_argument("--scale", type=int, choices=SCALES, default=2)
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="blocks (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=32, help="channels (default: %(default)s)")
    options = started(parser, argv)
    trained, held_out = photographs()
    model = FFNetSR(scale=options.scale, depth=options.depth, dim=options.dim)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pairs = [
        (tensor(small), tensor(large)) for small, large in (pair(image, options.scale) for image in trained.values())
    ]
    print(f"FFNet-SR x{options.scale}, {count_parameters(model):,} parameters, {len(pairs)} photographs")
    start = time.perf_counter()
    train(model, pairs, options.steps, options.seed)
    seconds = time.perf_counter() - start
    scores, pictures = compare(model, held_out)
    print(
        f"{'held out':16}" + "".join(f"{method:>12}" for method in next(iter(scores.values()))) + "   PSNR of luma, dB"
    )
    for name, by_method in scores.items():
        print(f"{name:16}" + "".join(f"{score:12.2f}" for score in by_method.values()))
    result = {
        "scale": options.scale, "depth": options.depth, "dim": options.dim, "parameters": count_parameters(model),
        "steps": options.steps, "seconds": round(seconds, 1), "trained_on": list(trained), "psnr": scores,
    }  # fmt: skip
    figure = draw(scores, pictures, options.scale)
    small, _ = pair(list(held_out.values())[-1], options.scale)
    inputs = {"small.png": lambda file: small.save(file, format="png")}
    save(options.out, result, lambda file: figure.savefig(file, dpi=80, format="png"), model, inputs)
    return result


if __name__ == "__main__":
    main()
