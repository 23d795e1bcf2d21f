"""Launches the kernels of the channel mixer: shapes, tiles, grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import configs, depthwise
from .configs import MatrixShape
from .depthwise import same_padding, sum_partials
from .launch import launch, maps, vectors
from .mixer_kernels import (
    channel_mixer_backward_kernel,
    channel_mixer_forward_kernel,
    pointwise_backward_weight_kernel,
    pointwise_forward_kernel,
    pointwise_gradients_kernel,
)


def forward(
    out, x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation: str, scale, residual
) -> Tensor:  # fmt: skip
    mixed = _mixed(x, weight, bias)
    hidden, channels = expand_weight.shape
    residual = None if residual is None else even(residual)
    if configs.fuses_hidden(x.dtype, channels, project_weight.shape[0]):
        return _fused(out, mixed, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual)
    middle = _map_like(x, hidden)
    pointwise(middle, mixed, expand_weight, expand_bias, activation=activation)
    return pointwise(out, middle, project_weight, project_bias, scale=scale, residual=residual)


def _mixed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    top, _, left, _ = same_padding(weight)
    return depthwise.convolve(_map_like(x, x.shape[1]), x, weight, bias, top=top, left=left)


def _map_like(x: Tensor, channels: int) -> Tensor:
    """An uninitialised dense map over the pixels of x, channels innermost if those of x are."""
    last = configs.channels_innermost(x)
    return torch.empty(
        (x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def even(map: Tensor) -> Tensor:
    """The map with its pixels evenly in memory, as the matrix kernels take it: a copy only of unusual views."""
    height, width = map.shape[2:]
    if height == 1 or map.stride(2) == map.stride(3) * width:
        return map
    last = configs.channels_innermost(map)
    return map.clone(memory_format=torch.channels_last if last else torch.contiguous_format)


def pixel_grid(*tensors: Tensor | None) -> dict[str, int]:
    """The images of maps of one extent and the pixels of each; all as one image where they lie evenly in all maps."""
    given = [t for t in tensors if t is not None]
    images, _, height, width = given[0].shape
    if all(t.stride(0) == t.stride(3) * height * width for t in given):
        return {"images": 1, "count": images * height * width}
    return {"images": images, "count": height * width}


def precision(dtype: torch.dtype) -> str:
    """Of products of float32 numbers: TensorFloat-32 where torch's flag for convolutions allows it."""
    if dtype != torch.float32:
        return "ieee"
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # once the newer flag has been used, torch refuses to read the older one
        convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        allowed = convolutions.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def pointwise(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "none",
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``out = residual + scale · act(weight·x + bias)``, weight [O, C] of any strides."""
    outputs, channels = weight.shape
    grid = pixel_grid(x, out, residual)
    shape = MatrixShape.of("pointwise", x, grid, channels, outputs)
    tile = configs.choose_matrix(shape, x.device)
    blocks = grid["images"] * -(-grid["count"] // tile.block_p)
    launch(
        pointwise_forward_kernel, blocks * -(-outputs // tile.block_o), x.device, warps=tile.warps,
        stages=tile.stages, **maps(x=x, weight=weight, residual=residual, out=out), **vectors(bias=bias, scale=scale),
        **grid, channels=channels, outputs=outputs, ACTIVATION=activation,
        PRECISION=precision(x.dtype), **tile.blocks(),
    )  # fmt: skip
    return out


def _fused(
    out, mixed, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> Tensor:  # fmt: skip
    hidden, channels = expand_weight.shape
    outputs = project_weight.shape[0]
    grid = pixel_grid(mixed, out, residual)
    shape = MatrixShape.of("channel_mixer", mixed, grid, channels, outputs)
    tile = configs.choose_matrix(shape, mixed.device)
    blocks = grid["images"] * -(-grid["count"] // tile.block_p)
    launch(
        channel_mixer_forward_kernel, blocks, mixed.device, warps=tile.warps, stages=tile.stages,
        **maps(mixed=mixed, expand_weight=expand_weight, project_weight=project_weight, residual=residual, out=out),
        **vectors(expand_bias=expand_bias, project_bias=project_bias, scale=scale),
        **grid, channels=channels, hidden=hidden, outputs=outputs,
        ACTIVATION=activation, PRECISION=precision(mixed.dtype), BLOCK_P=tile.block_p,
        BLOCK_O=configs.covering(outputs), BLOCK_K=configs.covering(channels), BLOCK_H=tile.block_k,
    )  # fmt: skip
    return out


def backward(
    grad, x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation: str, scale, residual,
    mask,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of all tensors but the residual; None where one is not needed."""
    hidden, channels = expand_weight.shape
    grad = even(grad)
    mixed = _mixed(x, weight, bias)
    middle, grad_before = _map_like(x, hidden), _map_like(x, hidden)
    scaled = project_weight if scale is None else project_weight * scale[:, None]
    grid = pixel_grid(grad, mixed, middle, grad_before)
    shape = MatrixShape.of("channel_mixer_backward", x, grid, channels, hidden)
    tile = configs.choose_matrix(shape, x.device)
    blocks = grid["images"] * -(-grid["count"] // tile.block_p)
    launch(
        channel_mixer_backward_kernel, blocks * -(-hidden // tile.block_o), x.device,
        warps=tile.warps, stages=tile.stages,
        **maps(grad=grad, mixed=mixed, expand_weight=expand_weight, project_weight=scaled, hidden_map=middle,
               grad_before=grad_before),
        **vectors(expand_bias=expand_bias), **grid, channels=channels,
        hidden=hidden, outputs=grad.shape[1], ACTIVATION=activation, PRECISION=precision(x.dtype), **tile.blocks(),
    )  # fmt: skip
    first: list[Tensor | None] = [None, None, None]
    if any(mask[:3]):
        grad_mixed = pointwise(torch.empty_like(mixed), grad_before, expand_weight.t(), None)
        first = depthwise.convolve_backward(grad_mixed, x, weight, (1, 1), same_padding(weight), mask[:3])
    expand: list[Tensor | None] = [None, None]
    if any(mask[3:5]):
        expand = pointwise_gradients(grad_before, mixed, expand_weight, mask[3:5])[:2]
    project: list[Tensor | None] = [None, None, None]
    if any(mask[5:8]):
        project = pointwise_gradients(
            grad, middle, project_weight, mask[5:8], bias=project_bias, scale=scale,
        )  # fmt: skip
    return [*first, *expand, *project]


def pointwise_gradients(grad, x, weight, mask, *, bias=None, scale=None) -> list[Tensor | None]:
    """[weight, bias, scale] gradients of ``scale · (weight·x + bias)``, None where the mask does not ask for one."""
    outputs, channels = weight.shape
    grid = pixel_grid(grad, x)
    shape = MatrixShape.of("pointwise_weight", x, grid, channels, outputs)
    tile = configs.choose_matrix(shape, x.device)
    blocks = -(-outputs // tile.block_o) * -(-channels // tile.block_k)
    splits = min(grid["images"] * -(-grid["count"] // tile.block_p), max(1, configs.PROGRAMS // blocks))
    partials = x.new_empty((splits, outputs, channels), dtype=torch.float32)
    bias_partials = x.new_empty((splits, outputs), dtype=torch.float32)
    launch(
        pointwise_backward_weight_kernel, blocks * splits, x.device, warps=tile.warps, stages=tile.stages,
        **maps(grad=grad, x=x), **grid, partials=partials, bias_partials=bias_partials, channels=channels,
        outputs=outputs, splits=splits, PRECISION=precision(x.dtype), **tile.blocks(),
    )  # fmt: skip
    grad_weight = torch.empty_like(weight) if mask[0] else None
    grad_bias = weight.new_empty(outputs) if mask[1] else None
    grad_scale = weight.new_empty(outputs) if len(mask) > 2 and mask[2] else None
    block_o = 16
    launch(
        pointwise_gradients_kernel, -(-outputs // block_o), x.device, warps=4,
        sums=sum_partials(partials), bias_sums=sum_partials(bias_partials),
        **maps(weight=weight, grad_weight=grad_weight),
        **vectors(bias=bias, scale=scale), grad_bias=grad_bias, grad_scale=grad_scale,
        channels=channels, outputs=outputs, BLOCK_O=block_o, BLOCK_K=128,
    )  # fmt: skip
    return [grad_weight, grad_bias, grad_scale]
