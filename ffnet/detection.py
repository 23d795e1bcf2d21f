"""Backbones for torchvision's detectors; needs torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .registry import create_model

__all__ = ["PyramidBackbone", "pyramid_backbone"]


class PyramidBackbone(nn.Module):
    """A backbone with torchvision's feature pyramid: [N, C, H, W] → maps of ``out_channels`` by name, as detectors
    expect.

    Names are ``"0"`` for the largest map and so on, then those of ``extra``.

    Args:
        backbone: A model of task "features", such as `ffnet.FFNetBackbone`.
        out_channels: Channels of every map.
        extra: Block of `torchvision.ops.feature_pyramid_network` that adds smaller maps; by default one by pooling,
            named ``"pool"``.
    """

    def __init__(self, backbone: nn.Module, out_channels: int = 256, extra: nn.Module | None = None) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        self.body = backbone
        info: Any = getattr(backbone, "feature_info", None)
        if not hasattr(info, "channels"):  # classifiers have a list in its place
            raise ValueError(f"expected a backbone such as ffnet_1_features, got {type(backbone).__name__}")
        channels: Sequence[int] = info.channels()
        self.fpn: nn.Module = FeaturePyramidNetwork(list(channels), out_channels, extra or LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): map_ for i, map_ in enumerate(self.body(x))})


def pyramid_backbone(name: str, *, out_channels: int = 256, extra: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    """Builds a `PyramidBackbone` from a registered model; ``**kwargs`` are those of `ffnet.create_model`.

    >>> backbone = pyramid_backbone("ffnet_1_features", checkpoint="backbone.pth")
    >>> detector = torchvision.models.detection.FasterRCNN(backbone, num_classes=91)

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If the model is no backbone.
    """
    return PyramidBackbone(create_model(name, **kwargs), out_channels, extra)
