"""UPerNet's decode head, "Unified Perceptual Parsing for Scene Understanding" (arXiv 1807.10221)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvBN, DropChannels

__all__ = ["UPerHead"]

POOL_SIZES = (1, 2, 3, 6)


class UPerHead(nn.Module):
    """Pyramid pooling of the smallest map, then a feature pyramid of all: maps [N, Cᵢ, Hᵢ, Wᵢ], the largest first →
    [N, num_classes, H₀, W₀].

    Args:
        in_channels: Cᵢ.
        num_classes: Outputs.
        width: Channels of the pyramid.
        drop_rate: Rate at which channels are dropped before the last layer.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, width: int = 512, drop_rate: float = 0.1, **factory: Any
    ) -> None:
        super().__init__()

        def layer(inputs: int, kernel_size: int) -> nn.Module:
            return nn.Sequential(ConvBN(inputs, width, kernel_size, **factory), nn.ReLU())

        *larger, last = in_channels
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(size), layer(last, 1)) for size in POOL_SIZES)
        self.bottleneck = layer(last + len(POOL_SIZES) * width, 3)
        self.laterals = nn.ModuleList(layer(channels, 1) for channels in larger)
        self.outputs = nn.ModuleList(layer(width, 3) for _ in larger)
        self.fuse = layer(len(in_channels) * width, 3)
        self.dropout = DropChannels(drop_rate)
        self.conv_seg = nn.Conv2d(width, num_classes, 1, **factory)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *larger, last = maps
        pooled = [_enlarged(pool(last), last) for pool in self.pools]
        top = self.bottleneck(torch.cat([last, *pooled], 1))
        pyramid = [lateral(x) for lateral, x in zip(self.laterals, larger, strict=True)]
        above = top
        for i in reversed(range(len(pyramid))):
            pyramid[i] = above = pyramid[i] + _enlarged(above, pyramid[i])
        levels = [*(output(x) for output, x in zip(self.outputs, pyramid, strict=True)), top]
        x = self.fuse(torch.cat([levels[0], *(_enlarged(x, levels[0]) for x in levels[1:])], 1))
        return self.conv_seg(self.dropout(x))


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
