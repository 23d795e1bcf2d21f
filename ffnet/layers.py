"""Layers of FFNet: convolutions with batch normalisation that fold into one convolution for inference.

Child names (``c``, ``bn``, ``conv``, ``conv1``) are those of the published checkpoints. ``forward`` is the
training-time form; `FoldableConv.fused` gives the inference-time form, one biased convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BNConv",
    "BranchedDepthwise",
    "ConvBN",
    "DepthwiseBranches",
    "DropChannels",
    "DropPath",
    "FoldableConv",
    "LayerNorm2d",
    "OnFeatures",
    "SkipConv",
    "StripDepthwise",
]


def widen(tensor: Tensor) -> Tensor:
    """The tensor, detached, in float64 for folding; on the CPU if its device has no float64."""
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def norm_as_affine(bn: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] (float64) of a batch normalisation by running statistics."""
    scale = widen(bn.weight) / (widen(bn.running_var) + bn.eps).sqrt()
    return scale, widen(bn.bias) - widen(bn.running_mean) * scale


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def normed_convolution(conv: nn.Conv2d | nn.Conv3d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias (float64) of a convolution with the batch normalisation that follows folded in.

    A normalisation with fewer channels than the convolution is shared by groups of channels.
    """
    scale, shift = (v.repeat(conv.out_channels // len(v)) for v in norm_as_affine(norm))
    bias = shift if conv.bias is None else widen(conv.bias) * scale + shift
    return widen(conv.weight) * scale.view(-1, *[1] * (conv.weight.dim() - 1)), bias


def fold_norm_into(conv: nn.Conv2d | nn.Conv3d, norm: Any) -> None:
    """Folds the batch normalisation that follows a convolution into it, in place."""
    weight, bias = normed_convolution(conv, norm)
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(bias)


class FoldableConv(nn.Module, ABC):
    """A layer that equals one biased convolution once its normalisation uses running statistics."""

    @abstractmethod
    def template(self) -> nn.Conv2d:
        """The convolution that determines the geometry, device, dtype and ``requires_grad`` of the fused one."""

    @abstractmethod
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [O, I/groups, kh, kw] and bias [O] of the fused convolution, in float64."""

    def fused(self) -> nn.Conv2d:
        """The equivalent convolution, as a new module that shares no storage with this one."""
        like = self.template()
        conv = type(like)(
            like.in_channels,
            like.out_channels,
            like.kernel_size,  # type: ignore[arg-type]
            like.stride,  # type: ignore[arg-type]
            like.padding,  # type: ignore[arg-type]
            like.dilation,  # type: ignore[arg-type]
            like.groups,
            device="meta",  # no initialisation: both parameters are replaced below
        )
        weight, bias = (tensor.to(like.weight, copy=True) for tensor in self.folded())
        conv.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=like.weight.requires_grad)
        return conv.train(self.training)


class ConvBN(FoldableConv):
    """Convolution without bias, zero padding k//2, then batch normalisation: [N, I, H, W] → [N, O, H', W'].

    ``kernel_size`` may be (height, width).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = _pair(kernel_size)
        padding = height // 2, width // 2
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False, **factory
        )
        self.bn = nn.BatchNorm2d(out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def template(self) -> nn.Conv2d:
        return self.c

    def folded(self) -> tuple[Tensor, Tensor]:
        return normed_convolution(self.c, self.bn)


class BNConv(FoldableConv):
    """Batch normalisation, then a 1×1 convolution without bias: [N, I, H, W] → [N, O, H, W].

    The kernel is always 1×1: with zero padding, the shift of the normalisation could not be folded.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm2d(in_channels, **factory)
        self.c = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.bn(x))

    def template(self) -> nn.Conv2d:
        return self.c

    def folded(self) -> tuple[Tensor, Tensor]:
        scale, shift = norm_as_affine(self.bn)
        weight = widen(self.c.weight)
        return weight * scale[:, None, None], weight.flatten(1) @ shift


