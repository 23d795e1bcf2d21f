"""Layers of a training step, each as one operator that keeps little for the backward pass.

On the CPU in float32 native kernels run them; elsewhere, under autocast and in transforms, plain PyTorch does. Native
results are channels-last. All functions are differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import autograd, checks, dispatch, functional, training_operators
from .backends import cpu
from .backends import training as plain
from .backends.activations import ACTIVATE
from .modules import DepthwiseConv2d

_ops = training_operators._ops

Branch = tuple[nn.Module, nn.Module]


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
    if not _runs_natively(x) or not _norm_applies(norm, x, x.shape[1], x.numel() // x.shape[1]):
        return ACTIVATE[activation](norm(x))
    layer: Any = norm
    out, mean, variance = autograd.call(
        _ops.batch_norm.default,
        _channels_last(x),
        layer.weight.contiguous(),
        layer.bias.contiguous(),
        layer.eps,
        activation,
    )
    _track([layer], mean[None], variance[None], x.numel() // x.shape[1])
    return out


def branched_depthwise(x: Tensor, branches: Sequence[Branch], activation: str = "none") -> Tensor:
    """``act(Σ norm(conv(x)))`` over (conv, norm) pairs, which are called as they are where the kernel does not apply.

    It applies to one or two depthwise convolutions without bias, with odd filters padded by half their size, each
    followed by an affine ``nn.BatchNorm2d`` in training mode. Nothing but x is kept for the backward pass. Running
    statistics move as those of ``nn.BatchNorm2d`` do. Layers with hooks are called.

    Args:
        x: ``[N, C, H, W]``.
        branches: pairs of modules whose results have one shape.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.

    Returns:
        ``[N, O, H', W']``.
    """
    if not _runs_natively(x) or not _branches_apply(x, branches):
        outputs = [norm(conv(x)) for conv, norm in branches]
        return ACTIVATE[activation](sum(outputs[1:], outputs[0]))
    convs: list = [conv for conv, _ in branches]
    norms: list = [norm for _, norm in branches]
    parameters: list = []
    for conv, norm in zip(convs, norms, strict=True):
        parameters += (conv.weight, norm.weight.contiguous(), norm.bias.contiguous())
    parameters += [None] * (6 - len(parameters))
    out, mean, variance = autograd.call(
        _ops.branched_depthwise.default, x, *parameters, [norm.eps for norm in norms], convs[0].stride, activation
    )
    _track(norms, mean, variance, out.numel() // out.shape[1])
    return out


def feed_forward(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + scale · (W₂ · act(W₁ · x + b₁) + b₂)``, a channel mixer behind its depthwise convolution.

    Of the hidden map only the form before the activation is kept for the backward pass.

    Args:
        x: ``[N, C, H, W]``.
        expand_weight, expand_bias: ``[D, C]`` (or ``[D, C, 1, 1]``) and ``[D]`` or None.
        project_weight, project_bias: ``[O, D]`` (or ``[O, D, 1, 1]``) and ``[O]`` or None.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.
        scale: layer scale ``[O]`` or ``[O, 1, 1]``, or None.
        residual: ``[N, O, H, W]`` or None.

    Returns:
        ``[N, O, H, W]``.
    """
    x, expand_weight, expand_bias, project_weight, project_bias, scale, residual = functional.autocast(
        x, expand_weight, expand_bias, project_weight, project_bias, scale, residual
    )
    args = checks.feed_forward(x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual)
    if not _runs_natively(x):
        return plain.feed_forward(*args)
    x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual = args
    return autograd.call(
        _ops.feed_forward.default,
        _channels_last(x),
        expand_weight.contiguous(),
        _contiguous(expand_bias),
        project_weight.contiguous(),
        _contiguous(project_bias),
        activation,
        _contiguous(scale),
        None if residual is None else _channels_last(residual),
    )[0]


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a hook on one of the modules would miss its call."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def _runs_natively(x: Tensor) -> bool:
    """Whether the native kernels are chosen for a map: where those of ``conv2d`` are, whatever its other arguments."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0 or x.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return dispatch.select("conv2d", (x,)) is cpu


def _branches_apply(x: Tensor, branches: Sequence[Branch]) -> bool:
    if not 1 <= len(branches) <= 2 or not all(_is_plain_convolution(conv) for conv, _ in branches):
        return False
    first: Any = branches[0][0]
    pixels = x.shape[0] * -(-x.shape[2] // first.stride[0]) * -(-x.shape[3] // first.stride[1])
    conv: Any
    for conv, norm in branches:
        if (
            not _norm_applies(norm, x, conv.out_channels, pixels)
            or is_hooked(conv)
            or conv.bias is not None
            or conv.groups != conv.in_channels
            or conv.in_channels != x.shape[1]
            or conv.out_channels not in (conv.in_channels, 2 * conv.in_channels)
            or any(k % 2 == 0 for k in conv.kernel_size)
            or conv.padding != tuple(k // 2 for k in conv.kernel_size)
            or conv.dilation != (1, 1)
            or conv.padding_mode != "zeros"
            or not set(conv.stride) <= {1, 2}
            or (conv.stride, conv.out_channels) != (first.stride, first.out_channels)
            or conv.weight.dtype != x.dtype
            or conv.weight.device != x.device
        ):
            return False
    return True


def _is_plain_convolution(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d or (type(conv) is DepthwiseConv2d and conv.activation == "none")


def _norm_applies(norm: nn.Module, x: Tensor, channels: int, pixels: int) -> bool:
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


def _track(norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves running statistics as the layers would, by those of a batch: ``[layers, C]``, the variance biased.

    The operators mark them as not differentiable, so no graph is kept here.
    """
    unbiased = variance * (count / (count - 1))
    for norm, batch_mean, batch_variance in zip(norms, mean, unbiased, strict=True):
        running_mean, running_var, factor = norm.running_mean, norm.running_var, norm.momentum
        if not norm.track_running_stats or running_mean is None or running_var is None:
            continue
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(norm.num_batches_tracked)
        moved, towards = [running_mean, running_var], [batch_mean, batch_variance]
        if {running_mean.dtype, running_var.dtype} != {mean.dtype}:
            towards = [batch.to(running.dtype) for batch, running in zip(towards, moved, strict=True)]
        torch._foreach_lerp_(moved, towards, factor or 0.0)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
