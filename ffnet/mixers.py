"""MetaMixer, its three instances, and the residual wrappers that FFNet's blocks are built from.

Section 3 of "FFNet: MetaMixer-based Efficient Convolutional Mixer Design" (arXiv 2406.02021) reads self-attention
and the feed-forward network as one mixer: query projection, query–key interaction, activation, coefficient–value
interaction. The three functions below are the rows of that table.

A residual wrapper runs its mixer as written until `enable_kernels` is called on it; then one fused operator of
`ffnet_kernels` computes everything after the first projection, the residual sum included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ffnet_kernels
from ffnet_kernels import training
from ffnet_kernels.sequence import Layers

from .layers import BranchedDepthwise, ConvBN, DropPath, is_as_written, is_pointwise, pointwise, widen

__all__ = [
    "AttentionScores",
    "AttentionValues",
    "ChannelMixer",
    "InputDependent",
    "MetaMixer",
    "ResidualMixer",
    "TokenMixer",
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


def ffnified_attention_mixer(
    dim: int, kernel_size: int = 7, *, device: Any = None, dtype: torch.dtype | None = None
) -> MetaMixer:
    """FFNified attention, which mixes tokens: 1×1 → DWk (static keys) → GELU → DWk (static values)."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}

    def depthwise() -> nn.Module:
        if kernel_size == BRANCHED_KERNEL:
            return BranchedDepthwise(dim, dim, kernel_size, **factory)
        return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory)

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
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> MetaMixer:
    """Convolutional FFN, which mixes channels: DWk → 1×1, C → ``expansion``·C → GELU → 1×1 back to C."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    hidden = int(expansion * dim)
    query: nn.Module
    if kernel_size == BRANCHED_KERNEL:
        query = BranchedDepthwise(dim, dim, kernel_size, **factory)
    else:
        query = ConvBN(dim, dim, kernel_size, groups=dim, **factory)
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

    operator: ClassVar[str]
    training_operator: ClassVar[str]

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
        self.kernels_enabled = False
        self.training_kernels = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training_kernels and self.training and not training.is_hooked(self.main, *self.main.children()):
            return self.training_forward(x)
        if not self.kernels_enabled or not self._is_as_written():
            y = self.main(x)
            return x + self.drop_path(y if self.layer_scale is None else y * self.layer_scale)
        if self.drop_path.active:
            return x + self.drop_path(self.fused_forward(x, residual=None))
        return self.fused_forward(x, residual=x)

    def fused_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """``residual + layer_scale * main(x)`` through the fused operator; no residual, no sum."""
        raise NotImplementedError(f"{type(self).__name__} has no fused operator")

    def add_kernel_layers(self, layers: Layers) -> bool:
        """``forward`` with the fused operator, for a model whose layers run in one call: `ffnet_kernels.sequence`."""
        if type(self) not in (TokenMixer, ChannelMixer) or "fused_forward" in self.__dict__:
            return False
        main: Any = self.main
        if not all(layers.watch(part) for part in self._parts()) or not self.kernels_apply():
            return False
        return self.kernels_enabled and not self.drop_path.active and self._add_kernel_layers(layers, main)

    def _parts(self) -> tuple[nn.Module, ...]:
        """What the fused operator stands for."""
        return self.main, *self.main.children(), self.drop_path

    def _is_as_written(self) -> bool:
        """Whether the fused operator computes what the parts do now: they may have been changed since."""
        return self.kernels_apply() and all(map(is_as_written, self._parts()))

    def _add_kernel_layers(self, layers: Layers, main: MetaMixer) -> bool:
        return False

    def kernels_apply(self) -> bool:
        """Whether ``main`` has the parts that the fused operator takes."""
        return False

    def enable_kernels(self) -> str | None:
        """Lets the fused operator of `ffnet_kernels` run this mixer from now on, if it can.

        It can where the parts concerned are plain biased convolutions, so everywhere after `ffnet.reparameterize`.
        Submodules, parameters and state dict stay as they are. The parts that the operator replaces are no longer
        called, unless they are changed or hooked: then they run.

        Returns:
            The operator's name, or None where it does not apply; nothing is changed then.
        """
        if not self.kernels_apply():
            return None
        self.kernels_enabled = True
        return self.operator

    def training_forward(self, x: Tensor) -> Tensor:
        """``forward`` in training mode, its layers joined to operators of ``ffnet_kernels.training``."""
        raise NotImplementedError(f"{type(self).__name__} has no operators for training")

    def training_kernels_apply(self) -> bool:
        """Whether ``main`` has the parts that `training_forward` takes."""
        return False

    def enable_training_kernels(self) -> str | None:
        """Lets `training_forward` run this mixer in training mode from now on, if it can; hooks in it still fire.

        Returns:
            The operator's name, or None where it does not apply; nothing is changed then.
        """
        if self.kernels_enabled or not self.training_kernels_apply():
            return None
        self.training_kernels = True
        return self.training_operator

    @torch.no_grad()
    def fold_extras(self) -> None:
        """Folds the layer scale, in place, into the mixer's last convolution; no-op if that is not plain."""
        last = self.main.part("aggregation") if isinstance(self.main, MetaMixer) else None
        if self.layer_scale is None or type(last) is not nn.Conv2d:
            return
        scale = widen(self.layer_scale)
        last.weight.copy_(widen(last.weight) * scale[..., None])
        if last.bias is not None:
            last.bias.copy_(widen(last.bias) * scale.flatten())
        self.layer_scale = None


