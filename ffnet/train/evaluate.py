"""Evaluates a classifier on a data set, over all ranks; ``python -m ffnet eval``."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .augment import eval_transform
from .data import IGNORED, Batch, Images, eval_loader
from .distributed import Ranks, join_ranks
from .models import build_model, checkpoint_file, model_names, recorded
from .options import positive
from .sources import VALIDATION, Digits, Source, open_source

__all__ = ["Accuracy", "autocast", "evaluate", "main"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOP = 5


class Accuracy(NamedTuple):
    """The result of `evaluate`.

    Attributes:
        top1, top5: Percent of the images that were read.
        loss: Mean cross-entropy.
        images: Number of images read.
        images_per_second: Throughput of all ranks together, reading included.
        skipped: Images that could not be read, with the reasons.
        confusion: Counts [class, predicted class], int64.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float
    skipped: list[str]
    confusion: Tensor


def autocast(device: torch.device, amp: str) -> Any:
    return torch.autocast(device.type, DTYPES[amp]) if amp != "none" else contextlib.nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], classes: int, ranks: Ranks, amp: str = "none") -> Accuracy:
    """Runs ``model``, in its present mode, over each rank's batches; the result is the same on every rank.

    Raises:
        ValueError: If no image can be read.
    """
    start = time.perf_counter()
    confusion = torch.zeros(classes, classes, dtype=torch.long, device=ranks.device)
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    skipped: list[str] = []
    for batch in batches:
        skipped += batch.skipped
        labels = batch.labels.to(ranks.device, non_blocking=True)
        with autocast(ranks.device, amp):
            logits = model(batch.images.to(ranks.device, non_blocking=True)).float()
        counted = labels != IGNORED
        logits, labels = logits[counted], labels[counted]
        ranked = logits.topk(min(TOP, classes)).indices
        sums[0] += (ranked == labels[:, None]).any(1).sum()
        sums[1] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        confusion.view(-1).index_add_(0, labels * classes + ranked[:, 0], torch.ones_like(labels))
    ranks.sum(sums)
    ranks.sum(confusion)
    skipped = [name for part in ranks.gather(skipped) for name in part]
    count = int(confusion.sum())
    if not count:
        raise ValueError(f"no image could be read; the first: {skipped[0]}")
    top5, loss = (sums / count).tolist()
    top1 = confusion.diagonal().sum().item() / count
    speed = count / (time.perf_counter() - start)
    return Accuracy(100 * top1, 100 * top5, loss, count, speed, skipped, confusion.cpu())


def main(argv: Sequence[str]) -> int:
    """``ffnet eval``: prints accuracy, speed and the classes that are confused most."""
    arguments = _parser().parse_args(argv)
    known = recorded(arguments.checkpoint)
    name = arguments.model or known.get("model")
    if name is None:
        raise ValueError(f"{arguments.checkpoint} does not say its model: give --model of {', '.join(model_names())}")
    source = _held_out(arguments.data)
    classes = arguments.classes or known.get("classes") or _classes_of(source)
    if (highest := int(source.labels.max())) >= classes:
        raise ValueError(f"the data has class {highest}, the head only 0 to {classes - 1}")
    with join_ranks(arguments.device, arguments.timeout) as ranks:
        model = build_model(name, classes)
        from ..checkpoint import load_checkpoint

        load_checkpoint(model, checkpoint_file(arguments.checkpoint))
        model = model.to(ranks.device).eval()
        if arguments.optimize:
            from ffnet_kernels import optimize

            optimize(model)
        size = arguments.size or known.get("size") or model.config["input_size"][-1]
        images = Images(source, eval_transform(model.config, size), train=False)
        place = {"rank": ranks.rank, "world": ranks.world, "workers": arguments.workers}
        found = evaluate(model, eval_loader(images, arguments.batch, **place), classes, ranks, arguments.amp)
        if ranks.is_first:
            _report(found, source, arguments)
    return 0


def _report(found: Accuracy, source: Source, arguments: argparse.Namespace) -> None:
    for problem in [*source.problems, *found.skipped]:
        print(f"skipped {problem}")
    if found.skipped:
        print(f"{len(found.skipped)} of {len(source)} images could not be read and do not count")
    print(
        f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}, {found.images} images, "
        f"{found.images_per_second:.1f} images/s"
    )
    names = source.classes or [str(label) for label in range(len(found.confusion))]
    wrong = found.confusion.clone().fill_diagonal_(0)
    for place in wrong.flatten().argsort(descending=True, stable=True)[:5].tolist():
        label, guess = divmod(place, len(wrong))
        if wrong[label, guess]:
            print(f"  {int(wrong[label, guess])} × {names[label]} taken for {names[guess]}")
    if arguments.json:
        content = {**found._asdict(), "confusion": found.confusion.tolist(), "classes": source.classes}
        Path(arguments.json).write_text(json.dumps(content) + "\n")


def _held_out(data: str) -> Source:
    if data == "digits":
        return Digits(train=False)
    root = Path(data)
    part = next((root / name for name in VALIDATION if (root / name).is_dir()), root)
    return open_source(part)


def _classes_of(source: Source) -> int:
    return len(source.classes) if source.classes else int(source.labels.max()) + 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ffnet eval", description="Top-1 and top-5 accuracy, confusion and speed.")
    parser.add_argument("data", help="folder with val/, or of class folders or .tar shards itself; or: digits")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="weights, or the --output of `ffnet train`")
    parser.add_argument("--model", help="where the checkpoint does not say it")
    parser.add_argument("--classes", type=positive, metavar="N", help="outputs of the head")
    parser.add_argument("--size", type=positive, metavar="S", help="side of the input")
    parser.add_argument("--batch", type=positive, default=64, help="images of a rank (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="data processes (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--amp", choices=("none", *DTYPES), default="none")
    parser.add_argument("--no-optimize", dest="optimize", action="store_false", help="plain PyTorch, no kernels")
    parser.add_argument("--timeout", type=float, default=600, metavar="S")
    parser.add_argument("--json", metavar="FILE", help="write all of it, with the confusion matrix")
    return parser
