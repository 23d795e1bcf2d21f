"""Memory formats and padding, following the conventions of torch's convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def same_padding(weight: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that keep a map's size: kernel - 1 in total, an odd pixel at the end, as in torch."""
    kh, kw = int(weight.shape[2]), int(weight.shape[3])  # never symbolic: convolution takes plain numbers
    return (kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2


def suggests_channels_last(x: Tensor) -> bool:
    """Whether a convolution of this tensor returns channels-last: torch's own test of strides, ties to NCHW."""
    stride, least = x.stride(), 0
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * x.shape[d] if x.shape[d] > 1 else stride[d]
    return True


def empty_output(shape: Sequence[int], maps: Sequence[Tensor]) -> Tensor:
    """Uninitialised [N, C, H, W] in the format ``conv2d`` would give: channels-last if its input or filter is."""
    channels_last = any(suggests_channels_last(t) for t in maps)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=memory_format)


def as_pixels(map: Tensor) -> Tensor:
    """A map as the matrix of its pixels, ``[N·H·W, C]``: a view if it is channels-last."""
    return map.permute(0, 2, 3, 1).reshape(-1, map.shape[1])


def as_map(pixels: Tensor, like: Tensor) -> Tensor:
    """A matrix of pixels as a channels-last map with the size of another map."""
    n, _, height, width = like.shape
    return pixels.reshape(n, height, width, pixels.shape[1]).permute(0, 3, 1, 2)
