"""Batch normalisation by batch statistics, with the activation that follows, for training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import choice, cpu
from ..backends.activations import ACTIVATE
from ._operator import TrainingOperator


class Norm(NamedTuple):
    """The tensors of an ``nn.BatchNorm2d`` in training mode: ``[C]`` each, or None.

    ``momentum`` None is the cumulative average, which takes ``num_batches_tracked``.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> Norm:
        """Takes them from a layer, whose hooks are not called."""
        moved = (module.running_mean, module.running_var) if module.track_running_stats else (None, None)
        count = module.num_batches_tracked if module.track_running_stats else None
        return cls(*moved, module.weight, module.bias, count, module.momentum, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """In plain PyTorch."""
        mean, variance, weight, bias, *_ = self
        # PyTorch's gradients on channels-last maps assume that vectors have a stride of one.
        weight, bias = (v if v is None or v.is_contiguous() else v.contiguous() for v in (weight, bias))
        return F.batch_norm(x, mean, variance, weight, bias, True, self.count_batch(), self.eps)

    def applies(self, x: Tensor, channels: int, pixels: int) -> bool:
        """Whether the kernels support it, for a map of so many channels and pixels: parameters in float32, as under
        autocast, or in the map's dtype."""
        affine = [t for t in (self.weight, self.bias) if t is not None and t.shape == (channels,)]
        alike = all(t.dtype in (x.dtype, torch.float32) and t.device == x.device for t in affine)
        return len(affine) == 2 and alike and self.eps > 0 and pixels > 1  # of one, there are no statistics

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the kernels expect them."""
        assert self.weight is not None
        assert self.bias is not None
        return self.weight.float().contiguous(), self.bias.float().contiguous()

    def count_batch(self) -> float:
        """Counts a batch, and returns the weight of its statistics."""
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(self.num_batches_tracked)
        return factor or 0.0


def batch_norm(x: Tensor, norm: Norm, activation: str = "none") -> Tensor:
    """``act(norm(x))`` by the statistics of the batch.

    Only x is kept for the backward pass. Running statistics are updated as by ``nn.BatchNorm2d``; statistics and
    parameters may be in float32 for narrower maps, as under autocast. Layouts and activations for which PyTorch was
    measured to be as fast are left to it.

    Args:
        x: ``[N, C, H, W]``.
        norm: its parameters and running statistics.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.

    Returns:
        ``[N, C, H, W]``.
    """
    pixels = x.numel() // max(x.shape[1], 1) if x.dim() > 1 else 0
    if not runs_natively(x, activation) or not norm.applies(x, x.shape[1], pixels):
        return ACTIVATE[activation](norm(x))
    args = (channels_last(x), *norm.parameters(), norm.eps, activation)
    out, mean, variance = OPERATOR.on("cpu", *args)
    track([norm], mean[None], variance[None], pixels)
    return out


def runs_natively(x: Tensor, *arguments: Any) -> bool:
    """Whether the native kernels of training steps run for a map, and for the given batch normalisation, if any."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    return choice.prefers(cpu, "batch_norm", (x, *arguments))


def track(norms: Sequence[Norm], mean: Tensor, variance: Tensor, count: int) -> None:
    """Updates running statistics as the layers would, from those of a batch: ``[layers, C]``, with the biased variance.

    The operators mark them as not differentiable, so no graph is kept here.
    """
    unbiased = variance * (count / (count - 1))
    for norm, batch_mean, batch_variance in zip(norms, mean, unbiased, strict=True):
        factor = norm.count_batch()
        if norm.running_mean is None or norm.running_var is None:
            continue
        moved, towards = [norm.running_mean, norm.running_var], [batch_mean, batch_variance]
        if {norm.running_mean.dtype, norm.running_var.dtype} != {mean.dtype}:
            towards = [batch.to(running.dtype) for batch, running in zip(towards, moved, strict=True)]
        with torch.autograd._unsafe_preserve_version_counter(tuple(moved)):  # like PyTorch's own update
            torch._foreach_mul_(moved, 1 - factor)  # no lerp, which makes NaN of infinity
            torch._foreach_add_(moved, towards, alpha=factor)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(x: Tensor, channels: int, size: Sequence[int] | None = None) -> Tensor:
    """An uninitialised map as kernels of training steps return it: channels-last."""
    shape = (x.shape[0], channels, *(size or x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def reference(x, gamma, beta, eps, activation) -> Tensor:
    return ACTIVATE[activation](F.batch_norm(x, None, None, gamma, beta, True, 0.0, eps))


def empty(x, gamma, *_) -> tuple[Tensor, Tensor, Tensor]:
    return empty_map(x, x.shape[1]), torch.empty_like(gamma), torch.empty_like(gamma)


def empty_gradients(grad, x, gamma, beta, mean, variance, eps, activation, wants_x) -> list[Tensor]:
    return [*([empty_map(x, x.shape[1])] if wants_x else []), torch.empty_like(gamma), torch.empty_like(gamma)]


def kernel_gradients(backward, grad, args, kept, mask) -> list:
    *tensors, eps, activation = args
    grads = backward(channels_last(grad), *tensors, *kept, eps, activation, mask[0])
    return grads if mask[0] else [None, *grads]


OPERATOR = TrainingOperator(__name__)
