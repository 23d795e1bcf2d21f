"""The functions that steps of a program call: the operators, with arguments that the rewriter has checked, and the form
of convolution that it rewrites."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import training
from .backends import choice, cpu, crossover
from .backends.activations import ACTIVATE
from .backends.maps import as_map, as_pixels, same_padding
from .ops import OPERATORS

Pads = tuple[int, int, int, int]  # top, bottom, left, right


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: Pads,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``torch.conv2d`` with explicit padding on all four sides."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        return torch.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)
    return torch.conv2d(x, weight, bias, stride, (top, left), dilation, groups)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: Pads,
    activation: str,
    channels: int,
) -> Tensor:
    if x.shape[1] != channels:  # else the operator would assume two filters a channel
        raise ValueError(f"expected a map of {channels} channels, got {list(x.shape)}")
    return _run("depthwise_conv2d", x, weight, bias, stride, padding, activation)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: Pads,
    activation: str,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    scale = scale if scale is None else scale.reshape(-1)
    return _run("conv2d", x, weight, bias, stride, padding, activation, scale, residual)


def projection(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution with gradients. On one thread PyTorch does not use oneDNN. In 16 bits its matrix products are
    fastest, above all for gradients."""
    if x.dtype in (torch.bfloat16, torch.float16) and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last):
        return as_map(F.linear(as_pixels(x), weight.flatten(1), bias), x)
    if leaves_projection(x):
        return torch.conv2d(x, weight, bias)
    return conv2d(x, weight, bias, (1, 1), (0, 0, 0, 0), "none")


def leaves_projection(x: Tensor) -> bool:
    """Whether PyTorch is as fast for a 1×1 convolution with gradients."""
    is_left = crossover.kind_of_threads(torch.get_num_threads()) in crossover.now.projection
    return is_left or not x.is_contiguous(memory_format=torch.channels_last)


