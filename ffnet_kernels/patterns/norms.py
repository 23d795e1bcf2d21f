"""Training: batch normalisation by batch statistics, with the convolution before and the activation after it."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..nodes import Convolution, is_node, is_sum
from ..shapes import Node
from .rewriter import Rewriter


def branched_depthwise(rewriter: Rewriter, node: Node) -> None:
    """Matches the sum of two depthwise branches of one map, each with its normalisation."""
    if not is_sum(node):
        return
    first, second = (norm_at(rewriter, one) for one in node.args)
    if first is None or second is None:
        return
    (conv, norm), (other, other_norm) = first, second
    if (conv.x, conv.stride, conv.groups, conv.outputs) == (other.x, other.stride, other.groups, other.outputs):
        put_branches(rewriter, node, (conv, other), (norm, other_norm))


def depthwise_norm(rewriter: Rewriter, node: Node) -> None:
    found = norm_at(rewriter, node)
    if found is not None:
        put_branches(rewriter, node, (found[0],), (found[1],))


def norm_at(rewriter: Rewriter, node: Any) -> tuple[Convolution, tuple] | None:
    """A depthwise convolution without bias whose only reader is the node, a batch normalisation; and that one's
    fields."""
    if not is_node(node) or node.target is not kernels.batch_norm_training or len(node.users) != 1:
        return None
    conv = rewriter.sole(node.args[0])
    if conv is None or conv.bias is not None or not conv.is_depthwise or conv.dilation != (1, 1):
        return None
    kh, kw = conv.kernel
    centred = kh % 2 == kw % 2 == 1 and conv.padding == (kh // 2, kh // 2, kw // 2, kw // 2)
    takes = centred and set(conv.stride) <= {1, 2} and len(node.args) == 8
    return (conv, node.args[1:]) if takes else None


def put_branches(rewriter: Rewriter, node: Node, convs: tuple[Convolution, ...], norms: tuple) -> None:
    name, end = rewriter.following_activation(node)
    weights = tuple(conv.weight for conv in convs)
    rewriter.put(end, kernels.branched_depthwise, (convs[0].x, weights, norms, convs[0].stride, name, convs[0].groups))


def norm_activation(rewriter: Rewriter, node: Node) -> None:
    if node.target is kernels.batch_norm_training and len(node.args) == 8:
        name, end = rewriter.following_activation(node)
        rewriter.put(end, kernels.batch_norm_training, (*node.args, name))
