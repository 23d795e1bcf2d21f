"""``ffnet classify``: the most likely classes of a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import CommandError, add_model_options, labels_from, model_from, picture_from

TOP = 5


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("classify", help="the likeliest classes of a picture")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any picture Pillow reads")
    add_model_options(parser, "classification")
    parser.add_argument("--size", type=int, metavar="S", help="side of the model's input; default: the model's own")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    if options.size is not None and options.size < 32:
        raise CommandError(f"expected --size of 32 or more, got {options.size}")
    image = picture_from(options.image)
    from ..preprocess import preprocess

    model = model_from(options, "classification")
    labels = labels_from(options.labels, model.num_classes)
    with torch.inference_mode():
        probabilities = model(preprocess(image, model.config, options.size)[None])[0].softmax(0)
    for probability, index in zip(*probabilities.topk(min(TOP, len(labels))), strict=True):
        print(f"{probability:7.2%}  {labels[index]}")
    return 0
