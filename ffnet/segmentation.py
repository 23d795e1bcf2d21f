"""Semantic segmentation: FFNet-Seg with its decode head, and UPerNet on FFNet-2 to 4 backbones.

Children are named ``backbone`` and ``decode_head``; names below follow the published FFNet-Seg checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import DENSE_CONFIG, FFNetBackbone
from .layers import ConvBN, DropChannels
from .mixers import ResidualMixer, conv_ffn_mixer, ffnified_attention_mixer
from .model import PRESETS, FFNetTrunk, init_weights, new_classifier
from .registry import register_model
from .upernet import UPerHead

__all__ = [
    "FFNetSeg",
    "FFNetSegBackbone",
    "FFNetSegClassifier",
    "SegHead",
    "Segmenter",
    "UPerNet",
    "ffnet_2_upernet",
    "ffnet_3_upernet",
    "ffnet_4_upernet",
    "ffnet_seg",
    "ffnet_seg_ade20k",
    "ffnet_seg_cityscapes",
    "ffnet_seg_features",
    "label_map",
]

SEG_PRESET: dict[str, Any] = {
    "depths": (3, 4, 18, 5),
    "dims": (96, 192, 384, 768),
    "token_kernels": (3, 3, 9, 9),
    "channel_kernel": 3,
    "expansion": 4,
    "layer_scale_init": 1e-5,
    "strips": True,
}
#: Rows of logits that `label_map` enlarges at a time.
BAND = 64


class SegStem(nn.Sequential):
    """Four 3×3 convolutions, the first and the last of stride 2: [N, I, H, W] → [N, dim, H/4, W/4]."""

    def __init__(self, in_chans: int, width: int, dim: int, **factory: Any) -> None:
        super().__init__(
            ConvBN(in_chans, width, 3, stride=2, **factory),
            nn.GELU(),
            ConvBN(width, width, 3, **factory),
            nn.GELU(),
            ConvBN(width, dim, 3, **factory),
            ConvBN(dim, dim, 3, stride=2, **factory),
        )


class SegDownsample(nn.Module):
    """Dense 3×3 of stride 2, GELU, 1×1: [N, I, H, W] → [N, O, H/2, W/2]."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ConvBN(in_dim, 2 * dim, 3, stride=2, **factory), nn.GELU(), ConvBN(2 * dim, dim, **factory)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FFNetSegBackbone(FFNetBackbone):
    """The backbone of FFNet-Seg; by default it returns maps of strides 8, 16 and 32, without norms."""

    stem_type = SegStem
    downsample_type = SegDownsample

    def __init__(
        self, depths: Sequence[int], dims: Sequence[int], *, out_indices: int | Sequence[int] = 3, **options: Any
    ) -> None:
        super().__init__(depths, dims, out_indices=out_indices, **{"norms": False, **options})


class FFNetSegClassifier(FFNetTrunk):
    """FFNet-Seg with its pre-training heads: [N, in_chans, H, W] → [N, num_classes].

    Args:
        num_classes: Number of classes; 0 for the features before the last layer [N, 1280].
        **trunk: As for `ffnet.model.FFNetTrunk`.
    """

    stem_type = SegStem
    downsample_type = SegDownsample
    widths = 1024, 1280

    def __init__(self, depths: Sequence[int], dims: Sequence[int], *, num_classes: int = 1000, **trunk: Any) -> None:
        super().__init__(depths, dims, **trunk)
        factory: dict[str, Any] = {"device": trunk.get("device"), "dtype": trunk.get("dtype")}
        pooled, self.head_hidden_size = self.widths
        self.head1 = nn.Sequential(ConvBN(dims[-1], pooled, **factory), nn.Hardswish(), nn.AdaptiveAvgPool2d(1))
        self.head2 = nn.Sequential(
            nn.Linear(pooled, self.head_hidden_size, **factory),
            nn.LayerNorm(self.head_hidden_size, eps=1e-6, **factory),
            nn.Hardswish(),
            nn.Identity(),
        )
        self.config["classifier"] = "head2.3"
        self.reset_classifier(num_classes)
        self.apply(init_weights)

    def get_classifier(self) -> nn.Module:
        return self.head2[3]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer by a new one with ``num_classes`` outputs; 0 for no layer.

        Raises:
            ValueError: If ``num_classes`` is negative, or ``global_pool``, timm's argument, is not ``"avg"``.
        """
        self.head2[3] = new_classifier(
            self.head_hidden_size, num_classes, global_pool, self.get_parameter("head2.0.weight")
        )
        self.num_classes = self.config["num_classes"] = num_classes

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of the last stage → [N, num_classes]; with ``pre_logits``, stops before the last layer: [N, 1280]."""
        x = self.head1(x).flatten(1)
        return self.head2[:3](x) if pre_logits else self.head2(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class HeadBlock(nn.Module):
    """Token mixer, then channel mixer, both residual, GELU after each: [N, C, H, W] → [N, C, H, W]."""

    def __init__(self, dim: int, kernel_size: int, expansion: float, **factory: Any) -> None:
        super().__init__()
        token = ffnified_attention_mixer(dim, kernel_size, strips=True, **factory)
        channel = conv_ffn_mixer(dim, kernel_size, expansion, strips=True, **factory)
        self.token_mixer = ResidualMixer(token, dim, **factory)
        self.channel_mixer = ResidualMixer(channel, dim, **factory)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.channel_mixer(self.act(self.token_mixer(x))))


