"""Options of a training run: the command line, defaults, and which may change when a run is resumed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TrainOptions", "parse_train", "positive"]

LR_BATCH = 1024  # the published learning rate is for this batch size, and scaled in proportion

# The paper's recipe; `mixup` depends on the model.
IMAGENET: dict[str, Any] = {
    "model": "ffnet_1",
    "epochs": 300,
    "batch": 1024,
    "drop_path": None,
    "ema": 0.9995,
    "rand_augment": 9,
    "cutmix": 1.0,
    "erasing": 0.25,
    "flip": 0.5,
    "crop": 0.08,
    "workers": 4,
}
# A small model and few epochs for 8×8 pictures, which flips or large erased areas would make illegible.
DIGITS: dict[str, Any] = {
    "model": "ffnet_tiny",
    "epochs": 20,
    "batch": 64,
    "lr": 3e-3,
    "drop_path": 0.0,
    "ema": 0.99,
    "rand_augment": 0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "flip": 0.0,
    "crop": 0.6,
    "workers": 0,
}
WEAK_MIXUP = ("ffnet_1", "ffnet_2")


@dataclass(frozen=True)
class TrainOptions:
    """Options of one run; see ``python -m ffnet train --help``. ``batch`` is the batch size of an optimizer step over
    all ranks."""

    data: str
    model: str
    output: str
    epochs: int
    batch: int
    lr: float
    warmup: float
    drop_path: float | None
    ema: float
    rand_augment: int
    mixup: float
    cutmix: float
    erasing: float
    flip: float
    crop: float
    val: str | None = None
    checkpoint: str | None = None
    classes: int | None = None
    size: int | None = None
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    clip: float | None = None
    label_smoothing: float = 0.1
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    distill: float = 0.5
    amp: str = "none"
    seed: int = 0
    accumulate: int = 1
    fsdp: bool = False
    optimize: bool = True
    grad_checkpointing: bool = False
    deterministic: bool = False
    device: str = "auto"
    workers: int = 4
    timeout: float = 600.0
    eval_every: int = 1
    checkpoint_every: int = 0
    keep: int = 3
    log_every: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "eval_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected --{name.replace('_', '-')} >= 1, got {getattr(self, name)}")
        for name in ("ema", "label_smoothing", "distill", "erasing", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected --{name.replace('_', '-')} in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(f"expected --warmup from 0 to below the {self.epochs} epochs, got {self.warmup}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"expected --crop in (0, 1], got {self.crop}")
        if self.teacher_checkpoint and not self.teacher:
            raise ValueError("--teacher-checkpoint needs --teacher, the name of its model")
        if self.fsdp and self.amp == "fp16":
            raise ValueError("--fsdp trains in float32 or with --amp bf16, not with --amp fp16")

    def recipe(self) -> dict[str, Any]:
        """The options that determine results: a run can only be resumed with the same ones."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _MAY_CHANGE}


# Options of where a run is and what it reports. The number of processes may change as well.
_MAY_CHANGE = {
    *("data", "val", "output", "checkpoint", "teacher_checkpoint", "device", "workers", "timeout", "tensorboard"),
    *("accumulate", "fsdp", "optimize", "grad_checkpointing", "deterministic"),
    *("eval_every", "checkpoint_every", "keep", "log_every"),
}


