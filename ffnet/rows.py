"""1-D layers computed as 2-D ones on maps of one row [N, C, 1, L], so that kernels for 1×k filters apply.

Weights, in checkpoints too, have the shapes of 1-D layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import DepthwiseBranches, FoldableConv, normed_convolution

__all__ = ["BranchedRow", "RegroupedConv", "RowConv", "RowConvBN", "RowNorm", "regroup"]


def _along_row(value: int | tuple[int, int], across: int) -> tuple[int, int]:
    return (across, value) if isinstance(value, int) else value


class RowConv(nn.Conv2d):
    """A 1-D convolution of a map of one row: [N, I, 1, L] → [N, O, 1, L'].

    Its weight is [O, I/groups, k], as in ``nn.Conv1d``. Arguments are those of ``nn.Conv1d``; pairs as in ``nn.Conv2d``
    are accepted, too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            _along_row(kernel_size, 1),
            _along_row(stride, 1),
            _along_row(padding, 0),
            _along_row(dilation, 1),
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.weight = nn.Parameter(self.weight.detach().squeeze(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unsqueeze(2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def regroup(x: Tensor, groups: int, size: int) -> Tensor:
    """Reorders channels from (group, member, …) to (member, group, …), for ``groups`` of ``size`` members."""
    return x.unflatten(1, (groups, size, -1)).transpose(1, 2).flatten(1, 3)


class RegroupedConv(RowConv):
    """A 1×1 convolution within groups, after reordering the channels: [N, I, 1, L] → [N, O, 1, L].

    Input channels form ``outer`` groups. The convolution mixes the channels at the same place in each group.

    Args:
        in_channels: I.
        out_channels: O.
        outer: Groups of the input channels and, with ``restore``, of the output channels.
        groups: Places in each group, which are the groups of the convolution; a place may have several neighbouring
            channels.
        restore: Whether output channels are in the input's order; otherwise they are ordered by ``groups``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        outer: int,
        groups: int,
        restore: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, groups=groups, device=device, dtype=dtype)
        self.outer, self.restore = outer, restore

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(regroup(x, self.outer, self.groups))
        return regroup(y, self.groups, self.outer) if self.restore else y


class RowNorm(nn.BatchNorm2d):
    """Batch normalisation shared by groups of channels: [N, groups·D, 1, L] → the same, with D parameters."""

    def __init__(self, channels: int, groups: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = super().forward(x.unflatten(1, (self.groups, -1)).flatten(0, 1))
            return y.unflatten(0, (-1, self.groups)).flatten(1, 2)
        parts = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (part.repeat(self.groups) for part in parts if part is not None)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)


class RowConvBN(FoldableConv):
    """1-D convolution, then batch normalisation, on a map of one row: [N, I, 1, L] → [N, O, 1, L'].

    ``names`` are the names of the two children.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        names: tuple[str, str] = ("conv", "bn"),
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = RowConv(in_channels, out_channels, kernel_size, stride, padding, 1, groups, bias, **factory)
        self.names = names
        for name, module in zip(names, (conv, nn.BatchNorm2d(out_channels, **factory)), strict=True):
            self.add_module(name, module)

    def parts(self) -> tuple[nn.Conv2d, nn.Module]:
        conv, norm = self.names
        return getattr(self, conv), getattr(self, norm)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.parts()
        return norm(conv(x))

    def template(self) -> nn.Conv2d:
        return self.parts()[0]

    def folded(self) -> tuple[Tensor, Tensor]:
        return normed_convolution(*self.parts())


class BranchedRow(DepthwiseBranches):
    """Long and short depthwise `RowConvBN` in parallel, outputs added: [N, C, 1, L] → [N, C, 1, L]."""

    def __init__(
        self,
        channels: int,
        kernel_size: int = 51,
        small_kernel: int = 5,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not (kernel_size % 2 and small_kernel % 2 and 0 < small_kernel <= kernel_size):
            raise ValueError(f"expected odd kernels, the small one first, got {small_kernel} and {kernel_size}")
        for name, kernel in (("lkb_origin", kernel_size), ("small_conv", small_kernel)):
            branch = RowConvBN(channels, channels, kernel, 1, kernel // 2, channels, device=device, dtype=dtype)
            self.add_module(name, branch)
