"""FFNet-SR, super-resolution of pictures: "FFNet: MetaMixer-based Efficient Convolutional Mixer Design"
(arXiv 2406.02021). Module names follow the published checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerNorm2d
from .mixers import MetaMixer
from .registry import register_model

__all__ = ["SCALES", "FFNetSR", "ffnet_sr_large", "ffnet_sr_light", "sr_arguments", "upscale"]

#: Supported factors.
SCALES = (2, 3, 4)
NORMS = ("none", "layer", "batch")


def _numbered(dim: int, norm: str, modules: list[nn.Module], **factory: Any) -> MetaMixer:
    """A mixer whose four parts are named by numbers; a norm (layer norm first, batch norm second) shifts those after
    it."""
    if norm == "layer":
        modules = [LayerNorm2d(dim, **factory), *modules]
    elif norm == "batch":
        modules = [modules[0], nn.BatchNorm2d(dim, **factory), *modules[1:]]
    *query, interaction, activation, aggregation = ((str(i), module) for i, module in enumerate(modules))
    return MetaMixer(query=query, interaction=interaction, activation=activation, aggregation=aggregation)


class SRBlock(nn.Module):
    """FFNified attention, then a convolutional FFN, each residual, all convolutions biased: [N, C, H, W] → the same."""

    def __init__(self, dim: int, expansion: float, norm: str, **factory: Any) -> None:
        super().__init__()
        hidden = round(expansion * dim)

        def pointwise(inputs: int, outputs: int) -> nn.Module:
            return nn.Conv2d(inputs, outputs, 1, **factory)

        def depthwise() -> nn.Module:
            return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

        token = [pointwise(dim, dim), depthwise(), nn.GELU(), depthwise()]
        channel = [depthwise(), pointwise(dim, hidden), nn.GELU(), pointwise(hidden, dim)]
        self.token_mixer = _numbered(dim, norm, token, **factory)
        self.channel_mixer = _numbered(dim, norm, channel, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixer(x)
        return x + self.channel_mixer(x)


class FFNetSR(nn.Module):
    """FFNet-SR: a picture [N, in_chans, H, W] → [N, in_chans, scale·H, scale·W], any H and W; values in [0, 1].

    The network adds detail to the nearest-neighbour enlargement. Results are not clamped to [0, 1].

    Args:
        scale: Factor, one of ``SCALES``.
        depth: Blocks.
        dim: C.
        expansion: Hidden width of the channel mixers relative to C.
        norm: In each mixer: ``"none"``, as published, ``"layer"`` before it, or ``"batch"`` after its first
            convolution.
        in_chans: Channels of the picture.

    Raises:
        ValueError: If an argument is out of range, with the value received.
    """

    def __init__(
        self,
        scale: int = 2,
        depth: int = 36,
        dim: int = 96,
        expansion: float = 2,
        norm: str = "none",
        in_chans: int = 3,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"expected a scale of 2, 3 or 4, got {scale!r}")
        if norm not in NORMS:
            raise ValueError(f"expected norm 'none', 'layer' or 'batch', got {norm!r}")
        if min(depth, dim, in_chans, round(expansion * dim)) < 1:
            raise ValueError(
                f"expected depth, dim, in_chans and the hidden width to be positive, got {depth}, {dim}, {in_chans}, "
                f"{round(expansion * dim)}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale, self.in_chans = scale, in_chans
        self.config: dict[str, Any] = {"input_size": (in_chans, 360, 640)}
        self.proj = nn.Conv2d(in_chans, dim, 3, padding=1, **factory)
        self.body = nn.Sequential(*(SRBlock(dim, expansion, norm, **factory) for _ in range(depth)))
        self.conv_bef_up = nn.Conv2d(dim, in_chans * scale**2, 3, padding=1, **factory)

    @property
    def receptive_radius(self) -> int:
        """Radius of the receptive field in pixels of the small picture: one for every 3×3 convolution in sequence."""
        return 2 + 3 * len(self.body)

    def forward(self, x: Tensor) -> Tensor:
        details = self.conv_bef_up(self.body(self.proj(x)))
        return F.pixel_shuffle(details + x.repeat_interleave(self.scale**2, dim=1), self.scale)


@torch.no_grad()
def upscale(model: FFNetSR, x: Tensor, *, tile: int | None = None, overlap: int | None = None) -> Tensor:
    """Enlarges a picture tile by tile, so that memory for maps is that of one tile, whatever the picture's size.

    With the default overlap, the receptive radius, the result equals that for the whole picture to rounding: tiles at
    the picture's border have the network's zero padding there, all others real pixels. A smaller overlap saves work but
    is an approximation: pixels closer to a seam than the receptive radius may differ.

    Args:
        model: In eval mode.
        x: [N, in_chans, H, W]: in [0, 1], or uint8 from 0 to 255. Of uint8, only a tile is ever in floating point, and
            the result is rounded to uint8, too.
        tile: Maximum side of a tile in pixels of x, without overlap; None for the whole picture at once.
        overlap: Pixels of x added on each side of a tile; None for ``model.receptive_radius``.

    Returns:
        [N, in_chans, scale·H, scale·W].

    Raises:
        ValueError: If the model is in training mode, x has a wrong shape, or a number is out of range.
    """
    if model.training:
        raise ValueError("expected a model in eval mode, got one in training mode")
    if x.dim() != 4 or x.shape[1] != model.in_chans or 0 in x.shape[2:]:
        raise ValueError(f"expected a picture [N, {model.in_chans}, H, W], got the shape {list(x.shape)}")
    if tile is not None and tile < 1:
        raise ValueError(f"expected a tile of at least 1 pixel, got {tile}")
    if overlap is not None and overlap < 0:
        raise ValueError(f"expected an overlap of 0 or more pixels, got {overlap}")
    if tile is None:
        return _enlarged(model, x)
    height, width = x.shape[2:]
    margin, s = model.receptive_radius if overlap is None else overlap, model.scale
    out = x.new_empty(*x.shape[:2], s * height, s * width)
    for rows, columns in itertools.product(_spans(height, tile, margin), _spans(width, tile, margin)):
        enlarged = _enlarged(model, x[:, :, rows.first : rows.last, columns.first : columns.last])
        out[:, :, s * rows.start : s * rows.stop, s * columns.start : s * columns.stop] = enlarged[
            :, :, s * (rows.start - rows.first) : s * (rows.stop - rows.first),
            s * (columns.start - columns.first) : s * (columns.stop - columns.first),
        ]  # fmt: skip
    return out


def _enlarged(model: FFNetSR, x: Tensor) -> Tensor:
    if x.dtype != torch.uint8:
        return model(x)
    return (model(x.to(model.proj.weight.dtype) / 255).clamp(0, 1) * 255).round().to(torch.uint8)


class _Span(NamedTuple):
    """One axis of a tile: of the pixels read, ``first`` to ``last``, those from ``start`` to ``stop`` are kept."""

    start: int
    stop: int
    first: int
    last: int


def _spans(length: int, tile: int, margin: int) -> list[_Span]:
    """Tiles along one axis of a picture, all of the same size, so that kernels and programs see one shape only."""
    if length <= tile + 2 * margin:
        return [_Span(0, length, 0, length)]
    count = -(-length // tile)
    edges = [length * i // count for i in range(count + 1)]
    needed = [(max(a - margin, 0), min(b + margin, length)) for a, b in itertools.pairwise(edges)]
    most = max(last - first for first, last in needed)
    firsts = [min(first, length - most) for first, _ in needed]
    return [_Span(a, b, first, first + most) for (a, b), first in zip(itertools.pairwise(edges), firsts, strict=True)]


def sr_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the `FFNetSR` that a state dict, as trained or folded, belongs to.

    Raises:
        ValueError: If it belongs to another kind of model.
    """
    try:
        dim, in_chans = state["proj.weight"].shape[:2]
        ratio = state["conv_bef_up.weight"].shape[0] / in_chans
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
        first = state["body.0.token_mixer.0.weight"]
        norm = "layer" if first.dim() == 1 else "batch" if "body.0.token_mixer.4.weight" in state else "none"
        hidden = state[f"body.0.channel_mixer.{1 if norm == 'none' else 2}.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"no weights of FFNet-SR: something is missing or odd: {error}") from error
    scale = next((s for s in SCALES if s * s == ratio), None)
    if scale is None:
        raise ValueError(f"expected weights for a scale of 2, 3 or 4, got {ratio:g} output pixels a pixel")
    return {
        "scale": scale, "depth": depth, "dim": dim, "expansion": hidden / dim, "norm": norm, "in_chans": in_chans,
    }  # fmt: skip


@register_model(
    task="super-resolution",
    published="x2 PSNR: Set5 38.23, Urban100 32.81, Manga109 39.23",
    checked="sizes, keys, folds, kernels, tiles, training",
)
def ffnet_sr_light(**kwargs: Any) -> FFNetSR:
    """FFNet-SR light: 36 blocks, 1.79 M parameters (×2); PSNR/SSIM ×2 as published: Set5 38.23/.9613, Urban100
    32.81/.9344, Manga109 39.23/.9781."""
    return FFNetSR(**{"depth": 36, **kwargs})


@register_model(
    task="super-resolution",
    published="x2 PSNR: Set5 38.32, Urban100 33.23, Manga109 39.76",
    checked="sizes, keys, folds, kernels",
)
def ffnet_sr_large(**kwargs: Any) -> FFNetSR:
    """FFNet-SR large: 48 blocks, 2.38 M parameters (×2); PSNR ×2 as published: Set5 38.32, Urban100 33.23, Manga109
    39.76."""
    return FFNetSR(**{"depth": 48, **kwargs})