def parse_train(argv: Sequence[str]) -> TrainOptions:
    """Parses a command line without the word ``train``; defaults are the paper's, or suit the built-in data.

    Raises:
        ValueError: If a value is out of range.
        SystemExit: If the command line is invalid.
    """
    given = vars(_parser().parse_args(argv))
    defaults = DIGITS if given["data"] == "digits" else IMAGENET
    filled = {key: defaults[key] for key, value in given.items() if value is None and key in defaults}
    options: dict[str, Any] = {**given, **filled}
    if options["lr"] is None:
        options["lr"] = 1e-3 * options["batch"] / LR_BATCH
    if options["warmup"] is None:
        options["warmup"] = min(5.0, options["epochs"] / 10)  # shorter for short runs
    if options["mixup"] is None:
        options["mixup"] = 0.2 if options["model"] in WEAK_MIXUP else 0.8
    return TrainOptions(**options)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ffnet train",
        description="Trains a classifier. Run it again with the same --output and it goes on where it was stopped.",
        epilog="Defaults are the paper's recipe; those of the data set 'digits' fit its size.",
    )
    parser.add_argument("data", help="folder with train/ and val/, each of class folders or of .tar shards; or: digits")
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", help="of `ffnet list`, or ffnet_tiny")
    what.add_argument("--output", default="run", metavar="DIR", help="checkpoints and records (default: %(default)s)")
    what.add_argument("--val", metavar="PATH", help="held-out part, where it is not DATA/val")
    what.add_argument("--checkpoint", metavar="FILE", help="weights to start from; a head of other classes starts anew")
    what.add_argument("--classes", type=positive, metavar="N", help="outputs of the head (default: those of the data)")
    what.add_argument("--size", type=positive, metavar="S", help="side of the input (default: the model's)")
    what.add_argument("--workers", type=int, metavar="N", help="data processes a rank (default: 4; 0 for digits)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--batch", type=int, help="images of an optimizer step, on all ranks together")
    recipe.add_argument("--lr", type=float, help=f"highest learning rate (default: 1e-3 × batch / {LR_BATCH})")
    recipe.add_argument("--min-lr", type=float, default=1e-6, help="last learning rate (default: %(default)s)")
    recipe.add_argument(
        "--warmup", type=float, metavar="EPOCHS", help="of a line up before the cosine (default: 5, at most a tenth)"
    )
    recipe.add_argument("--weight-decay", type=float, default=0.05, help="of matrices only (default: %(default)s)")
    recipe.add_argument("--clip", type=float, metavar="NORM", help="largest norm of the gradient (default: no limit)")
    recipe.add_argument("--ema", type=float, metavar="DECAY", help="averaged weights; 0 for none")
    recipe.add_argument("--drop-path", type=float, metavar="RATE", help="stochastic depth (default: the model's)")
    recipe.add_argument("--label-smoothing", type=float, default=0.1, help="(default: %(default)s)")
    recipe.add_argument("--mixup", type=float, metavar="ALPHA", help="0 for none")
    recipe.add_argument("--cutmix", type=float, metavar="ALPHA", help="0 for none")
    recipe.add_argument("--erasing", type=float, metavar="P", help="probability of random erasing")
    recipe.add_argument("--rand-augment", type=int, metavar="M", help="magnitude, 0 for none; needs torchvision")
    recipe.add_argument("--flip", type=float, metavar="P", help="probability of a horizontal flip")
    recipe.add_argument("--crop", type=float, metavar="SHARE", help="least share of the area that a random crop keeps")
    recipe.add_argument("--teacher", metavar="NAME", help="distil from timm/NAME, or from another model of ffnet")
    recipe.add_argument("--teacher-checkpoint", metavar="FILE", help="the teacher's weights (timm: its published ones)")
    recipe.add_argument("--distill", type=float, default=0.5, metavar="W", help="weight of the teacher's hard labels")
    recipe.add_argument("--seed", type=int, default=0)

    how = parser.add_argument_group("engine")
    how.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")
    how.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast (default: %(default)s)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="passes that make up an optimizer step")
    how.add_argument("--fsdp", action="store_true", help="shard the model over the ranks (FSDP2), not DDP; no kernels")
    how.add_argument("--no-optimize", dest="optimize", action="store_false", help="plain PyTorch, no kernels")
    how.add_argument("--grad-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    how.add_argument(
        "--deterministic", action="store_true", help="PyTorch's deterministic algorithms, for bit equality"
    )
    how.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds until a silent rank counts as dead"
    )

    record = parser.add_argument_group("records")
    record.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS")
    record.add_argument("--checkpoint-every", type=int, default=0, metavar="STEPS", help="besides each evaluation")
    record.add_argument("--keep", type=int, default=3, metavar="K", help="last checkpoints kept, besides the best")
    record.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    record.add_argument("--tensorboard", action="store_true", help="needs the tensorboard package")
    return parser
