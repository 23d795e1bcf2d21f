"""Folds linear layers around a convolution into its weights. Vectors are computed in float64, weights in float32 or
better; both are rounded at the end. A missing weight is one, a missing bias zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def wide_like(scale: Tensor, weight: Tensor) -> Tensor:
    return scale if weight.dtype == torch.float64 else scale.float()


def layout(weight: Tensor) -> torch.memory_format:
    """The layout that kernels read fastest: channels-last for filters of several taps."""
    is_dense = weight.dim() == 4 and weight.shape[2:] != (1, 1) and weight.shape[1] > 1
    return torch.channels_last if is_dense else torch.contiguous_format


def norm_scale(variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The scale [C] of batch normalisation by running statistics, as an affine map."""
    scale = (variance.double() + eps).rsqrt()
    return scale if weight is None else scale * weight


def norm_shift(mean: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """The shift [C] that is added after `norm_scale`."""
    shift = -mean * scale
    return shift if bias is None else shift + bias


def vector(scale: Tensor) -> Tensor:
    """A layer scale as [C]."""
    return scale.double().flatten()


def scale_outputs(weight: Tensor, scale: Tensor) -> Tensor:
    weight = wide(weight)
    # Created in its final layout: freeing a copy would not return its memory to the system.
    out = torch.empty_like(weight, memory_format=layout(weight))
    return torch.mul(weight, wide_like(scale, weight)[:, None, None, None], out=out)


def scale_bias(bias: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor:
    if bias is None:
        assert shift is not None
        return shift
    return bias * scale if shift is None else bias * scale + shift


def scale_inputs(weight: Tensor, scale: Tensor) -> Tensor:
    return wide(weight) * wide_like(scale, weight)[:, None, None]


def scale_columns(weight: Tensor, scale: Tensor) -> Tensor:
    return wide(weight) * wide_like(scale, weight)


def through(weight: Tensor, bias: Tensor | None, shift: Tensor) -> Tensor:
    """The bias of a 1×1 convolution that takes in a shift of its input."""
    moved = weight.double().flatten(1) @ shift
    return moved if bias is None else moved + bias


def add_kernels(weight: Tensor, other: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """``weight`` plus ``other``, zero-padded by margins (left, right, top, bottom)."""
    return wide(weight) + F.pad(wide(other), margins)


def add_bias(bias: Tensor | None, other: Tensor) -> Tensor:
    return other.double() if bias is None else bias.double() + other


def add_identity(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight of a shape-preserving convolution plus the identity, or plus a scale per channel."""
    outputs, inputs, height, width = weight.shape
    each = torch.arange(outputs, device=weight.device)
    total = wide(weight).clone()
    total[each, each % inputs, height // 2, width // 2] += 1.0 if scale is None else wide_like(scale, weight)
    return total


def channels_last(weight: Tensor) -> Tensor:
    """With channels-last strides also in dimensions of one element, so that results are channels-last even if the map
    is a batch of one image with ambiguous strides."""
    _, inputs, height, width = weight.shape
    dense = weight.contiguous(memory_format=torch.channels_last)
    return dense.as_strided(weight.shape, (inputs * height * width, 1, width * inputs, inputs))


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A folded weight, rounded to its dtype.

    Raises:
        OverflowError: if it exceeds the range of the dtype, as no layer's own weight does.
    """
    out = weight.to(dtype).contiguous(memory_format=layout(weight))
    if dtype == torch.float16 and bool((out.isinf() & weight.isfinite()).any()):
        raise OverflowError("a folded weight is beyond float16")
    return out
