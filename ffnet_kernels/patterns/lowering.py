"""Lowers the single convolutions and linear layers that remain after mixers are matched to operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import kernels
from ..nodes import Convolution, is_node, is_parameter, why_not
from ..normalize import argument
from ..shapes import Node, has_dimensions, values_of
from .rewriter import Rewriter


def lower(rewriter: Rewriter, node: Node) -> None:
    """Lowers a convolution or linear layer, with the activation that follows, if an operator supports it."""
    conv = rewriter.convolution(node)
    if conv is None:
        if rewriter.fold and node.target is F.linear:
            linear(rewriter, node)
        return
    first = stem_before(rewriter, conv)
    if first is not None:
        name, end = rewriter.following_activation(node)
        second = (conv.weight, conv.bias, conv.stride, conv.padding, name)
        rewriter.put(end, kernels.conv2d_pair, (*first.args[:6], *second))
        return
    node.meta["reason"] = why_not(conv)
    takes = conv.dilation == (1, 1) and set(conv.stride) <= {1, 2}
    is_dense = conv.groups == 1 and (conv.kernel == (1, 1) or conv.inputs <= 4)
    if not takes or not (conv.is_depthwise or is_dense):
        return
    if not rewriter.fold and not conv.is_depthwise:
        if conv.is_pointwise:
            rewriter.put(node, kernels.projection, (conv.x, conv.weight, conv.bias))
        return
    name, end = rewriter.following_activation(node)
    args = (conv.x, rewriter.said_channels_last(node, conv), conv.bias, conv.stride, conv.padding, name)
    if conv.is_depthwise:
        rewriter.put(end, kernels.depthwise_conv2d, (*args, conv.groups))
        return
    scale, residual, end = rewriter.epilogue(node) if name == "none" else (None, None, end)
    rewriter.put(end, kernels.conv2d, (*args, scale, residual))


def stem_before(rewriter: Rewriter, conv: Convolution) -> Node | None:
    """The lowered convolution of an image whose only reader is a dense convolution of several taps."""
    if not rewriter.fold or conv.groups != 1 or conv.kernel == (1, 1) or not is_node(conv.x):
        return None
    takes = conv.dilation == (1, 1) and set(conv.stride) <= {1, 2} and conv.x.target is kernels.conv2d
    takes = takes and len(conv.x.users) == 1 and conv.x.args[6:] == (None, None)
    return conv.x if takes and conv.x.args[1].meta["shape"][1] <= 4 else None


def linear(rewriter: Rewriter, node: Node) -> None:
    """Lowers a linear layer on pixels or tokens, with the activation, or the scale and residual sum, that follow."""
    x, weight, bias = node.args[0], argument(node, 1, "weight", None), argument(node, 2, "bias", None)
    # A classifier's head is bound by reading its weights, which PyTorch does as fast.
    if has_dimensions(node, 2) or not is_parameter(weight) or len(weight.meta["shape"]) != 2:
        return
    if bias is not None and not is_parameter(bias):
        return
    name, end = rewriter.following_activation(node)
    scale = residual = moved = None
    if name == "none":
        scale, residual, moved, end = rewriter.epilogue_of_pixels(node)
    if scale is None and residual is None and moved is not None:
        end, moved = node, None
    if moved is None:
        rewriter.put(end, kernels.linear, (x, weight, bias, name, scale, residual))
        return
    with rewriter.graph.inserting_before(end):
        if residual is not None:
            residual = rewriter.graph.call_function(torch.permute, (residual, (0, 2, 3, 1)))
        pixels = rewriter.graph.call_function(kernels.linear, (x, weight, bias, name, scale, residual))
    pixels.meta.update(values_of(node))
    result = rewriter.put(end, torch.permute, (pixels, (0, 3, 1, 2)))
    pixels.meta["paths"], result.meta["paths"] = result.meta["paths"], []
