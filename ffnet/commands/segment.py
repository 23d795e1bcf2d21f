"""``ffnet segment``: the class of each pixel of a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    CommandError,
    add_model_options,
    labels_from,
    model_from,
    new_file,
    picture_from,
    require_place,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

OPACITY = 0.5
PALETTE = 256
#: Of what the model sees with ``--size``: a strip one pixel wide becomes a huge map.
MOST_PIXELS = 2**26


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "segment",
        help="the class of each pixel of a picture",
        description="Writes a PNG with a palette, of the picture's size, whose pixel values are the classes' numbers.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any picture Pillow reads")
    add_model_options(parser, "segmentation")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="replaced if it is there")
    parser.add_argument(
        "--overlay", type=Path, metavar="FILE.png", help="the picture with the classes' colours over it"
    )
    parser.add_argument(
        "--size", type=int, metavar="S", help="shorter side that the model sees; default: the picture's"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    for path in (options.out, options.overlay):
        if path is not None and path.suffix.lower() != ".png":
            raise CommandError(f"expected a name that ends in .png, since other formats change classes; got {path}")
        if path is not None:
            require_place(path)
    if options.size is not None and options.size < 32:
        raise CommandError(f"expected --size of 32 or more, got {options.size}")
    image = picture_from(options.image)
    if options.size is not None and options.size**2 * max(image.size) // min(image.size) > MOST_PIXELS:
        raise CommandError(
            f"expected a picture that --size {options.size} makes {MOST_PIXELS} pixels at most, got one of "
            f"{image.width}x{image.height}"
        )
    from ..preprocess import normalised, resized

    model = model_from(options, "segmentation")
    if model.num_classes > PALETTE:
        raise CommandError(f"expected {PALETTE} classes at most, since a palette has no more; got {model.num_classes}")
    labels = labels_from(options.labels, model.num_classes)
    seen = image if options.size is None else resized(image, options.size, model.config["interpolation"])
    with torch.inference_mode():
        classes = model.predict(normalised(seen, model.config)[None], (image.height, image.width))[0]
    mask = as_picture(classes)
    with new_file(options.out) as file:
        mask.save(file, format="png")
    if options.overlay is not None:
        with new_file(options.overlay) as file:
            overlaid(image, mask).save(file, format="png")
    shares = torch.bincount(classes.flatten(), minlength=len(labels)) / classes.numel()
    for index in shares.argsort(descending=True).tolist():
        if shares[index]:
            print(f"{shares[index]:7.2%}  {labels[index]}")
    print(f"wrote {options.out}" + ("" if options.overlay is None else f" and {options.overlay}"))
    return 0


def palette() -> Sequence[int]:
    """Red, green and blue of 256 colours; neighbours differ, 0 is black: the bits of the number, spread over the three
    from the highest bit down, as masks of PASCAL VOC have them."""
    return [
        sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(8))
        for number in range(PALETTE)
        for channel in range(3)
    ]


def as_picture(classes: Tensor) -> Image:
    """Classes [H, W] as a palette picture."""
    import torch
    from PIL import Image

    mask = Image.fromarray(classes.to(torch.uint8).cpu().numpy())
    mask.putpalette(palette())
    return mask


def overlaid(image: Image, mask: Image) -> Image:
    """A picture overlaid with the colours of a mask of the same size."""
    from PIL import Image

    return Image.blend(image, mask.convert("RGB"), OPACITY)
