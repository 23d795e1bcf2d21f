"""Batch normalisation by a batch's own statistics, with the activation behind it, in a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import choice, cpu
from ..backends.activations import ACTIVATE
from ._operator import TrainingOperator


def batch_norm(x: Tensor, norm: nn.Module, activation: str = "none") -> Tensor:
    """``act(norm(x))`` for a normalisation that is called as it is where the kernel does not apply.

    It applies to an affine ``nn.BatchNorm2d`` in training mode. Nothing but x is kept for the backward pass. Running
    statistics move as they do in it. A layer with hooks is called.

    Args:
        x: ``[N, C, H, W]``.
        norm: a module that gives a result of that shape.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.

    Returns:
        ``[N, C, H, W]``.
    """
    if not runs_natively(x) or not norm_applies(norm, x, x.shape[1], x.numel() // x.shape[1]):
        return ACTIVATE[activation](norm(x))
    layer: Any = norm
    args = (channels_last(x), layer.weight.contiguous(), layer.bias.contiguous(), layer.eps, activation)
    out, mean, variance = OPERATOR.on("cpu", *args)
    track([layer], mean[None], variance[None], x.numel() // x.shape[1])
    return out


def runs_natively(x: Tensor) -> bool:
    """Whether the native kernels of training steps are chosen for a map."""
    if not isinstance(x, Tensor) or x.dim() != 4 or torch.is_autocast_enabled("cpu"):
        return False
    return choice.prefers(cpu, "batch_norm", (x,))


def norm_applies(norm: nn.Module, x: Tensor, channels: int, pixels: int) -> bool:
    """Whether a layer is a batch normalisation by the statistics of a batch like x, of so many channels and pixels."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.weight is not None
        and norm.bias is not None
        and all((t.dtype, t.device) == (x.dtype, x.device) for t in (norm.weight, norm.bias))
        and norm.eps > 0
        and norm.num_features == channels
        and pixels > 1  # of one, it takes no statistics
        and not is_hooked(norm)
    )


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a hook on one of the modules would miss its call."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def track(norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves running statistics as the layers would, by those of a batch: ``[layers, C]``, the variance biased.

    The operators mark them as not differentiable, so no graph is kept here.
    """
    unbiased = variance * (count / (count - 1))
    for norm, batch_mean, batch_variance in zip(norms, mean, unbiased, strict=True):
        running_mean, running_var, factor = norm.running_mean, norm.running_var, norm.momentum
        if not norm.track_running_stats:
            continue
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(norm.num_batches_tracked)
        if running_mean is None or running_var is None:
            continue
        moved, towards = [running_mean, running_var], [batch_mean, batch_variance]
        if {running_mean.dtype, running_var.dtype} != {mean.dtype}:
            towards = [batch.to(running.dtype) for batch, running in zip(towards, moved, strict=True)]
        with torch.autograd._unsafe_preserve_version_counter(tuple(moved)):  # as PyTorch's own moves them
            torch._foreach_lerp_(moved, towards, factor or 0.0)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(x: Tensor, channels: int, size: Sequence[int] | None = None) -> Tensor:
    """As kernels of training steps return them: channels-last."""
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


OPERATOR = TrainingOperator(
    __name__,
    "Tensor x, Tensor gamma, Tensor beta, float eps, str activation",
    results="Tensor, Tensor, Tensor",
    backward_arguments="Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, float eps, str activation",
)
