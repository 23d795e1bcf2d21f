"""Folding: convolutions and linear layers absorb the linear operations around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import folding, kernels
from ..nodes import Convolution, activation, has_statistics, is_folded, is_node, is_parameter, is_sum, parse
from ..normalize import NORM_ARGUMENTS, argument, is_mean_of_pixels
from ..shapes import Node, has_dimensions, values_of
from .mixers import ends_mixer
from .rewriter import Rewriter

#: Views that keep every element, so that elementwise functions may be applied before them.
_SHAPE_VIEWS = ("reshape", "flatten", "permute", "transpose", torch.flatten, torch.permute, torch.transpose)


def canonical(rewriter: Rewriter, node: Node) -> None:
    """Convolutions, and batch normalisations by running statistics, get the form that other passes look for."""
    if node.target is torch.conv2d:
        conv = parse(node)
        if conv is not None:
            rewriter.convolve(node, conv)
    elif node.target is torch.nn.functional.batch_norm and argument(node, 5, "training", False) is False:
        x, mean, variance, weight, bias = (argument(node, i, name, None) for i, name in enumerate(NORM_ARGUMENTS))
        rewriter.put(
            node,
            kernels.batch_norm,
            (x, mean, variance, weight, bias, argument(node, 7, "eps", 1e-5), (2, 3, 4, 5)),
        )


def activation_before_views(rewriter: Rewriter, node: Node) -> None:
    """Moves an activation behind views of a convolution's result to before the views."""
    if activation(node) is None:
        return
    x = before = node.args[0]
    while is_node(x) and x.target in _SHAPE_VIEWS and len(x.users) == 1:
        x = x.args[0]
    if x is before or rewriter.sole(x) is None:
        return
    with rewriter.graph.inserting_after(x):
        new = rewriter.graph.call_function(node.target, (x, *node.args[1:]), node.kwargs)
    new.meta.update(values_of(x), paths=node.meta.get("paths", []))
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    node.replace_all_uses_with(before)
    rewriter.graph.erase_node(node)


def fold_norm(rewriter: Rewriter, node: Node) -> None:
    """Folds a batch normalisation after a convolution, or before a pointwise one."""
    if node.target is kernels.batch_norm:
        conv = rewriter.sole(node.args[0])
        if conv is not None and has_statistics(node):
            with rewriter.graph.inserting_before(node):
                scale, shift = affine(rewriter, node, conv.weight)
                rewriter.convolve(node, scaled(rewriter, conv, scale, shift))
        return
    conv = rewriter.convolution(node)
    if conv is None or not conv.is_pointwise or conv.x.target is not kernels.batch_norm or len(conv.x.users) > 1:
        return
    if not has_statistics(conv.x) or not has_dimensions(conv.x, 4):
        return
    with rewriter.graph.inserting_before(node):
        scale, shift = affine(rewriter, conv.x, conv.weight)
        new_bias = rewriter.const(
            folding.through, conv.weight, conv.bias, shift, shape=(conv.outputs,), like=conv.weight
        )
        new_weight = rewriter.const(
            folding.scale_inputs, conv.weight, scale, shape=conv.weight.meta["shape"], like=conv.weight
        )
        rewriter.convolve(node, conv._replace(x=conv.x.args[0], weight=new_weight, bias=new_bias))


def affine(rewriter: Rewriter, norm: Node, like: Node) -> tuple[Node, Node]:
    """Scale and shift of a batch normalisation by running statistics."""
    _, mean, variance, weight, bias, eps, _ = norm.args
    shape = mean.meta["shape"]
    scale = rewriter.const(folding.norm_scale, variance, weight, eps, shape=shape, like=like)
    return scale, rewriter.const(folding.norm_shift, mean, bias, scale, shape=shape, like=like)


def fold_head(rewriter: Rewriter, node: Node) -> None:
    """Folds a batch normalisation before the mean over pixels into the linear layer that reads the mean."""
    if node.target is not F.linear or len(node.args) < 2 or not is_parameter(node.args[1]):
        return
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias", None)
    while is_node(x) and len(x.users) == 1 and is_mean_of_pixels(x):
        pooled, x = x, x.args[0]
    if not is_node(x) or x.target is not kernels.batch_norm or x is node.args[0] or len(x.users) > 1:
        return
    if not has_statistics(x) or not has_dimensions(x, 4) or not has_dimensions(node.args[0], 2):
        return
    outputs, inputs = weight.meta["shape"]
    with rewriter.graph.inserting_before(node):
        scale, shift = affine(rewriter, x, weight)
        new_weight = rewriter.const(folding.scale_columns, weight, scale, shape=(outputs, inputs), like=weight)
        new_bias = rewriter.const(folding.through, weight, bias, shift, shape=(outputs,), like=weight)
        pooled.replace_input_with(x, x.args[0])
        rewriter.erase(x, [])
        rewriter.put(node, F.linear, (node.args[0], new_weight, new_bias))


