"""Optimizer, learning rate, loss and averaged weights of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from .options import TrainOptions

__all__ = ["Loss", "averaged", "build_optimizer", "learning_rate", "set_learning_rate"]


def build_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and filters, but not on norms, biases and layer scales."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = id(parameter) in norms or parameter.dim() <= 1 or name.endswith("layer_scale")
        (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, fused=True)


def learning_rate(options: TrainOptions, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step ``step``: linear warm-up over ``warmup`` epochs, then a half cosine down to
    ``min_lr``."""
    warmup, total = options.warmup * steps_per_epoch, options.epochs * steps_per_epoch
    if step < warmup:
        return options.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return options.min_lr + (options.lr - options.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and statistics; it decays faster at first, when weights are still
    random."""

    @torch.no_grad()
    def average(averages: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(ema.n_averaged)  # kept on the CPU: reading `updates` would wait for the GPU
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point() and not any(isinstance(own, DTensor) for own in averages):
            torch._foreach_lerp_(list(averages), list(values), weight)
            return
        for own, new in zip(averages, values, strict=True):
            if own.is_floating_point():
                own.lerp_(new, weight)
            else:  # counters
                own.copy_(new)

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return ema


class Loss:
    """Cross-entropy with label smoothing, in float32; with a teacher, mixed with the cross-entropy against its
    predictions."""

    def __init__(self, label_smoothing: float, teacher: Callable[[Tensor], Tensor] | None, distill: float) -> None:
        self.label_smoothing, self.teacher, self.distill = label_smoothing, teacher, distill

    def choices(self, images: Tensor) -> Tensor | None:
        """The teacher's predicted classes [N] for these images."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            return self.teacher(images).argmax(1)

    def __call__(self, logits: Tensor, targets: Tensor, choices: Tensor | None = None) -> Tensor:
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if choices is None:
            return loss
        return (1 - self.distill) * loss + self.distill * F.cross_entropy(logits, choices)
