"""MetaMixer, its three instances, and the residual wrappers that FFNet's blocks are built from.

Section 3 of "FFNet: MetaMixer-based Efficient Convolutional Mixer Design" (arXiv 2406.02021) reads self-attention
and the feed-forward network as one mixer: query projection, query–key interaction, activation, coefficient–value
interaction. The three functions below are the rows of that table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import BranchedDepthwise, ConvBN, DropPath, StripDepthwise, widen

__all__ = [
    "AttentionScores",
    "AttentionValues",
    "InputDependent",
    "MetaMixer",
    "ResidualMixer",
    "conv_ffn_mixer",
    "ffnified_attention_mixer",
    "self_attention_mixer",
]

# The published models add a small branch to kernels of exactly this size.
BRANCHED_KERNEL = 7


class InputDependent(nn.Module):
    """A part whose keys or values are functions of the input: called as ``part(z, x)``."""


class MetaMixer(nn.Module):
    """``aggregation(activation(interaction(query(x))))``, the frame common to attention and FFN (section 3).

    Each part is a ``(name, module)`` pair and becomes the child ``name``, so that a mixer keeps the state-dict keys
    of its checkpoints. Parts derived from `InputDependent` receive the mixer's input as well.
    """

    def __init__(
        self,
        *,
        query: tuple[str, nn.Module],
        interaction: tuple[str, nn.Module],
        activation: tuple[str, nn.Module],
        aggregation: tuple[str, nn.Module],
    ) -> None:
        super().__init__()
        parts = {"query": query, "interaction": interaction, "activation": activation, "aggregation": aggregation}
        self.roles = {role: name for role, (name, _) in parts.items()}
        if len(set(self.roles.values())) < len(parts):
            raise ValueError(f"expected parts with names of their own, got {self.roles}")
        for name, module in parts.values():
            self.add_module(name, module)

    def part(self, role: str) -> nn.Module:
        """The module that plays ``role``: query, interaction, activation or aggregation."""
        return getattr(self, self.roles[role])

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for name in self.roles.values():
            part = getattr(self, name)
            z = part(z, x) if isinstance(part, InputDependent) else part(z)
        return z


def _branched(dim: int, kernel_size: int, strips: bool, factory: dict[str, Any]) -> nn.Module | None:
    """The depthwise layer of parallel branches, where one of that kernel has them."""
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
    dim: int, heads: int = 1, *, device: Any = None, dtype: torch.dtype | None = None
) -> MetaMixer:
    """Dot-product self-attention on maps: X W_Q → Q Kᵀ/√d → softmax → · V, with K = X W_K and V = X W_V.

    This is the defining form, with the [H·W, H·W] coefficients in memory and no output projection.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"expected heads to divide dim, got dim={dim} and heads={heads}")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    return MetaMixer(
        query=("q", nn.Conv2d(dim, dim, 1, **factory)),
        interaction=("k", AttentionScores(dim, heads, **factory)),
        activation=("act", nn.Softmax(dim=-1)),
        aggregation=("v", AttentionValues(dim, heads, **factory)),
    )


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
        layer_scale_init: Initial value of the [C, 1, 1] layer scale, or None for no such parameter.
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