class TokenMixer(ResidualMixer):
    """Residual wrapper of a block's token mixer; its operator is ``ffnet_kernels.ffnified_attention``."""

    operator = "ffnified_attention"
    training_operator = "branched_depthwise + gelu"

    def kernels_apply(self) -> bool:
        if not isinstance(self.main, MetaMixer) or not is_gelu(self.main.part("activation")):
            return False
        key, value = self.main.part("interaction"), self.main.part("aggregation")
        return _is_plain_depthwise(key) and _is_plain_depthwise(value) and key.kernel_size == value.kernel_size

    def fused_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        main: Any = self.main
        key, value = main.part("interaction"), main.part("aggregation")
        return ffnet_kernels.ffnified_attention(
            pointwise(main.part("query"), x),
            key.weight,
            key.bias,
            value.weight,
            value.bias,
            activation="gelu",
            scale=self.layer_scale,
            residual=residual,
        )

    def _add_kernel_layers(self, layers: Layers, main: MetaMixer) -> bool:
        query, key, value = main.part("query"), main.part("interaction"), main.part("aggregation")
        if not is_pointwise(query):
            return False
        layers.ffnified_attention(
            *layers.parameters(key, "weight", "bias"),
            *layers.parameters(value, "weight", "bias"),
            *layers.parameters(self, "layer_scale"),
            activation="gelu",
            projection=layers.parameters(query, "weight", "bias"),
            residual=True,
        )
        return True

    def training_kernels_apply(self) -> bool:
        if not isinstance(self.main, MetaMixer) or not is_gelu(self.main.part("activation")):
            return False
        return type(self.main.part("interaction")) is BranchedDepthwise

    def training_forward(self, x: Tensor) -> Tensor:
        main: Any = self.main
        hidden = main.part("interaction")(main.part("query")(x), activation="gelu")
        y = main.part("aggregation")(hidden)
        return x + self.drop_path(y if self.layer_scale is None else y * self.layer_scale)


class ChannelMixer(ResidualMixer):
    """Residual wrapper of a block's channel mixer; its operator is ``ffnet_kernels.channel_mixer``."""

    operator = "channel_mixer"
    training_operator = "feed_forward"

    def kernels_apply(self) -> bool:
        if not isinstance(self.main, MetaMixer) or not is_gelu(self.main.part("activation")):
            return False
        expand, project = self.main.part("interaction"), self.main.part("aggregation")
        return _is_plain_depthwise(self.main.part("query")) and _is_plain_1x1(expand) and _is_plain_1x1(project)

    def fused_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        main: Any = self.main
        depthwise, expand, project = main.part("query"), main.part("interaction"), main.part("aggregation")
        return ffnet_kernels.channel_mixer(
            x,
            depthwise.weight,
            depthwise.bias,
            expand.weight,
            expand.bias,
            project.weight,
            project.bias,
            activation="gelu",
            scale=self.layer_scale,
            residual=residual,
        )

    def _add_kernel_layers(self, layers: Layers, main: MetaMixer) -> bool:
        layers.channel_mixer(
            *layers.parameters(main.part("query"), "weight", "bias"),
            *layers.parameters(main.part("interaction"), "weight", "bias"),
            *layers.parameters(main.part("aggregation"), "weight", "bias"),
            *layers.parameters(self, "layer_scale"),
            activation="gelu",
            residual=True,
        )
        return True

    def training_kernels_apply(self) -> bool:
        if not isinstance(self.main, MetaMixer) or not is_gelu(self.main.part("activation")):
            return False
        return is_pointwise(self.main.part("interaction")) and is_pointwise(self.main.part("aggregation"))

    def training_forward(self, x: Tensor) -> Tensor:
        main: Any = self.main
        expand, project = main.part("interaction"), main.part("aggregation")
        y = training.feed_forward(
            main.part("query")(x),
            expand.weight,
            expand.bias,
            project.weight,
            project.bias,
            activation="gelu",
            scale=self.layer_scale,
            residual=None if self.drop_path.active else x,
        )
        return x + self.drop_path(y) if self.drop_path.active else y


def is_gelu(module: nn.Module) -> bool:
    return type(module) is nn.GELU and module.approximate == "none"


def _is_plain_depthwise(conv: Any) -> bool:
    """Biased, zero-padded depthwise convolution with stride 1 and an output of the input's size."""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is not None
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(k % 2 for k in conv.kernel_size)
        and (conv.padding == "same" or conv.padding == tuple(k // 2 for k in conv.kernel_size))
    )


def _is_plain_1x1(conv: Any) -> bool:
    return is_pointwise(conv) and conv.bias is not None
