"""Finds in a graph what an operator computes, and puts the operator in its place: a graph in, the same graph with
operators in it out.

It goes by what is computed, whoever wrote the layers. First convolutions take in what is linear around them: batch
normalisations by running statistics, parallel branches that are summed, the map itself added to them, scales per
channel. Their weights then are computed from parameters by the functions of `folding`, as nodes of the graph. Then
operators are found, the mixers first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from . import folding, kernels
from .nodes import (
    MULS,
    Convolution,
    activation,
    describe_constant,
    has_dtype_of,
    has_shape_of,
    has_statistics,
    is_folded,
    is_node,
    is_parameter,
    is_permuted,
    is_permuted_to_channels_first,
    is_sum,
    other_argument,
    parse,
    uncast,
    vector_of_product,
    why_not,
)
from .normalize import argument, is_mean_of_pixels, is_view
from .shapes import Node, has_dimensions, values_of

_NORM_NAMES = ("input", "running_mean", "running_var", "weight", "bias")
#: Which give every element of their map once, so that what is done to each can be done before.
_SHAPE_VIEWS = ("reshape", "flatten", "permute", "transpose", torch.flatten, torch.permute, torch.transpose)


def rewrite(graph: fx.Graph, *, fold: bool = True) -> None:
    """Puts operators into the graph, whose nodes carry ``meta["value"]``, what they are without data.

    Args:
        graph: a normalised one.
        fold: whether weights may be folded; else what is made can be differentiated by the parameters.
    """
    Rewriter(graph, fold).run()


class Rewriter:
    """One pass over a graph after the other; each looks at a node and what is around it."""

    def __init__(self, graph: fx.Graph, fold: bool) -> None:
        self.graph, self.fold = graph, fold

    def run(self) -> None:
        for node in self.graph.nodes:
            describe_constant(node)
        passes: tuple[Callable[[Node], None], ...]
        if self.fold:
            passes = self.fold_norm, self.fold_head, self.fold_sum, self.fold_scale
        else:
            passes = self.branched_depthwise, self.depthwise_norm, self.norm_activation
        passes = self.canonical, self.activation_before_views, *passes, self.ffnified_attention, self.channel_mixer
        passes = *passes, self.norm_mixer if self.fold else self.feed_forward, self.lower
        for one in passes:
            for node in list(self.graph.nodes):
                if node.op in ("call_function", "call_method") and not node._erased:
                    one(node)
        self.round_constants()

    # Building

    def const(self, function: Callable, *args: Any, shape: tuple, like: Node) -> fx.Node:
        """A node computed from parameters alone, as they are; ``like`` tells the dtype it will have in the end."""
        node = self.graph.call_function(function, tuple(map(uncast, args)))
        node.meta.update(shape=tuple(shape), dtype=like.meta["dtype"], is_folded=True, paths=[])
        return node

    def put(self, at: Node, function: Callable, args: tuple) -> fx.Node:
        """A node in the place of another, which goes."""
        with self.graph.inserting_before(at):
            new = self.graph.call_function(function, args)
        new.meta.update(values_of(at), paths=[])
        at.replace_all_uses_with(new)
        self.erase(at, new.meta["paths"])
        return new

    def erase(self, node: Node, paths: list[str]) -> None:
        """A node that nobody reads, and what only it read: counts of readers then are right at once. Where they were
        from is put before ``paths``."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        paths[:0] = node.meta.get("paths", [])
        for other in reversed(inputs):
            if not other.users and other.op not in ("placeholder", "get_attr") and not other._erased:
                self.erase(other, paths)

    def round_constants(self) -> None:
        """Folded weights, computed in float64, in the dtype of the layer."""
        for node in list(self.graph.nodes):
            if not node.meta.get("is_folded") or all(user.meta.get("is_folded") for user in node.users):
                continue
            with self.graph.inserting_after(node):
                new = self.graph.call_function(folding.rounded, (node, node.meta["dtype"]))
            for user in list(node.users):
                if user is not new and not user.meta.get("is_folded"):
                    user.replace_input_with(node, new)

    def convolve(self, at: Node, conv: Convolution) -> None:
        self.put(at, kernels.convolution, tuple(conv))

    # Looking

    def convolution(self, node: Any) -> Convolution | None:
        is_one = is_node(node) and node.target is kernels.convolution
        return Convolution(*node.args) if is_one else None

    def sole(self, node: Any) -> Convolution | None:
        """A convolution whose result nobody reads but the node that asks."""
        return self.convolution(node) if is_node(node) and len(node.users) == 1 else None

    def next(self, node: Node) -> Node | None:
        """The only reader of a node."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    # Passes

    def canonical(self, node: Node) -> None:
        if node.target is torch.conv2d:
            conv = parse(node)
            if conv is not None:
                self.convolve(node, conv)
        elif node.target is torch.nn.functional.batch_norm and argument(node, 5, "training", False) is False:
            x, mean, variance, weight, bias = (argument(node, i, name, None) for i, name in enumerate(_NORM_NAMES))
            self.put(
                node,
                kernels.batch_norm,
                (x, mean, variance, weight, bias, argument(node, 7, "eps", 1e-5), (2, 3, 4, 5)),
            )

    def activation_before_views(self, node: Node) -> None:
        """An activation behind views of a convolution's result as the one that follows the convolution."""
        if activation(node) is None:
            return
        x = before = node.args[0]
        while is_node(x) and x.target in _SHAPE_VIEWS and len(x.users) == 1:
            x = x.args[0]
        if x is before or self.sole(x) is None:
            return
        with self.graph.inserting_after(x):
            new = self.graph.call_function(node.target, (x, *node.args[1:]), node.kwargs)
        new.meta.update(values_of(x), paths=node.meta.get("paths", []))
        x.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        node.replace_all_uses_with(before)
        self.graph.erase_node(node)

    def fold_norm(self, node: Node) -> None:
        """A batch normalisation behind a convolution, or before a pointwise one."""
        if node.target is kernels.batch_norm:
            conv = self.sole(node.args[0])
            if conv is not None and has_statistics(node):
                with self.graph.inserting_before(node):
                    scale, shift = self.affine(node, conv.weight)
                    self.convolve(node, self.scaled(conv, scale, shift))
            return
        conv = self.convolution(node)
        if conv is None or not conv.is_pointwise or conv.x.target is not kernels.batch_norm or len(conv.x.users) > 1:
            return
        if not has_statistics(conv.x) or not has_dimensions(conv.x, 4):
            return
        with self.graph.inserting_before(node):
            scale, shift = self.affine(conv.x, conv.weight)
            new_bias = self.const(
                folding.through, conv.weight, conv.bias, shift, shape=(conv.outputs,), like=conv.weight
            )
            new_weight = self.const(
                folding.scale_inputs, conv.weight, scale, shape=conv.weight.meta["shape"], like=conv.weight
            )
            self.convolve(node, conv._replace(x=conv.x.args[0], weight=new_weight, bias=new_bias))

    def affine(self, norm: Node, like: Node) -> tuple[Node, Node]:
        """Scale and shift of a batch normalisation by running statistics."""
        _, mean, variance, weight, bias, eps, _ = norm.args
        shape = mean.meta["shape"]
        scale = self.const(folding.norm_scale, variance, weight, eps, shape=shape, like=like)
        return scale, self.const(folding.norm_shift, mean, bias, scale, shape=shape, like=like)

    def fold_head(self, node: Node) -> None:
        """A batch normalisation before the mean over pixels that only a linear layer reads."""
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
        with self.graph.inserting_before(node):
            scale, shift = self.affine(x, weight)
            new_weight = self.const(folding.scale_columns, weight, scale, shape=(outputs, inputs), like=weight)
            new_bias = self.const(folding.through, weight, bias, shift, shape=(outputs,), like=weight)
            pooled.replace_input_with(x, x.args[0])
            self.erase(x, [])
            self.put(node, F.linear, (node.args[0], new_weight, new_bias))

    def scaled(self, conv: Convolution, scale: Node, shift: Node | None) -> Convolution:
        shape = conv.weight.meta["shape"]
        weight = self.const(folding.scale_outputs, conv.weight, scale, shape=shape, like=conv.weight)
        if conv.bias is None and shift is None:
            return conv._replace(weight=weight)
        bias = self.const(folding.scale_bias, conv.bias, scale, shift, shape=(conv.outputs,), like=conv.weight)
        return conv._replace(weight=weight, bias=bias)

    def fold_sum(self, node: Node) -> None:
        """Branches on one map that are summed: convolutions, normalisations and the map itself."""
        if not is_sum(node):
            return
        first, second = node.args[:2]
        for a, b in ((first, second), (second, first)):
            merged = self.merge(node, a, b)
            if merged is not None:
                self.convolve(node, merged)
                return

    def merge(self, node: Node, a: Any, b: Any) -> Convolution | None:
        conv = self.sole(a)
        if conv is None or conv.dilation != (1, 1) or not is_node(b):
            return None
        other = self.sole(b)
        with self.graph.inserting_before(node):
            if other is not None:
                return self.merge_branches(conv, other)
            if not conv.keeps_size or conv.inputs != conv.outputs or not (conv.is_depthwise or conv.is_pointwise):
                return None
            if b is conv.x and (conv.is_pointwise or is_folded(conv)):  # a residual sum of one convolution stays
                args = (conv.weight, None, conv.groups)
                weight = self.const(folding.add_identity, *args, shape=conv.weight.meta["shape"], like=conv.weight)
                return conv._replace(weight=weight)
            is_norm = b.target is kernels.batch_norm and b.args[0] is conv.x and len(b.users) == 1
            if is_norm and has_statistics(b):
                scale, shift = self.affine(b, conv.weight)
                weight = self.const(
                    folding.add_identity, conv.weight, scale, conv.groups, shape=conv.weight.meta["shape"],
                    like=conv.weight,
                )  # fmt: skip
                bias = self.const(folding.add_bias, conv.bias, shift, shape=(conv.outputs,), like=conv.weight)
                return conv._replace(weight=weight, bias=bias)
        return None

    def merge_branches(self, conv: Convolution, other: Convolution) -> Convolution | None:
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
        weight = self.const(
            folding.add_kernels, conv.weight, other.weight, (left, right, top, bottom), shape=shape, like=conv.weight
        )
        bias = conv.bias
        if other.bias is not None:
            bias = self.const(folding.add_bias, conv.bias, other.bias, shape=(conv.outputs,), like=conv.weight)
        return conv._replace(weight=weight, bias=bias)

    def fold_scale(self, node: Node) -> None:
        """A scale per output channel, where it is no mixer's, whose operators take it as it is."""
        found = self.layer_scale(node)
        if found is None:
            return
        y, scale = found
        conv = self.sole(y)
        if conv is None or self.ends_mixer(y) or not is_folded(conv):
            return
        with self.graph.inserting_before(node):
            vector = self.const(folding.vector, scale, shape=(conv.outputs,), like=conv.weight)
            self.convolve(node, self.scaled(conv, vector, None))

    def layer_scale(self, node: Any) -> tuple[Node, Node] | None:
        """(map, scale per channel) of a product of them."""
        if not is_node(node) or node.target not in MULS or len(node.args) != 2:
            return None
        for y, scale in (node.args, node.args[::-1]):
            conv = self.convolution(y)
            if conv is None or not is_parameter(scale) or not has_dtype_of(y, node):
                continue
            if scale.meta.get("shape") in ((conv.outputs, 1, 1), (1, conv.outputs, 1, 1)):
                return y, scale
        return None

    def ends_mixer(self, node: Node) -> bool:
        return self.attention_at(node) is not None or self.feed_forward_at(node) is not None

    def attention_at(self, node: Any) -> tuple[Convolution, str, Convolution] | None:
        """Keys, activation and values of FFNified attention whose values the node is."""
        value = self.convolution(node)
        if value is None or not (value.is_depthwise and value.keeps_size and value.inputs == value.outputs):
            return None
        found = activation(value.x)
        key = self.sole(found[1]) if found is not None and len(value.x.users) == 1 else None
        if found is None or key is None:
            return None
        same = key.is_depthwise and key.keeps_size and key.inputs == key.outputs == value.inputs
        return (key, found[0], value) if same and key.kernel == value.kernel else None

    def pointwise_pair_at(self, node: Any) -> tuple[Convolution, str, Convolution] | None:
        """Expansion, activation and projection, both pointwise, the latter being the node."""
        project = self.convolution(node)
        if project is None or not project.is_pointwise:
            return None
        found = activation(project.x)
        expand = self.sole(found[1]) if found is not None and len(project.x.users) == 1 else None
        if found is None or expand is None or not expand.is_pointwise:
            return None
        return expand, found[0], project

    def feed_forward_at(self, node: Any) -> tuple[Convolution, Convolution, str, Convolution] | None:
        """The same with a depthwise convolution before: a channel mixer."""
        found = self.pointwise_pair_at(node)
        depthwise = self.sole(found[0].x) if found is not None else None
        if found is None or depthwise is None or not (depthwise.is_depthwise and depthwise.keeps_size):
            return None
        return (depthwise, *found) if depthwise.inputs == depthwise.outputs else None

    def ffnified_attention(self, node: Node) -> None:
        found = self.attention_at(node)
        if found is None:
            return
        key, name, value = found
        args = (key.x, key.weight, key.bias, value.weight, value.bias, name)
        self.mixer(node, kernels.ffnified_attention, args)

    def channel_mixer(self, node: Node) -> None:
        found = self.feed_forward_at(node)
        if found is None:
            return
        depthwise, expand, name, project = found
        weights = (depthwise.weight, depthwise.bias, expand.weight, expand.bias, project.weight, project.bias)
        self.mixer(node, kernels.channel_mixer, (depthwise.x, *weights, name))

    def dense_at(self, node: Any) -> tuple[Any, Node, Node | None] | None:
        """(map, weight, bias) of a pointwise convolution, or of a linear layer on maps whose channels come last."""
        conv = self.convolution(node)
        if conv is not None:
            return (conv.x, conv.weight, conv.bias) if conv.is_pointwise else None
        if not is_node(node) or node.target is not F.linear or not has_dimensions(node, 4):
            return None
        x, weight, bias = node.args[0], argument(node, 1, "weight", None), argument(node, 2, "bias", None)
        takes = is_parameter(weight) and len(weight.meta["shape"]) == 2 and (bias is None or is_parameter(bias))
        return (x, weight, bias) if takes else None

    def normalized_depthwise_at(self, node: Any) -> tuple[Convolution, tuple] | None:
        """A depthwise convolution behind which only a LayerNorm over its channels, the node, reads; weight, bias and
        eps of that."""
        if not is_node(node) or node.target is not F.layer_norm or len(node.users) != 1:
            return None
        moved = node.args[0]
        if not is_node(moved) or len(moved.users) != 1 or not is_permuted(moved, (0, 2, 3, 1)):
            return None
        conv = self.sole(moved.args[0])
        if conv is None or not (conv.is_depthwise and conv.keeps_size) or conv.inputs != conv.outputs:
            return None
        shape, eps = argument(node, 1, "normalized_shape", None), argument(node, 4, "eps", 1e-5)
        affine = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
        is_over_channels = isinstance(shape, tuple | list) and tuple(shape) == (conv.outputs,)
        # Under autocast weights of normalisations are wider than maps.
        are_like_maps = all(p is None or (is_parameter(p) and has_dtype_of(p, node)) for p in affine)
        return (conv, (*affine, eps)) if is_over_channels and isinstance(eps, float) and are_like_maps else None

    def norm_mixer(self, node: Node) -> None:
        """ConvNeXt's block: a depthwise convolution, a LayerNorm and two pointwise layers, of which the node is the
        second."""
        project = self.dense_at(node)
        found = activation(project[0]) if project is not None else None
        if project is None or found is None or len(project[0].users) > 1:
            return
        name, before = found
        expand = self.dense_at(before) if is_node(before) and len(before.users) == 1 else None
        if expand is None or before.target is not node.target:
            return
        norm, is_map = expand[0], node.target is not F.linear
        if is_map:
            if not is_node(norm) or len(norm.users) > 1 or not is_permuted_to_channels_first(norm):
                return
            norm = norm.args[0]
        mixed = self.normalized_depthwise_at(norm)
        if mixed is None:
            return
        depthwise, affine = mixed
        if is_map:
            scale, residual, end = self.epilogue(node)
        else:
            scale, residual, moved, end = self.epilogue_of_pixels(node)
            if moved is None:
                return
        weight = self.said_channels_last(node, depthwise)
        args = (depthwise.x, weight, depthwise.bias, *affine, *expand[1:], *project[1:], name, scale, residual)
        self.put(end, kernels.norm_mixer, args)

    def feed_forward(self, node: Node) -> None:
        """Two pointwise convolutions and the activation between them, in training."""
        found = self.pointwise_pair_at(node)
        if found is not None:
            expand, name, project = found
            args = (expand.x, expand.weight, expand.bias, project.weight, project.bias, name)
            self.mixer(node, kernels.feed_forward, args)

    def norm_at(self, node: Any) -> tuple[Convolution, tuple] | None:
        """A depthwise convolution without bias that only feeds a normalisation by the batch, and that norm's fields."""
        if not is_node(node) or node.target is not kernels.batch_norm_training or len(node.users) != 1:
            return None
        conv = self.sole(node.args[0])
        if conv is None or conv.bias is not None or not conv.is_depthwise or conv.dilation != (1, 1):
            return None
        kh, kw = conv.kernel
        centred = kh % 2 == kw % 2 == 1 and conv.padding == (kh // 2, kh // 2, kw // 2, kw // 2)
        takes = centred and set(conv.stride) <= {1, 2} and len(node.args) == 8
        return (conv, node.args[1:]) if takes else None

    def branched_depthwise(self, node: Node) -> None:
        """Two depthwise branches of one map, each with its normalisation, that are summed, in training."""
        if not is_sum(node):
            return
        first, second = map(self.norm_at, node.args)
        if first is None or second is None:
            return
        (conv, norm), (other, other_norm) = first, second
        if (conv.x, conv.stride, conv.groups, conv.outputs) == (other.x, other.stride, other.groups, other.outputs):
            self.put_branches(node, (conv, other), (norm, other_norm))

    def depthwise_norm(self, node: Node) -> None:
        found = self.norm_at(node)
        if found is not None:
            self.put_branches(node, (found[0],), (found[1],))

    def put_branches(self, node: Node, convs: tuple[Convolution, ...], norms: tuple) -> None:
        name, end = self.following_activation(node)
        weights = tuple(conv.weight for conv in convs)
        self.put(end, kernels.branched_depthwise, (convs[0].x, weights, norms, convs[0].stride, name, convs[0].groups))

    def norm_activation(self, node: Node) -> None:
        if node.target is kernels.batch_norm_training and len(node.args) == 8:
            name, end = self.following_activation(node)
            self.put(end, kernels.batch_norm_training, (*node.args, name))

    def following_activation(self, node: Node) -> tuple[str, Node]:
        """The activation that alone reads a node, and where its result is; ("none", node) without one."""
        following = self.next(node)
        found = activation(following)
        return ("none", node) if found is None or following is None else (found[0], following)

    def mixer(self, node: Node, function: Callable, args: tuple) -> None:
        """An operator in the place of the node and of the scale and the residual sum that may follow."""
        scale, residual, end = self.epilogue(node)
        self.put(end, function, (*args, scale, residual))

    def epilogue(self, node: Node) -> tuple[Node | None, Node | None, Node]:
        """The scale per channel and the residual that a convolution's result is multiplied with and added to, and where
        the result then is."""
        scale = residual = None
        end, following = node, self.next(node)
        found = self.layer_scale(following)
        if found is not None and following is not None:
            scale, end, following = found[1], following, self.next(following)
        if following is not None and is_sum(following) and has_shape_of(other_argument(following, end), end):
            residual, end = other_argument(following, end), following
        return scale, residual, end

    def stem_before(self, conv: Convolution) -> Node | None:
        """The convolution of an image, by an operator, that only a dense one of several taps reads."""
        if not self.fold or conv.groups != 1 or conv.kernel == (1, 1) or not is_node(conv.x):
            return None
        takes = conv.dilation == (1, 1) and set(conv.stride) <= {1, 2} and conv.x.target is kernels.conv2d
        takes = takes and len(conv.x.users) == 1 and conv.x.args[6:] == (None, None)
        return conv.x if takes and conv.x.args[1].meta["shape"][1] <= 4 else None

    def lower(self, node: Node) -> None:
        """What is left of convolutions onto operators, with the activation that follows, or back to torch's."""
        conv = self.convolution(node)
        if conv is None:
            if self.fold and node.target is F.linear:
                self.linear(node)
            return
        first = self.stem_before(conv)
        if first is not None:
            name, end = self.following_activation(node)
            second = (conv.weight, conv.bias, conv.stride, conv.padding, name)
            self.put(end, kernels.conv2d_pair, (*first.args[:6], *second))
            return
        node.meta["reason"] = why_not(conv)
        takes = conv.dilation == (1, 1) and set(conv.stride) <= {1, 2}
        is_dense = conv.groups == 1 and (conv.kernel == (1, 1) or conv.inputs <= 4)
        if not takes or not (conv.is_depthwise or is_dense):
            return
        if not self.fold and not conv.is_depthwise:
            if conv.is_pointwise:
                self.put(node, kernels.projection, (conv.x, conv.weight, conv.bias))
            return
        name, end = self.following_activation(node)
        args = (conv.x, self.said_channels_last(node, conv), conv.bias, conv.stride, conv.padding, name)
        if conv.is_depthwise:
            self.put(end, kernels.depthwise_conv2d, (*args, conv.groups))
            return
        scale, residual, end = self.epilogue(node) if name == "none" else (None, None, end)
        self.put(end, kernels.conv2d, (*args, scale, residual))

    def linear(self, node: Node) -> None:
        """A linear layer on pixels or tokens, with the activation, or the scale and the residual sum, that follow."""
        x, weight, bias = node.args[0], argument(node, 1, "weight", None), argument(node, 2, "bias", None)
        # Of a classifier's head, weights are read rather than multiplied: PyTorch does that as well.
        if has_dimensions(node, 2) or not is_parameter(weight) or len(weight.meta["shape"]) != 2:
            return
        if bias is not None and not is_parameter(bias):
            return
        name, end = self.following_activation(node)
        scale = residual = moved = None
        if name == "none":
            scale, residual, moved, end = self.epilogue_of_pixels(node)
        if scale is None and residual is None and moved is not None:
            end, moved = node, None
        if moved is None:
            self.put(end, kernels.linear, (x, weight, bias, name, scale, residual))
            return
        with self.graph.inserting_before(end):
            if residual is not None:
                residual = self.graph.call_function(torch.permute, (residual, (0, 2, 3, 1)))
            pixels = self.graph.call_function(kernels.linear, (x, weight, bias, name, scale, residual))
        pixels.meta.update(values_of(node))
        result = self.put(end, torch.permute, (pixels, (0, 3, 1, 2)))
        pixels.meta["paths"], result.meta["paths"] = result.meta["paths"], []

    def epilogue_of_pixels(self, node: Node) -> tuple[Node | None, Node | None, Node | None, Node]:
        """As `epilogue`, of a map whose channels come last; also the node that makes them first, if one comes before
        the residual sum."""
        end, scale, residual, moved = node, None, None, None
        while residual is None and (following := self.next(end)) is not None:
            if scale is None and (found := vector_of_product(following, end, -1 if moved is None else -3)) is not None:
                scale = found
            elif moved is None and is_permuted_to_channels_first(following):
                moved = following
            elif is_sum(following) and has_shape_of(other := other_argument(following, end), end):
                residual = other
            else:
                break
            end = following
        return scale, residual, moved, end

    def said_channels_last(self, node: Node, conv: Convolution) -> Node:
        """The weight, which has to say how the result is laid out where the map's strides may not."""
        if not self.fold or not is_view(uncast(conv.x)):
            return conv.weight
        with self.graph.inserting_before(node):
            return self.const(folding.channels_last, conv.weight, shape=conv.weight.meta["shape"], like=conv.weight)