def conv2d_pair(x: Tensor, *first_and_second: Any) -> Tensor:
    """One `conv2d` on the result of another, which the CPU kernel computes as it is read."""
    if is_direct(x):
        return torch.ops.ffnet_kernels.conv2d_pair.default(x, *first_and_second)
    weight, bias, stride, padding, activation = first_and_second[5:]
    x = conv2d(x, *first_and_second[:5])
    return ACTIVATE[activation](convolution(x, weight, bias, stride, padding, (1, 1), 1))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + scale · act(x · weight + bias)`` over the last dimension, whose rows are the pixels of a
    channels-last map."""
    is_few = has_few_rows(x) or x.shape[-1] != weight.shape[1]  # or the shapes do not match
    return (linear_of_few_rows if is_few else linear_of_many_rows)(x, weight, bias, activation, scale, residual)


def has_few_rows(x: Tensor) -> bool:
    """Whether a linear layer is bound by reading its weights, which PyTorch does as fast."""
    return x.numel() // x.shape[-1] <= crossover.now.few_rows


def linear_of_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    out = ACTIVATE[activation](F.linear(x, weight, bias))
    out = out if scale is None else out * scale.reshape(-1)
    return out if residual is None else residual + out


def linear_of_many_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    rows = x.numel() // x.shape[-1]

    def pixels(map: Tensor) -> Tensor:
        return map.reshape(1, rows, 1, map.shape[-1]).permute(0, 3, 1, 2)

    residual = residual if residual is None else pixels(residual)
    geometry = (1, 1), (0, 0, 0, 0)
    out = conv2d(pixels(x), weight[:, :, None, None], bias, *geometry, activation, scale, residual)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def ffnified_attention(query: Tensor, *args: Any) -> Tensor:
    *weights, scale, residual = args
    return _run("ffnified_attention", query, *weights, scale if scale is None else scale.reshape(-1), residual)


def channel_mixer(x: Tensor, *args: Any) -> Tensor:
    *weights, scale, residual = args
    weights[2], weights[4] = weights[2].flatten(1), weights[4].flatten(1)
    return _run("channel_mixer", x, *weights, scale if scale is None else scale.reshape(-1), residual)


def norm_mixer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """``residual + scale · (W₂ · act(W₁ · LayerNorm(DW(x)) + b₁) + b₂)``, ConvNeXt's block: one kernel on the CPU, else
    step by step."""
    scale = scale if scale is None else scale.reshape(-1)
    if is_direct(x):
        weights = expand_weight, expand_bias, project_weight, project_bias
        norm = norm_weight, norm_bias, eps
        return torch.ops.ffnet_kernels.norm_mixer.default(x, weight, bias, *norm, *weights, activation, scale, residual)
    channels = weight.shape[0]
    y = depthwise_conv2d(x, weight, bias, (1, 1), same_padding(weight), "none", channels).permute(0, 2, 3, 1)
    y = F.layer_norm(y, (channels,), norm_weight, norm_bias, eps)
    y = linear(y, expand_weight.flatten(1), expand_bias, activation)
    residual = residual if residual is None else residual.permute(0, 2, 3, 1)
    return linear(y, project_weight.flatten(1), project_bias, "none", scale, residual).permute(0, 3, 1, 2)


def batch_norm(x: Tensor, *norm: Any) -> Tensor:
    """``nn.BatchNorm`` by its running statistics.

    Args:
        norm: running mean, running variance, weight, bias (each [C] or None), eps, and a map's possible dimensions.
    """
    *vectors, eps, dimensions = norm
    if x.dim() not in dimensions:
        raise ValueError(f"expected a map of {dimensions} dimensions, got {x.dim()}")
    # PyTorch's gradients on channels-last maps assume that vectors have a stride of one.
    running_mean, running_var, weight, bias = map(dense, vectors)
    return torch.batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps, torch.backends.cudnn.enabled)


def dense(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def batch_norm_training(x: Tensor, *norm_and_activation: Any) -> Tensor:
    """``act(norm(x))`` by batch statistics: the fields of a `training.Norm`, then the activation, if any."""
    return training.batch_norm(x, training.Norm(*norm_and_activation[:7]), *norm_and_activation[7:])


def branched_depthwise(
    x: Tensor, weights: tuple[Tensor, ...], norms: tuple, stride: tuple[int, int], activation: str, channels: int
) -> Tensor:
    """``act(Σ norm(conv(x)))`` by batch statistics, with filters padded to keep the map's size."""
    if x.shape[1] != channels:
        raise ValueError(f"expected a map of {channels} channels, got {list(x.shape)}")
    return training.branched_depthwise(x, weights, [training.Norm(*norm) for norm in norms], stride, activation)


def feed_forward(x: Tensor, *args: Any) -> Tensor:
    *weights, activation, scale, residual = args
    scale = scale if scale is None else scale.reshape(-1)
    return training.feed_forward(x, *weights, activation=activation, scale=scale, residual=residual)


def is_direct(x: Tensor) -> bool:
    """Whether operators on a map certainly run on the CPU kernels."""
    return x.is_cpu and x.dtype in cpu.DTYPES and choice.prefers_cpu()


def _run(operator: str, *args: Any) -> Tensor:
    return OPERATORS[operator].on(choice.select(operator, args).NAME, *args)


#: All that are more than plain PyTorch.
FUSED = (
    depthwise_conv2d, conv2d, projection, conv2d_pair, linear, ffnified_attention, channel_mixer, norm_mixer,
    batch_norm_training, branched_depthwise, feed_forward,
)  # fmt: skip

#: Those that a native operator computes from the same leading arguments.
NATIVE = {
    depthwise_conv2d: torch.ops.ffnet_kernels.depthwise_conv2d.default,
    conv2d: torch.ops.ffnet_kernels.conv2d.default,
    conv2d_pair: torch.ops.ffnet_kernels.conv2d_pair.default,
    ffnified_attention: torch.ops.ffnet_kernels.ffnified_attention.default,
    channel_mixer: torch.ops.ffnet_kernels.channel_mixer.default,
    norm_mixer: torch.ops.ffnet_kernels.norm_mixer.default,
}