class SkipConv(FoldableConv):
    """``conv(x) + x`` around a 1×1 `BNConv`: [N, C, H, W] → [N, C, H, W]."""

    def __init__(self, channels: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = BNConv(channels, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x

    def template(self) -> nn.Conv2d:
        return self.conv.template()

    def folded(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.folded()
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return weight + identity[:, :, None, None], bias


class DepthwiseBranches(FoldableConv):
    """Depthwise `ConvBN` of several kernels in parallel, outputs added: [N, I, H, W] → [N, O, H', W'].

    Each branch is padded by half its kernel, so that all are centred on the same input pixel.

    Args:
        in_channels: I, also the number of groups.
        out_channels: O, a multiple of I.
        kernels: Odd size, or (height, width), of each branch's kernel by the name of its child; the first is the
            largest, which the others fit into.
        stride: Stride of all branches.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernels: Mapping[str, int | tuple[int, int]],
        stride: int = 1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = _pair(next(iter(kernels.values())))
        if not all(h % 2 and w % 2 and h <= height and w <= width for h, w in map(_pair, kernels.values())):
            raise ValueError(f"expected odd kernels, none larger than the first, got {dict(kernels)}")
        for name, kernel in kernels.items():
            self.add_module(
                name, ConvBN(in_channels, out_channels, kernel, stride, in_channels, device=device, dtype=dtype)
            )

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.children()
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return y

    def template(self) -> nn.Conv2d:
        return self._branches()[0].template()

    def folded(self) -> tuple[Tensor, Tensor]:
        first, *others = self._branches()
        weight, bias = first.folded()
        for branch in others:
            small_weight, small_bias = branch.folded()
            margins = [(weight.shape[i] - small_weight.shape[i]) // 2 for i in range(weight.dim() - 1, 1, -1)]
            weight = weight + F.pad(small_weight, [margin for each in margins for margin in (each, each)])
            bias = bias + small_bias
        return weight, bias

    def _branches(self) -> list[FoldableConv]:
        return [branch for branch in self.children() if isinstance(branch, FoldableConv)]


class BranchedDepthwise(DepthwiseBranches):
    """A large and a small square kernel in parallel, as children ``conv`` and ``conv1``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        small_kernel: int = 3,
        stride: int = 1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernels = {"conv": kernel_size, "conv1": small_kernel}
        super().__init__(in_channels, out_channels, kernels, stride, device=device, dtype=dtype)


class StripDepthwise(DepthwiseBranches):
    """A square kernel, a 5×5 one if that is smaller, and horizontal and vertical strips of the kernel's length."""

    def __init__(
        self, channels: int, kernel_size: int = 9, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        kernels: dict[str, int | tuple[int, int]] = {"conv1": kernel_size}
        if kernel_size > 5:
            kernels["conv2"] = 5
        kernels |= {"strip_conv1": (1, kernel_size), "strip_conv2": (kernel_size, 1)}
        super().__init__(channels, channels, kernels, device=device, dtype=dtype)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a channels-first map [N, C, H, W]."""

    def __init__(
        self, channels: int, eps: float = 1e-6, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OnFeatures(nn.Module):
    """A module of features [points, C], applied to each voxel of a dense map or to each point of a sparse one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x.replace_feature(self.module(x.features))
        y = x.movedim(1, -1)
        return self.module(y.flatten(0, -2)).unflatten(0, y.shape[:-1]).movedim(-1, 1)


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch per sample and rescales the rest by 1/(1 - rate)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"expected a drop path rate in [0, 1), got {rate}")
        self.rate = rate

    @property
    def active(self) -> bool:
        return self.training and self.rate > 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(self.mask_shape(x)).bernoulli_(keep)
        return x * mask.div_(keep)

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0],) + (1,) * (x.ndim - 1)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class DropChannels(DropPath):
    """In training, zeroes channels of a map [N, C, H, W] and rescales the rest, as ``nn.Dropout2d`` does.

    The random numbers drawn do not depend on the map's memory format, so programs of training steps may contain it.
    """

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0], x.shape[1], 1, 1)
