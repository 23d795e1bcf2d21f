"""Launches the kernels of FFNified attention: shapes, tiles, grids."""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs
from .attention_kernels import ffnified_attention_backward_kernel, ffnified_attention_forward_kernel
from .configs import Shape
from .depthwise import convolve, filter_gradients, filters, sum_partials
from .launch import launch, maps, vectors

#: Filter heights of the fused kernels. A taller filter would recompute more of the middle map than it saves traffic:
#: its two convolutions are bound by arithmetic, and run one after the other.
FUSED = (3, 5, 7)


def fused(key: Tensor, value: Tensor) -> bool:
    return key.shape == value.shape and key.shape[2] in FUSED and key.shape[3] <= max(FUSED)


def forward(out, query, key, key_bias, value, value_bias, activation: str, scale, residual) -> Tensor:
    if not fused(key, value):
        middle = torch.empty_like(query)
        tops, lefts = zip(*(((w.shape[2] - 1) // 2, (w.shape[3] - 1) // 2) for w in (key, value)), strict=True)
        convolve(middle, query, key, key_bias, top=tops[0], left=lefts[0], activation=activation)
        return convolve(out, middle, value, value_bias, top=tops[1], left=lefts[1], scale=scale, other=residual)
    shape = Shape.of("attention", query, query.shape, key.shape[2])
    tile = configs.choose(shape, query.device)
    share = configs.share(tile, shape, overlap=key.shape[3] - 1)
    launch(
        ffnified_attention_forward_kernel, share["splits"] * -(-shape.channels // tile.block_c), query.device,
        warps=tile.warps,
        **maps(query=query, residual=residual, out=out), **filters(query, key=key, value=value),
        **vectors(key_bias=key_bias, value_bias=value_bias, scale=scale),
        images=shape.images, channels=shape.channels, height=shape.height, width=shape.width,
        kernel_width=key.shape[3],
        ACTIVATION=activation, TAPS=key.shape[2], HALO=tile.rows < shape.height, **share, **tile.blocks(),
    )  # fmt: skip
    return out


def backward(
    grad, query, key, key_bias, value, value_bias, activation: str, scale, residual, mask
) -> list[Tensor | None] | None:
    """The gradients of all tensors but the residual, by one kernel; None if the convolutions have to run one by one."""
    if not fused(key, value):
        return None
    kernel_height, kernel_width = key.shape[2:]
    shape = Shape.of("attention_backward", query, query.shape, kernel_height)
    tile = configs.choose(shape, query.device)
    share = configs.share(tile, shape, overlap=kernel_width - 1, sums=2 * (kernel_height * kernel_width + 1))
    grad_query = torch.empty_like(query)
    sums = (2, share["splits"], kernel_height * kernel_width + 1, shape.channels)
    partials = query.new_empty(sums, dtype=torch.float32)
    launch(
        ffnified_attention_backward_kernel, share["splits"] * -(-shape.channels // tile.block_c), query.device,
        warps=tile.warps, **maps(grad=grad, query=query, grad_query=grad_query),
        **filters(query, key=key, value=value), **vectors(key_bias=key_bias, scale=scale),
        key_partials=partials[0], value_partials=partials[1], images=shape.images, channels=shape.channels,
        height=shape.height, width=shape.width, kernel_width=kernel_width, ACTIVATION=activation, TAPS=kernel_height,
        HALO=tile.rows < shape.height, **share, **tile.blocks(),
    )  # fmt: skip
    key_grads = filter_gradients(sum_partials(partials[0]), key, mask[1:3])
    value_grads = filter_gradients(sum_partials(partials[1]), value, mask[3:6], bias=value_bias, scale=scale)
    return [grad_query, *key_grads, *value_grads]
