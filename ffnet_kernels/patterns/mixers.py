"""The patterns of several convolutions: FFNified attention, and mixers of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from .. import kernels
from ..nodes import (
    Convolution,
    activation,
    is_node,
    is_parameter,
    is_permuted,
    is_permuted_to_channels_first,
)
from ..normalize import argument
from ..shapes import Node, has_dimensions, has_dtype_of
from .rewriter import Rewriter


def attention_at(rewriter: Rewriter, node: Any) -> tuple[Convolution, str, Convolution] | None:
    """Keys, activation and values of FFNified attention, if the node is the convolution by values."""
    value = rewriter.convolution(node)
    if value is None or not (value.is_depthwise and value.keeps_size and value.inputs == value.outputs):
        return None
    found = activation(value.x)
    key = rewriter.sole(found[1]) if found is not None and len(value.x.users) == 1 else None
    if found is None or key is None:
        return None
    same = key.is_depthwise and key.keeps_size and key.inputs == key.outputs == value.inputs
    return (key, found[0], value) if same and key.kernel == value.kernel else None


def pointwise_pair_at(rewriter: Rewriter, node: Any) -> tuple[Convolution, str, Convolution] | None:
    """Expansion, activation and projection, if the node is the projection of a pointwise pair."""
    project = rewriter.convolution(node)
    if project is None or not project.is_pointwise:
        return None
    found = activation(project.x)
    expand = rewriter.sole(found[1]) if found is not None and len(project.x.users) == 1 else None
    if found is None or expand is None or not expand.is_pointwise:
        return None
    return expand, found[0], project


def feed_forward_at(rewriter: Rewriter, node: Any) -> tuple[Convolution, Convolution, str, Convolution] | None:
    """The same with a depthwise convolution before it: a channel mixer."""
    found = pointwise_pair_at(rewriter, node)
    depthwise = rewriter.sole(found[0].x) if found is not None else None
    if found is None or depthwise is None or not (depthwise.is_depthwise and depthwise.keeps_size):
        return None
    return (depthwise, *found) if depthwise.inputs == depthwise.outputs else None


def ends_mixer(rewriter: Rewriter, node: Node) -> bool:
    """Whether a node is the last convolution of a mixer at inference."""
    return attention_at(rewriter, node) is not None or feed_forward_at(rewriter, node) is not None


def ffnified_attention(rewriter: Rewriter, node: Node) -> None:
    found = attention_at(rewriter, node)
    if found is None:
        return
    key, name, value = found
    args = (key.x, key.weight, key.bias, value.weight, value.bias, name)
    mixer(rewriter, node, kernels.ffnified_attention, args)


def channel_mixer(rewriter: Rewriter, node: Node) -> None:
    found = feed_forward_at(rewriter, node)
    if found is None:
        return
    depthwise, expand, name, project = found
    weights = (depthwise.weight, depthwise.bias, expand.weight, expand.bias, project.weight, project.bias)
    mixer(rewriter, node, kernels.channel_mixer, (depthwise.x, *weights, name))


def feed_forward(rewriter: Rewriter, node: Node) -> None:
    """Matches two pointwise convolutions and the activation between them, in training."""
    found = pointwise_pair_at(rewriter, node)
    if found is not None:
        expand, name, project = found
        args = (expand.x, expand.weight, expand.bias, project.weight, project.bias, name)
        mixer(rewriter, node, kernels.feed_forward, args)


def mixer(rewriter: Rewriter, node: Node, function: Callable, args: tuple) -> None:
    """Replaces the node, and the scale and residual sum that may follow, by an operator."""
    scale, residual, end = rewriter.epilogue(node)
    rewriter.put(end, function, (*args, scale, residual))


def norm_mixer(rewriter: Rewriter, node: Node) -> None:
    """Matches ConvNeXt's block: a depthwise convolution, a LayerNorm and two pointwise layers, the node being the
    second."""
    project = dense_at(rewriter, node)
    found = activation(project[0]) if project is not None else None
    if project is None or found is None or len(project[0].users) > 1:
        return
    name, before = found
    expand = dense_at(rewriter, before) if is_node(before) and len(before.users) == 1 else None
    if expand is None or before.target is not node.target:
        return
    norm, is_map = expand[0], node.target is not F.linear
    if is_map:
        if not is_node(norm) or len(norm.users) > 1 or not is_permuted_to_channels_first(norm):
            return
        norm = norm.args[0]
    mixed = normalized_depthwise_at(rewriter, norm)
    if mixed is None:
        return
    depthwise, affine = mixed
    if is_map:
        scale, residual, end = rewriter.epilogue(node)
    else:
        scale, residual, moved, end = rewriter.epilogue_of_pixels(node)
        if moved is None:
            return
    weight = rewriter.said_channels_last(node, depthwise)
    args = (depthwise.x, weight, depthwise.bias, *affine, *expand[1:], *project[1:], name, scale, residual)
    rewriter.put(end, kernels.norm_mixer, args)


def dense_at(rewriter: Rewriter, node: Any) -> tuple[Any, Node, Node | None] | None:
    """(map, weight, bias) of a pointwise convolution, or of a linear layer on maps whose channels come last."""
    conv = rewriter.convolution(node)
    if conv is not None:
        return (conv.x, conv.weight, conv.bias) if conv.is_pointwise else None
    if not is_node(node) or node.target is not F.linear or not has_dimensions(node, 4):
        return None
    x, weight, bias = node.args[0], argument(node, 1, "weight", None), argument(node, 2, "bias", None)
    takes = is_parameter(weight) and len(weight.meta["shape"]) == 2 and (bias is None or is_parameter(bias))
    return (x, weight, bias) if takes else None


def normalized_depthwise_at(rewriter: Rewriter, node: Any) -> tuple[Convolution, tuple] | None:
    """A depthwise convolution whose only reader is the node, a LayerNorm over its channels; and weight, bias and eps of
    that."""
    if not is_node(node) or node.target is not F.layer_norm or len(node.users) != 1:
        return None
    moved = node.args[0]
    if not is_node(moved) or len(moved.users) != 1 or not is_permuted(moved, (0, 2, 3, 1)):
        return None
    conv = rewriter.sole(moved.args[0])
    if conv is None or not (conv.is_depthwise and conv.keeps_size) or conv.inputs != conv.outputs:
        return None
    shape, eps = argument(node, 1, "normalized_shape", None), argument(node, 4, "eps", 1e-5)
    affine = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
    is_over_channels = isinstance(shape, tuple | list) and tuple(shape) == (conv.outputs,)
    # Under autocast, weights of normalisations are wider than maps.
    are_like_maps = all(p is None or (is_parameter(p) and has_dtype_of(p, node)) for p in affine)
    return (conv, (*affine, eps)) if is_over_channels and isinstance(eps, float) and are_like_maps else None
