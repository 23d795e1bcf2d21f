"""The means by which passes inspect and change a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from .. import folding, kernels
from ..nodes import (
    MULS,
    Convolution,
    activation,
    describe_constant,
    has_shape_of,
    is_node,
    is_parameter,
    is_permuted_to_channels_first,
    is_sum,
    other_argument,
    uncast,
    vector_of_product,
)
from ..normalize import is_view
from ..shapes import Node, has_dtype_of, values_of


class Rewriter:
    """Inspects and changes a graph on behalf of passes.

    Attributes:
        graph: ``meta["value"]`` of its nodes is their value without data.
        fold: whether weights may be folded; otherwise the result is differentiable with respect to the parameters.
    """

    def __init__(self, graph: fx.Graph, fold: bool) -> None:
        self.graph, self.fold = graph, fold

    def run(self, *passes: Callable[[Rewriter, Node], None]) -> None:
        """Runs passes over the graph, one after the other."""
        for node in self.graph.nodes:
            describe_constant(node)
        for one in passes:
            for node in list(self.graph.nodes):
                if node.op in ("call_function", "call_method") and not node._erased:
                    one(self, node)
        self.round_constants()

    # Changing

    def const(self, function: Callable, *args: Any, shape: tuple, like: Node) -> fx.Node:
        """Adds a node that is computed from parameters alone; ``like`` determines the dtype of its final value."""
        node = self.graph.call_function(function, tuple(map(uncast, args)))
        node.meta.update(shape=tuple(shape), dtype=like.meta["dtype"], is_folded=True, paths=[])
        return node

    def put(self, at: Node, function: Callable, args: tuple) -> fx.Node:
        """Replaces a node by a call of a function."""
        with self.graph.inserting_before(at):
            new = self.graph.call_function(function, args)
        new.meta.update(values_of(at), paths=[])
        at.replace_all_uses_with(new)
        self.erase(at, new.meta["paths"])
        return new

    def erase(self, node: Node, paths: list[str]) -> None:
        """Erases a node without readers, and nodes that only it read, so that counts of readers are right at once.
        Their module paths are put in front of ``paths``."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        paths[:0] = node.meta.get("paths", [])
        for other in reversed(inputs):
            if not other.users and other.op not in ("placeholder", "get_attr") and not other._erased:
                self.erase(other, paths)

    def round_constants(self) -> None:
        """Rounds folded weights, computed in float64, to the dtype of their layers."""
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
        """The convolution that a node is, if it has a single reader."""
        return self.convolution(node) if is_node(node) and len(node.users) == 1 else None

    def next(self, node: Node) -> Node | None:
        """The reader of a node, if there is only one."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def layer_scale(self, node: Any) -> tuple[Node, Node] | None:
        """(map, scale) if a node is the product of a convolution and a scale per channel."""
        if not is_node(node) or node.target not in MULS or len(node.args) != 2:
            return None
        for y, scale in (node.args, node.args[::-1]):
            conv = self.convolution(y)
            if conv is None or not is_parameter(scale) or not has_dtype_of(y, node):
                continue
            if scale.meta.get("shape") in ((conv.outputs, 1, 1), (1, conv.outputs, 1, 1)):
                return y, scale
        return None

    # Epilogues, which become part of the operator they follow

    def following_activation(self, node: Node) -> tuple[str, Node]:
        """The activation that is a node's only reader, and its node; ("none", node) if there is none."""
        following = self.next(node)
        found = activation(following)
        return ("none", node) if found is None or following is None else (found[0], following)

    def epilogue(self, node: Node) -> tuple[Node | None, Node | None, Node]:
        """The scale per channel and the residual that follow a convolution, and the last node of these."""
        scale = residual = None
        end, following = node, self.next(node)
        found = self.layer_scale(following)
        if found is not None and following is not None:
            scale, end, following = found[1], following, self.next(following)
        if following is not None and is_sum(following) and has_shape_of(other_argument(following, end), end):
            residual, end = other_argument(following, end), following
        return scale, residual, end

    def epilogue_of_pixels(self, node: Node) -> tuple[Node | None, Node | None, Node | None, Node]:
        """Like `epilogue`, for a map with its channels last; also the node that moves them first, if it precedes the
        residual sum."""
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
        """The weight, with channels-last strides if the map's own strides may be ambiguous."""
        if not self.fold or not is_view(uncast(conv.x)):
            return conv.weight
        with self.graph.inserting_before(node):
            return self.const(folding.channels_last, conv.weight, shape=conv.weight.meta["shape"], like=conv.weight)
