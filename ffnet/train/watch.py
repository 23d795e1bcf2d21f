"""Stops a run whose loss is no longer finite."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import write_atomically
from .data import Batch
from .distributed import Ranks

__all__ = ["LossWatch"]


class LossWatch:
    """Stops a run whose loss is not finite, and saves that step's inputs.

    On a GPU the loss of a pass is checked after the next one has been launched, so as not to wait for it.
    """

    def __init__(self, folder: Path, ranks: Ranks, delay: int) -> None:
        self.folder, self.ranks, self.delay = folder, ranks, delay
        self.seen: list[tuple[int, Tensor, Batch, float]] = []

    def see(self, step: int, loss: Tensor, batch: Batch, rate: float) -> None:
        self.seen.append((step, loss.detach(), batch, rate))
        while len(self.seen) > self.delay:
            self._check(*self.seen.pop(0))

    def flush(self) -> None:
        """Checks what is left: a checkpoint must not hold weights from a loss that is not finite."""
        while self.seen:
            self._check(*self.seen.pop(0))

    def _check(self, step: int, loss: Tensor, batch: Batch, rate: float) -> None:
        if torch.isfinite(loss):
            return
        path = self.folder / f"not-a-number-step-{step:09d}-rank-{self.ranks.rank}.pt"
        write_atomically(path, {"images": batch.images, "labels": batch.labels, "loss": loss.cpu(), "lr": rate})
        raise FloatingPointError(
            f"the loss of step {step} is {loss.item()} at learning rate {rate:.2e}; its images and labels are in "
            f"{path}. The checkpoint before is whole: lower --lr, add --clip 1, or use --amp bf16 instead of fp16"
        )