def scaled(rewriter: Rewriter, conv: Convolution, scale: Node, shift: Node | None) -> Convolution:
    shape = conv.weight.meta["shape"]
    weight = rewriter.const(folding.scale_outputs, conv.weight, scale, shape=shape, like=conv.weight)
    if conv.bias is None and shift is None:
        return conv._replace(weight=weight)
    bias = rewriter.const(folding.scale_bias, conv.bias, scale, shift, shape=(conv.outputs,), like=conv.weight)
    return conv._replace(weight=weight, bias=bias)


def fold_sum(rewriter: Rewriter, node: Node) -> None:
    """Folds branches on one map that are summed: convolutions, normalisations and the map itself."""
    if not is_sum(node):
        return
    first, second = node.args[:2]
    for a, b in ((first, second), (second, first)):
        merged = merge(rewriter, node, a, b)
        if merged is not None:
            rewriter.convolve(node, merged)
            return


def merge(rewriter: Rewriter, node: Node, a: Any, b: Any) -> Convolution | None:
    conv = rewriter.sole(a)
    if conv is None or conv.dilation != (1, 1) or not is_node(b):
        return None
    other = rewriter.sole(b)
    with rewriter.graph.inserting_before(node):
        if other is not None:
            return merge_branches(rewriter, conv, other)
        if not conv.keeps_size or conv.inputs != conv.outputs or not (conv.is_depthwise or conv.is_pointwise):
            return None
        if b is conv.x and (conv.is_pointwise or is_folded(conv)):  # a plain residual sum around one convolution stays
            return conv._replace(weight=with_identity(rewriter, conv.weight, None))
        is_norm = b.target is kernels.batch_norm and b.args[0] is conv.x and len(b.users) == 1
        if is_norm and has_statistics(b):
            scale, shift = affine(rewriter, b, conv.weight)
            weight = with_identity(rewriter, conv.weight, scale)
            bias = rewriter.const(folding.add_bias, conv.bias, shift, shape=(conv.outputs,), like=conv.weight)
            return conv._replace(weight=weight, bias=bias)
    return None


def with_identity(rewriter: Rewriter, weight: Node, scale: Node | None) -> Node:
    return rewriter.const(folding.add_identity, weight, scale, shape=weight.meta["shape"], like=weight)


def merge_branches(rewriter: Rewriter, conv: Convolution, other: Convolution) -> Convolution | None:
    if (conv.x, conv.stride, conv.dilation, conv.groups, conv.outputs) != (
        other.x, other.stride, other.dilation, other.groups, other.outputs
    ):  # fmt: skip
        return None
    top, left = conv.padding[0] - other.padding[0], conv.padding[2] - other.padding[2]
    bottom, right = conv.padding[1] - other.padding[1], conv.padding[3] - other.padding[3]
    (kh, kw), (other_kh, other_kw) = conv.kernel, other.kernel
    if min(top, left, bottom, right) < 0 or top + other_kh + bottom != kh or left + other_kw + right != kw:
        return None
    shape = conv.weight.meta["shape"]
    weight = rewriter.const(
        folding.add_kernels, conv.weight, other.weight, (left, right, top, bottom), shape=shape, like=conv.weight
    )
    bias = conv.bias
    if other.bias is not None:
        bias = rewriter.const(folding.add_bias, conv.bias, other.bias, shape=(conv.outputs,), like=conv.weight)
    return conv._replace(weight=weight, bias=bias)


def fold_scale(rewriter: Rewriter, node: Node) -> None:
    """Folds a scale per output channel, except a mixer's, whose operators take it as an argument."""
    found = rewriter.layer_scale(node)
    if found is None:
        return
    y, scale = found
    conv = rewriter.sole(y)
    if conv is None or ends_mixer(rewriter, y) or not is_folded(conv):
        return
    with rewriter.graph.inserting_before(node):
        vector = rewriter.const(folding.vector, scale, shape=(conv.outputs,), like=conv.weight)
        rewriter.convolve(node, scaled(rewriter, conv, vector, None))
