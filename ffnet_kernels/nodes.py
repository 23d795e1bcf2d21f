"""Recognises what nodes of a graph compute: convolutions, activations, sums, and functions of parameters."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .backends.activations import name_of
from .normalize import argument
from .shapes import Node, has_dtype_of, shapes

ADDS = (operator.add, torch.add, "add")
MULS = (operator.mul, torch.mul, "mul")


class Convolution(NamedTuple):
    """The arguments of a 2-D convolution's node, with padding as (top, bottom, left, right)."""

    x: Node
    weight: Node
    bias: Node | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def kernel(self) -> tuple[int, int]:
        return tuple(self.weight.meta["shape"][2:])

    @property
    def inputs(self) -> int:
        return self.weight.meta["shape"][1] * self.groups

    @property
    def outputs(self) -> int:
        return self.weight.meta["shape"][0]

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.inputs and self.outputs in (self.inputs, 2 * self.inputs)

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0, 0, 0) and self.groups == 1

    @property
    def keeps_size(self) -> bool:
        """Whether the result has the size of the map, with the kernel centred on each pixel."""
        kh, kw = self.kernel
        centred = (kh // 2, kh // 2, kw // 2, kw // 2)
        return self.stride == self.dilation == (1, 1) and kh % 2 == kw % 2 == 1 and self.padding == centred


def why_not(conv: Convolution) -> str:
    """Why a convolution stays with PyTorch, should it do so."""
    if conv.dilation != (1, 1):
        return f"a dilation of {conv.dilation[0]}×{conv.dilation[1]}"
    if not set(conv.stride) <= {1, 2}:
        return f"a stride of {conv.stride[0]}×{conv.stride[1]}"
    if conv.groups == 1:
        return "dense, and not 1×1"
    if conv.groups == conv.inputs:
        return f"depthwise with {conv.outputs // conv.groups} outputs a channel"
    return f"{conv.groups} groups of several channels"


def parse(node: Node) -> Convolution | None:
    """The convolution of a node that calls ``torch.conv2d``; None unless all arguments but the map are known."""
    x, weight = argument(node, 0, "input", None), argument(node, 1, "weight", None)
    bias = argument(node, 2, "bias", None)
    if not is_node(x) or not is_parameter(weight) or len(weight.meta["shape"]) != 4:
        return None
    if bias is not None and not is_parameter(bias):
        return None
    stride, dilation = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 5, "dilation", 1))
    groups = argument(node, 6, "groups", 1)
    if stride is None or dilation is None or type(groups) is not int:
        return None
    padding = argument(node, 4, "padding", 0)
    if padding == "same" and stride == (1, 1):
        total = [d * (k - 1) for d, k in zip(dilation, weight.meta["shape"][2:], strict=True)]
        pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        pair = (0, 0) if padding == "valid" else _pair(padding)
        if pair is None:
            return None
        pads = (pair[0], pair[0], pair[1], pair[1])
    if min(pads) < 0:
        return None
    return Convolution(x, weight, bias, stride, pads, dilation, groups)


def activation(node: Any) -> tuple[str, Node] | None:
    """(name, map) if a node is an activation that operators support."""
    if not is_node(node) or node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = name_of(node.target, node.args[1:], node.kwargs)
    return None if name is None else (name, node.args[0])


def is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def has_statistics(norm: Node) -> bool:
    return all(map(is_parameter, norm.args[1:3]))


def has_shape_of(node: Any, other: Node) -> bool:
    return shapes(node) is not None and shapes(node) == shapes(other)


def is_cast(node: Any) -> bool:
    """Whether a node only casts another one."""
    return is_node(node) and node.target == "to" and isinstance(argument(node, 1, "dtype", None), torch.dtype)


def uncast(node: Any) -> Any:
    """The node before a cast, or the node itself."""
    while is_cast(node):
        node = node.args[0]
    return node


def other_argument(node: Node, one: Node) -> Any:
    """The other operand of a sum or a product; None if both are the same."""
    others = [a for a in node.args[:2] if a is not one]
    return others[0] if len(others) == 1 else None


def vector_of_product(node: Node, map: Node, axis: int) -> Node | None:
    """The parameter that a map is multiplied with, if it lies along one axis, counted from the last."""
    if node.target not in MULS or len(node.args) != 2:
        return None
    vector = other_argument(node, map)
    of_map = shapes(map)
    if (
        not is_parameter(vector)
        or not has_dtype_of(map, node)
        or of_map is None
        or len(of_map[0]) < -axis
        or of_map[0][axis] != of_map[1][axis]
    ):
        return None
    shape, extents = vector.meta["shape"], [1] * len(of_map[0])
    extents[axis] = of_map[0][axis]
    return (
        vector if -axis <= len(shape) <= len(extents) and list(shape) == extents[len(extents) - len(shape) :] else None
    )


def is_permuted(node: Node, order: tuple[int, ...]) -> bool:
    dims = node.args[1:] if len(node.args) != 2 else node.args[1]
    return node.target in ("permute", torch.permute) and isinstance(dims, tuple | list) and tuple(dims) == order


def is_permuted_to_channels_first(node: Node) -> bool:
    return is_permuted(node, (0, 3, 1, 2))


def is_sum(node: Node) -> bool:
    """Whether a node is the plain sum of two maps, in a dtype no wider than theirs."""
    plain = node.target in ADDS and len(node.args) == 2 and not node.kwargs
    return plain and all(has_dtype_of(a, node) for a in node.args if is_node(a))


def describe_constant(node: Node) -> None:
    """Writes the shape and dtype of a parameter, or of a value computed from parameters alone, into ``node.meta``."""
    computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
    value = node.meta.get("value")
    is_constant = "tensor" in node.meta or (computed and all("shape" in other.meta for other in node.all_input_nodes))
    if is_constant and isinstance(value, Tensor):
        node.meta.update(shape=tuple(value.shape), dtype=value.dtype)


def is_parameter(node: Any) -> bool:
    return is_node(node) and "shape" in node.meta


def is_folded(conv: Convolution) -> bool:
    """Whether a convolution's weights are folded already, so that further folding takes no memory."""
    return conv.weight.op == "call_function" or is_cast(conv.weight)


def _pair(value: Any) -> tuple[int, int] | None:
    """An integer or a pair of integers as a pair; None for anything else, NumPy integers included."""
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    values = values * 2 if len(values) == 1 else values
    return values if len(values) == 2 and all(type(v) is int for v in values) else None
