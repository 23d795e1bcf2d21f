"""Batches of images whose order and augmentation depend on seed, epoch and image only.

So a run continues with the same numbers wherever it was stopped, whatever the number of ranks and data workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .sources import Source

__all__ = ["IGNORED", "Batch", "Images", "StepSampler", "eval_loader", "seed_of", "train_loader"]

IGNORED = -1  # label of images that do not count: unreadable ones, and padding of a rank's share
ATTEMPTS = 50

Key = tuple[int, int]  # an image's number and the seed of its augmentation


class Batch(NamedTuple):
    """Images [N, 3, S, S], labels [N], and messages about images that could not be read."""

    images: Tensor
    labels: Tensor
    skipped: list[str]


def seed_of(*parts: int) -> int:
    """A seed of 63 bits for a tuple of integers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Images(Dataset):
    """The images of a source by key, with ``transform`` applied.

    An image that cannot be read is reported. In training the next one replaces it, so that batches keep their size; in
    evaluation it does not count.

    Raises:
        OSError: In training, if many consecutive images cannot be read.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], *, train: bool) -> None:
        self.source, self.transform, self.train = source, transform, train

    def __getitem__(self, key: Key) -> tuple[Tensor, int, list[str]]:
        index, seed = key
        skipped = []
        with _seeded(seed):
            if index < 0:  # a placeholder with an image's shape
                return torch.zeros_like(self.transform(Image.new("RGB", (8, 8)))), IGNORED, []
            for attempt in range(ATTEMPTS):
                number = (index + attempt) % len(self.source)
                try:
                    image = self.source.image(number)
                except OSError as error:
                    skipped.append(f"{self.source.name(number)}: {error}")
                    if self.train:
                        continue
                    return torch.zeros_like(self.transform(Image.new("RGB", (8, 8)))), IGNORED, skipped
                return self.transform(image), int(self.source.labels[number]), skipped
        raise OSError(f"{ATTEMPTS} images on end cannot be read; the first is {skipped[0]}")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which Python's and torch's CPU generators are seeded; their states are restored afterwards."""
    python, state = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(state)


class StepSampler(Sampler[list[Key]]):
    """Keys for a rank's passes, ``accumulate`` of them per step, from step ``start`` up to but excluding ``stop``.

    Every epoch shuffles all images anew, by seed and epoch, and cuts them into batches of ``batch``, of which each rank
    takes a part; an incomplete last batch is dropped.

    Raises:
        ValueError: If a batch cannot be divided, or is larger than the data.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        *,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch % (world * accumulate):
            raise ValueError(
                f"expected --batch to be a multiple of ranks × --accumulate = {world} × {accumulate}, got {batch}"
            )
        if batch > length:
            raise ValueError(f"expected --batch of at most the {length} images of the training part, got {batch}")
        self.length, self.batch, self.seed, self.start, self.stop = length, batch, seed, start, stop
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.steps_per_epoch = length // batch

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        share = self.batch // self.world
        part = share // self.accumulate
        for step in range(self.start, self.stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator)
            first = step % self.steps_per_epoch * self.batch + self.rank * share
            for begin in range(first, first + share, part):
                yield [(index, seed_of(self.seed, epoch, index)) for index in order[begin : begin + part].tolist()]


def train_loader(images: Images, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[Batch]:
    """All batches of a run in order, with one set of data workers."""
    return iter(_loader(images, sampler, workers, pin))


def eval_loader(
    images: Images, batch: int, *, rank: int = 0, world: int = 1, workers: int = 0, pin: bool = False
) -> DataLoader:
    """Every image once, over all ranks; all ranks get the same number of batches of the same sizes."""
    count = len(images.source)
    indices = [i if i < count else IGNORED for i in range(rank, -(-count // world) * world, world)]
    keys = [[(i, 0) for i in indices[first : first + batch]] for first in range(0, len(indices), batch)]
    return _loader(images, keys, workers, pin)


def _loader(images: Images, batches: Any, workers: int, pin: bool) -> DataLoader:
    # With its own generator: by default a loader draws its seed from torch's global generator.
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
    )


def _collate(samples: Sequence[tuple[Tensor, int, list[str]]]) -> Batch:
    images, labels, skipped = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), [name for names in skipped for name in names])
