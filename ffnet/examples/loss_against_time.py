"""Loss against time, on the kernels and in plain PyTorch: ``python -m ffnet.examples.loss_against_time``.

Copies of one small FFNet learn scikit-learn's digits, enlarged to 32² pixels, from the same weights and batches. They
take turns step by step in one process, so that the machine's drift is in the times of all. Each has a clock of its own,
from the forward pass to the optimizer's step. Losses are those of the training batches, smoothed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffnet_kernels

from ..profile import count_parameters
from ..train.models import build_model
from ..train.sources import Digits
from .files import parser_of, save, started

BATCH, SIZE, WARM_UP, SMOOTHED = 64, 32, 3, 15
KERNELS = "kernels"
CONTENDERS: dict[str, tuple[torch.memory_format, Callable[[nn.Module], nn.Module]]] = {
    KERNELS: (torch.channels_last, ffnet_kernels.optimize),
    "plain PyTorch, channels-last": (torch.channels_last, lambda model: model),
    "plain PyTorch, NCHW": (torch.contiguous_format, lambda model: model),
}


@dataclass
class Run:
    """One copy's training: its loss and the seconds it has run for, after each step."""

    model: nn.Module
    memory_format: torch.memory_format
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        images = images.contiguous(memory_format=self.memory_format)
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        spent = time.perf_counter() - start
        self.losses.append(loss.item())
        self.seconds.append(spent)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        right = self.model(images.contiguous(memory_format=self.memory_format)).argmax(1) == labels
        self.model.train()
        return right.double().mean().item()


def digits(train: bool) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32], normalised, and labels."""
    source = Digits(train)
    pixels = torch.from_numpy(source.pixels).float()[:, None] / 127.5 - 1
    images = F.interpolate(pixels, (SIZE, SIZE), mode="bicubic").expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(source.labels)


def warm_up(run: Run, images: Tensor, labels: Tensor) -> None:
    """Steps that do not count: the first ones make programs. The run's weights and state are as before."""
    model, optimizer = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    for _ in range(WARM_UP):
        run.step(images, labels)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    run.losses.clear()
    run.seconds.clear()


def train(runs: dict[str, Run], images: Tensor, labels: Tensor, epochs: int) -> None:
    for run in runs.values():
        warm_up(run, images[:BATCH], labels[:BATCH])
    turns, number = list(runs.values()), 0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(images)).split(BATCH)[:-1]:  # the last one is smaller
            for run in turns[number % len(turns) :] + turns[: number % len(turns)]:
                run.step(images[rows], labels[rows])
            number += 1
        losses = ", ".join(f"{statistics.fmean(run.losses[-10:]):.4f}" for run in turns)
        print(f"epoch {epoch} of {epochs}: losses {losses}", flush=True)


def draw(runs: dict[str, Run]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    window = np.ones(SMOOTHED) / SMOOTHED
    for name, run in runs.items():
        count = min(SMOOTHED, len(run.losses))
        smooth = np.convolve(run.losses, window[:count] * SMOOTHED / count, "valid")
        axes.plot(np.cumsum(run.seconds)[count - 1 :], smooth, label=name, linewidth=2 if name == KERNELS else 1)
    axes.set(title="ffnet_tiny on digits", xlabel="seconds of training", ylabel="loss", yscale="log")
    axes.legend()
    return figure


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of("loss_against_time", __doc__)
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    options = started(parser, argv)
    torch.set_num_threads(options.threads)
    model = build_model("ffnet_tiny", 10, drop_path=0.0)
    runs = {}
    for name, (memory_format, wrap) in CONTENDERS.items():
        own = wrap(copy.deepcopy(model).to(memory_format=memory_format)).train()  # type: ignore[call-overload]
        runs[name] = Run(own, memory_format, torch.optim.AdamW(own.parameters(), 3e-3, weight_decay=0.05))
    train(runs, *digits(train=True), options.epochs)
    held_out, ours = digits(train=False), runs[KERNELS]
    rows = {}
    for name, run in runs.items():
        rows[name] = {
            "seconds": round(sum(run.seconds), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(run.seconds, ours.seconds, strict=True)), 2),
            "loss": round(statistics.fmean(run.losses[-20:]), 4),
            "held out": round(run.accuracy(*held_out), 4),
        }
        print(f"{name:30}{rows[name]}")
    result = {
        "parameters": count_parameters(model), "epochs": options.epochs, "threads": options.threads,
        "steps": len(ours.losses), "torch": torch.__version__, "runs": rows,
    }  # fmt: skip
    save(options.out, result, lambda file: draw(runs).savefig(file, dpi=80, format="png"), ours.model)
    return result


if __name__ == "__main__":
    main()
