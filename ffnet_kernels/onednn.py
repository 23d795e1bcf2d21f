"""Dense convolutions that stay with PyTorch, in the memory formats in which oneDNN computes them.

In every call PyTorch makes oneDNN reorder weights, which can take longer than convolving a small map. A program keeps
weights that it computes in that order; a weight that is a parameter determines the format of a small map.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, fx

from . import folding, kernels
from .shapes import has_dimensions


def lower(graph: fx.Graph, *, pack: bool) -> None:
    """Replaces `kernels.convolution` by the functions below, in a rewritten graph for the CPU."""
    for node in list(graph.nodes):
        if node.target is not kernels.convolution:
            continue
        x, weight, bias, stride, (top, bottom, left, right), dilation, groups = node.args
        computed = weight.target is folding.rounded and len(weight.users) == 1 and weight.args[1] == torch.float32
        centred = top == bottom and left == right and has_dimensions(x, 4)
        if not (pack and computed and centred and is_available()):
            node.target = convolution
            continue
        geometry = stride, (top, left), dilation, groups
        with graph.inserting_before(node):
            packed = graph.call_function(packed_weight, (weight, *geometry, tuple(x.meta["value"].shape)))
        node.target, node.args = packed_convolution, (x, packed, bias, *geometry)


def convolution(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """`kernels.convolution` with the map converted to the weight's format, if the weight is the larger one to
    transpose."""
    if weight.numel() > x.numel() and not weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return kernels.convolution(x, weight, *args)


def packed_weight(
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, ...],
) -> Tensor:
    """A weight in oneDNN's order for `packed_convolution`, chosen for maps of a given size."""
    reorder = torch.ops.mkldnn._reorder_convolution_weight.default
    return reorder(weight, padding, stride, dilation, groups, size)


def give_back_memory() -> None:
    """Returns freed memory to the system, if the C library can: the copies that packing freed lie between those it
    keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def packed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``torch.conv2d`` with a weight from `packed_weight`."""
    run = torch.ops.mkldnn._convolution_pointwise.default
    return run(x, weight, bias, padding, stride, dilation, groups, "none", [], "")


@functools.cache
def is_available() -> bool:
    """Whether this PyTorch has the operators by which inductor packs weights, and they compute a convolution."""
    x, weight = torch.linspace(-1, 1, 96).reshape(1, 6, 4, 4), torch.linspace(-1, 1, 216).reshape(4, 6, 3, 3)
    try:
        with torch.no_grad():
            packed = packed_weight(weight, (1, 1), (1, 1), (1, 1), 1, tuple(x.shape))
            out = packed_convolution(x, packed, None, (1, 1), (1, 1), (1, 1), 1)
            return torch.allclose(out, torch.conv2d(x, weight, None, 1, 1), atol=1e-5)
    except Exception:  # these names are private to PyTorch
        return False