class SegHead(nn.Module):
    """Decode head of FFNet-Seg: maps [N, Cᵢ, Hᵢ, Wᵢ], the largest first → [N, num_classes, H₀, W₀].

    Args:
        in_channels: Cᵢ.
        num_classes: Outputs.
        blocks: Number of blocks, each a token and a channel mixer.
        expansion: Hidden width of the channel mixers relative to ``width``.
        width: Channels of the blocks.
        align_width: Channels before the last layer.
        kernel_size: Depthwise kernel of both mixers.
        drop_rate: Rate at which channels are dropped before the last layer.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        blocks: int = 3,
        expansion: float = 4,
        width: int = 256,
        align_width: int = 1024,
        kernel_size: int = 9,
        drop_rate: float = 0.1,
        **factory: Any,
    ) -> None:
        super().__init__()
        channels = sum(in_channels)
        self.squeeze = nn.Sequential(
            ConvBN(channels, channels, **factory), nn.GELU(), ConvBN(channels, width, **factory)
        )
        self.head_blocks = nn.Sequential(*(HeadBlock(width, kernel_size, expansion, **factory) for _ in range(blocks)))
        self.align = nn.Sequential(ConvBN(width, align_width, **factory), nn.GELU())
        self.dropout = DropChannels(drop_rate)
        self.conv_seg = nn.Conv2d(align_width, num_classes, 1, **factory)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        smaller = [F.interpolate(x, size, mode="bicubic", align_corners=False) for x in maps[1:]]
        x = self.squeeze(torch.cat([maps[0], *smaller], 1))
        return self.conv_seg(self.dropout(self.align(self.head_blocks(x))))


def label_map(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The most likely class of each pixel, from bilinearly enlarged logits: [N, K, h, w] → [N, *size], int64.

    A few rows of logits are enlarged at a time, so that the full-size map of all classes is never in memory.
    """
    height, width = size
    h, like = logits.shape[2], logits.device
    bands = []
    for first in range(0, height, BAND):
        last = min(first + BAND, height)
        # Centres of the rows, in rows of the logits, as F.interpolate has them.
        place = ((torch.arange(first, last, dtype=torch.float64) + 0.5) * (h / height) - 0.5).clamp(min=0)
        above = place.long()
        share = (place - above).to(like, logits.dtype)[:, None]
        above, below = above.to(like), (above + 1).clamp(max=h - 1).to(like)
        part = torch.lerp(logits[:, :, above], logits[:, :, below], share)
        bands.append(F.interpolate(part, (last - first, width), mode="bilinear", align_corners=False).argmax(1))
    return torch.cat(bands, 1)


