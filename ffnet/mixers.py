"""MetaMixer, its instances, and the residual wrapper that FFNet's blocks are built from.

Section 3 of "FFNet: MetaMixer-based Efficient Convolutional Mixer Design" (arXiv 2406.02021) describes self-attention
and the feed-forward network as one mixer: query projection, query–key interaction, activation, coefficient–value
interaction. The three functions below are the rows of that table.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    BranchedDepthwise,
    ConvBN,
    DropPath,
    LayerNorm2d,
    OnFeatures,
    StripDepthwise,
    fold_norm_into,
    widen,
)
from .rows import RegroupedConv, RowConv, RowNorm

__all__ = [
    "TOKEN_MIXERS",
    "AttentionScores",
    "AttentionValues",
    "FusedAttention",
    "InputDependent",
    "MetaMixer",
    "Part",
    "ResidualMixer",
    "conv_ffn_mixer",
    "ffnified_attention_mixer",
    "self_attention_mixer",
    "token_mixer",
]

# Published models add a small branch to kernels of exactly this size.
BRANCHED_KERNEL = 7
# What `MetaMixer.fold_norms` folds, of exactly these classes: others may compute something else.
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, RowConv)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, RowNorm)


#: What fills a role: a module and its name, or a sequence of them.
Part: TypeAlias = "tuple[str, nn.Module] | Sequence[tuple[str, nn.Module]]"


class InputDependent(nn.Module):
    """A part whose keys or values depend on the input: called as ``part(z, x)``."""


class MetaMixer(nn.Module):
    """``aggregation(activation(interaction(query(x))))``, the frame common to attention and FFN (section 3).

    Each part is a ``(name, module)`` pair and becomes the child ``name``, so that a mixer has the state-dict keys of
    published checkpoints; or a list of pairs, if several modules in a row fill the role, such as a projection and a
    normalisation. `InputDependent` modules receive the mixer's input as well.
    """

    def __init__(self, *, query: Part, interaction: Part, activation: Part, aggregation: Part) -> None:
        super().__init__()
        given = {"query": query, "interaction": interaction, "activation": activation, "aggregation": aggregation}
        parts: dict[str, Any] = {role: [part] if isinstance(part[0], str) else part for role, part in given.items()}
        self.roles = {role: tuple(name for name, _ in part) for role, part in parts.items()}
        names = [name for role in self.roles.values() for name in role]
        if len(set(names)) < len(names) or not all(self.roles.values()):
            raise ValueError(f"expected parts with names of their own, got {self.roles}")
        for part in parts.values():
            for name, module in part:
                self.add_module(name, module)

    def part(self, role: str) -> nn.Module:
        """The module that fills ``role``: query, interaction, activation or aggregation; of several, the last."""
        return getattr(self, self.roles[role][-1])

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for names in self.roles.values():
            for name in names:
                part = getattr(self, name)
                z = part(z, x) if isinstance(part, InputDependent) else part(z)
        return z

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Folds each batch normalisation, in place, into the plain convolution that it follows in this mixer."""
        names = [name for role in self.roles.values() for name in role]
        for name, following in itertools.pairwise(names):
            conv, norm = getattr(self, name), getattr(self, following)
            if isinstance(norm, OnFeatures):
                norm = norm.module
            is_plain = type(conv) in CONVOLUTIONS or (type(conv) is RegroupedConv and not conv.restore)
            if type(norm) in NORMS and is_plain:
                fold_norm_into(conv, norm)
                setattr(self, following, nn.Identity().train(norm.training))


def _branched(dim: int, kernel_size: int, strips: bool, factory: dict[str, Any]) -> nn.Module | None:
    """A depthwise layer, with parallel branches for the kernel sizes that have them."""
    if strips:
        return StripDepthwise(dim, kernel_size, **factory)
    return BranchedDepthwise(dim, dim, kernel_size, **factory) if kernel_size == BRANCHED_KERNEL else None


def ffnified_attention_mixer(
    dim: int, kernel_size: int = 7, *, strips: bool = False, device: Any = None, dtype: torch.dtype | None = None
) -> MetaMixer:
    """FFNified attention, which mixes tokens: 1×1 → DWk (static keys) → GELU → DWk (static values).

    With ``strips``, keys and values have the branches of `ffnet.layers.StripDepthwise`.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}

    def depthwise() -> nn.Module:
        plain = {"padding": kernel_size // 2, "groups": dim, **factory}
        return _branched(dim, kernel_size, strips, factory) or nn.Conv2d(dim, dim, kernel_size, **plain)

    return MetaMixer(
        query=("fc", ConvBN(dim, dim, **factory)),
        interaction=("conv1", depthwise()),
        activation=("act", nn.GELU()),
        aggregation=("conv2", depthwise()),
    )


def conv_ffn_mixer(
    dim: int,
    kernel_size: int = 7,
    expansion: float = 3,
    *,
    strips: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> MetaMixer:
    """Convolutional FFN, which mixes channels: DWk → 1×1, C → ``expansion``·C → GELU → 1×1 back to C.

    With ``strips``, the depthwise layer has the branches of `ffnet.layers.StripDepthwise`.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    hidden = int(expansion * dim)
    query = _branched(dim, kernel_size, strips, factory) or ConvBN(dim, dim, kernel_size, groups=dim, **factory)
    return MetaMixer(
        query=("conv", query),
        interaction=("fc1", nn.Conv2d(dim, hidden, 1, **factory)),
        activation=("act", nn.GELU()),
        aggregation=("fc2", nn.Conv2d(hidden, dim, 1, **factory)),
    )


