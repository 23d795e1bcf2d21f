"""Dense convolutions that stay with PyTorch, on weights in the order in which oneDNN reads them.

PyTorch has oneDNN put them into that order in every call, which can take as long as the convolution of a small map.
Where a program computes a weight anyway, it keeps it in that order instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from . import folding, kernels
from .shapes import has_dimensions


@functools.cache
def is_available() -> bool:
    """Whether this PyTorch has what its own compiler packs weights with, and it gives what a convolution does."""
    x, weight = torch.linspace(-1, 1, 96).reshape(1, 6, 4, 4), torch.linspace(-1, 1, 216).reshape(4, 6, 3, 3)
    try:
        with torch.no_grad():
            packed = pack(weight, (1, 1), (1, 1), (1, 1), 1, tuple(x.shape))
            out = kernels.packed_convolution(x, packed, None, (1, 1), (1, 1), (1, 1), 1)
            return torch.allclose(out, torch.conv2d(x, weight, None, 1, 1), atol=1e-5)
    except Exception:  # of names that are not PyTorch's interface
        return False


def pack(
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, ...],
) -> Tensor:
    """A weight for `kernels.packed_convolution`, best for maps of a size."""
    geometry: Any = padding, stride, dilation, groups, size
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry)


def pack_weights(graph: fx.Graph) -> None:
    """Packs the computed weights of convolutions in a rewritten graph, of float32 on the CPU."""
    for node in list(graph.nodes):
        if node.target is not kernels.convolution or not is_available():
            continue
        x, weight, bias, stride, (top, bottom, left, right), dilation, groups = node.args
        computed = weight.target is folding.rounded and len(weight.users) == 1 and weight.args[1] == torch.float32
        if not computed or top != bottom or left != right or not has_dimensions(x, 4):
            continue
        geometry = stride, (top, left), dilation, groups
        with graph.inserting_before(node):
            packed = graph.call_function(pack, (weight, *geometry, tuple(x.meta["value"].shape)))
        node.target, node.args = kernels.packed_convolution, (x, packed, bias, *geometry)