class Segmenter(nn.Module):
    """A backbone and a decode head: [N, in_chans, H, W] → logits [N, num_classes, h, w], any H and W.

    h × w is the size of the backbone's largest map: an eighth of H × W for FFNet-Seg, a quarter for UPerNet. `predict`
    gives the classes of all pixels.
    """

    def __init__(self, backbone: FFNetBackbone, decode_head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.num_classes = num_classes
        self.config = {**backbone.config, "num_classes": num_classes, "classifier": "decode_head.conv_seg"}
        self.decode_head.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))

    def predict(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Predicts the class of each pixel: [N, in_chans, H, W] → int64 [N, H, W], or of another ``size``."""
        return label_map(self(x), x.shape[2:] if size is None else size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As for the backbone, see `ffnet.model.FFNetTrunk.set_grad_checkpointing`."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay besides one-dimensional ones."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def _require_classes(num_classes: int) -> int:
    if num_classes < 1:
        raise ValueError(f"expected num_classes >= 1, got {num_classes}")
    return num_classes


class FFNetSeg(Segmenter):
    """FFNet-Seg: backbone of strides 8 to 32 and `SegHead`.

    Args:
        num_classes: Outputs.
        head: Arguments of `SegHead` that override its defaults.
        config, device, dtype, **trunk: Of the backbone, see `ffnet.model.FFNetTrunk`.
    """

    def __init__(
        self,
        num_classes: int = 150,
        head: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **trunk: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        backbone = FFNetSegBackbone(**{**SEG_PRESET, **trunk}, config={**DENSE_CONFIG, **(config or {})}, **factory)
        channels = backbone.feature_info.channels()
        super().__init__(
            backbone, SegHead(channels, _require_classes(num_classes), **{**(head or {}), **factory}), num_classes
        )


class UPerNet(Segmenter):
    """UPerNet (arXiv 1807.10221) on a backbone of strides 4 to 32.

    Args:
        preset: Arguments of the backbone, see `ffnet.model.FFNetTrunk`.
        num_classes: Outputs.
        width: Channels of the head.
        config, device, dtype, **trunk: Arguments of the backbone that override those of ``preset``.
    """

    def __init__(
        self,
        preset: Mapping[str, Any],
        num_classes: int = 150,
        width: int = 512,
        config: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **trunk: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        backbone = FFNetBackbone(**{**preset, **trunk}, config={**DENSE_CONFIG, **(config or {})}, **factory)
        channels = backbone.feature_info.channels()
        super().__init__(backbone, UPerHead(channels, _require_classes(num_classes), width, **factory), num_classes)


@register_model(task="classification", published="-", checked="sizes, keys, folds, kernels, training")
def ffnet_seg(**kwargs: Any) -> FFNetSegClassifier:
    """FFNet-Seg with its ImageNet pre-training heads; no score has been published."""
    return FFNetSegClassifier(**{**SEG_PRESET, **kwargs})


@register_model(task="features", published="-", checked="sizes, keys, folds, kernels")
def ffnet_seg_features(**kwargs: Any) -> FFNetSegBackbone:
    """The backbone of FFNet-Seg: 63.8 M parameters as trained."""
    return FFNetSegBackbone(**{**SEG_PRESET, "config": DENSE_CONFIG, **kwargs})


@register_model(task="segmentation", published="50.1 mIoU ADE20K", checked="sizes, keys, folds, kernels, training")
def ffnet_seg_ade20k(**kwargs: Any) -> FFNetSeg:
    """FFNet-Seg for the 150 classes of ADE20K: 68.5 M parameters as trained, 50.1 mIoU at one scale as published."""
    return FFNetSeg(**kwargs)


@register_model(task="segmentation", published="83.2 mIoU Cityscapes", checked="sizes, keys, folds, kernels")
def ffnet_seg_cityscapes(**kwargs: Any) -> FFNetSeg:
    """FFNet-Seg for the 19 classes of Cityscapes: 67.8 M parameters as trained, 83.2 mIoU as published."""
    head = {"blocks": 5, "expansion": 1, **(kwargs.pop("head", None) or {})}
    return FFNetSeg(**{"num_classes": 19, "config": {"input_size": (3, 1024, 1024)}, **kwargs}, head=head)


@register_model(task="segmentation", published="47.1 mIoU ADE20K", checked="folds, kernels, training")
def ffnet_2_upernet(**kwargs: Any) -> UPerNet:
    """UPerNet on FFNet-2: 47.1 mIoU on ADE20K as published; the head's keys are our own."""
    return UPerNet(PRESETS["ffnet_2"], **kwargs)


@register_model(task="segmentation", published="49.6 mIoU ADE20K", checked="folds, kernels")
def ffnet_3_upernet(**kwargs: Any) -> UPerNet:
    """UPerNet on FFNet-3: 49.6 mIoU on ADE20K as published; the head's keys are our own."""
    return UPerNet(PRESETS["ffnet_3"], **kwargs)


@register_model(task="segmentation", published="50.7 mIoU ADE20K", checked="folds, kernels")
def ffnet_4_upernet(**kwargs: Any) -> UPerNet:
    """UPerNet on FFNet-4: 50.7 mIoU on ADE20K as published; the head's keys are our own."""
    return UPerNet(PRESETS["ffnet_4"], **kwargs)