def self_attention_mixer(
    dim: int, heads: int = 1, *, fused: bool = False, device: Any = None, dtype: torch.dtype | None = None
) -> MetaMixer:
    """Dot-product self-attention on maps: X W_Q → Q Kᵀ/√d → softmax → · V, with K = X W_K and V = X W_V.

    There is no output projection. The defining form holds the [H·W, H·W] coefficients in memory; with ``fused``,
    ``scaled_dot_product_attention`` computes the same without. Weights can be loaded from one into the other.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"expected heads to divide dim, got dim={dim} and heads={heads}")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    return (FusedAttention if fused else MetaMixer)(
        query=("q", nn.Conv2d(dim, dim, 1, **factory)),
        interaction=("k", AttentionScores(dim, heads, **factory)),
        activation=("act", nn.Softmax(dim=-1)),
        aggregation=("v", AttentionValues(dim, heads, **factory)),
    )


class FusedAttention(MetaMixer):
    """The parts of `self_attention_mixer` in one call, with the same result as `MetaMixer` to rounding."""

    q: nn.Conv2d
    k: AttentionScores
    v: AttentionValues

    def forward(self, x: Tensor) -> Tensor:
        heads = self.k.heads
        q, k, v = (_split_heads(z, heads).mT for z in (self.q(x), self.k.proj(x), self.v.proj(x)))
        return F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2).unflatten(2, x.shape[2:])


#: The kinds of `token_mixer`.
TOKEN_MIXERS = ("ffnified", "attention")
_HEAD_DIM = 32


def token_mixer(
    kind: str,
    dim: int,
    kernel_size: int,
    *,
    strips: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The token mixer in a block's residual branch: FFNified attention, or self-attention after layer normalisation.

    Self-attention has as many heads as divide ``dim``, with at least 32 channels each; ``kernel_size`` and ``strips``
    apply to FFNified attention only.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    if kind == "ffnified":
        return ffnified_attention_mixer(dim, kernel_size, strips=strips, **factory)
    if kind != "attention":
        raise ValueError(f"expected a token mixer of {', '.join(TOKEN_MIXERS)}, got {kind!r}")
    heads = max(heads for heads in range(1, max(dim // _HEAD_DIM, 1) + 1) if dim % heads == 0)
    norm, attention = LayerNorm2d(dim, **factory), self_attention_mixer(dim, heads, fused=True, **factory)
    return nn.Sequential(OrderedDict(norm=norm, attention=attention))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, C, H, W] → [N, heads, C/heads, H·W]."""
    return x.flatten(2).unflatten(1, (heads, -1))


class AttentionScores(InputDependent):
    """Query–key interaction Q Kᵀ/√d with K = X W_K: two maps [N, C, H, W] → [N, heads, H·W, H·W]."""

    def __init__(self, dim: int, heads: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        q, k = _split_heads(query, self.heads), _split_heads(self.proj(x), self.heads)
        return (q * q.shape[2] ** -0.5).transpose(2, 3) @ k


class AttentionValues(InputDependent):
    """Coefficient–value interaction with V = X W_V: [N, heads, H·W, H·W] and a map → map [N, C, H, W]."""

    def __init__(self, dim: int, heads: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, coefficients: Tensor, x: Tensor) -> Tensor:
        v = _split_heads(self.proj(x), self.heads)
        return (v @ coefficients.transpose(2, 3)).flatten(1, 2).unflatten(2, x.shape[2:])


class ResidualMixer(nn.Module):
    """``x + drop_path(layer_scale * main(x))``: [N, C, H, W] → [N, C, H, W].

    Args:
        main: The mixer.
        dim: C.
        layer_scale_init: Initial value of the [C, 1, 1] layer scale, or None for no layer scale.
        drop_path: Stochastic depth rate of the branch.
    """

    def __init__(
        self,
        main: nn.Module,
        dim: int,
        *,
        layer_scale_init: float | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.main = main
        self.layer_scale: nn.Parameter | None
        if layer_scale_init is None:
            self.register_parameter("layer_scale", None)
        else:
            self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), layer_scale_init, device=device, dtype=dtype))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return x + self.drop_path(y if self.layer_scale is None else y * self.layer_scale)

    @torch.no_grad()
    def fold_layer_scale(self) -> None:
        """Folds the layer scale, in place, into the mixer's last convolution; no-op if that is not plain."""
        last = self.main.part("aggregation") if isinstance(self.main, MetaMixer) else None
        if self.layer_scale is None or type(last) is not nn.Conv2d:
            return
        scale = widen(self.layer_scale)
        last.weight.copy_(widen(last.weight) * scale[..., None])
        if last.bias is not None:
            last.bias.copy_(widen(last.bias) * scale.flatten())
        self.layer_scale = None
