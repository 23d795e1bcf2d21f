"""Steps of a program in a row as one call, which goes from one to the next in C++ instead of Python."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .ops import schemas
from .shapes import Node

_OPERATORS: dict[Any, int] = {
    getattr(torch.ops.ffnet_kernels, name).default: number for number, name in enumerate(schemas.STEP_OPERATORS)
}


def join(graph: fx.Graph) -> None:
    """Puts one call in the place of each row of native operators of which only the last has readers elsewhere."""
    for row in _rows(graph):
        for part in _parts(row):
            if len(part) > 1:
                _replace(graph, part)


def _rows(graph: fx.Graph) -> Iterator[list[Node]]:
    """Native operators with nothing between them that waits for one."""
    row: list[Node] = []
    for node in list(graph.nodes):
        if node.target in _OPERATORS:
            row.append(node)
        elif not set(row).isdisjoint(node.all_input_nodes):
            yield row
            row = []
    yield row


def _parts(row: list[Node]) -> list[list[Node]]:
    known = set(row)
    for place, node in enumerate(row[:-1]):
        if not known.issuperset(node.users):
            return _parts(row[: place + 1]) + _parts(row[place + 1 :])
    return [row]


def _replace(graph: fx.Graph, row: list[Node]) -> None:
    given = dict.fromkeys(value for node in row for value in node.all_input_nodes if value not in row)
    number_of = {node: number for number, node in enumerate((*given, *row))}
    last_reader = {value: node for node in row for value in node.all_input_nodes}
    numbers: list[int] = []
    for node in row:
        numbers.append(_OPERATORS[node.target])
        for argument, value in zip(node.target._schema.arguments, node.args, strict=True):
            numbers += _written(str(argument.type), value, number_of)
        over = [number_of[value] for value in dict.fromkeys(node.all_input_nodes) if last_reader[value] is node]
        numbers += [len(over), *over]
    with graph.inserting_before(row[-1]):
        call = graph.call_function(torch.ops.ffnet_kernels.steps.default, (list(given), tuple(numbers)))
    row[-1].replace_all_uses_with(call)
    for node in reversed(row):
        graph.erase_node(node)


def _written(kind: str, value: Any, number_of: dict[Node, int]) -> list[int]:
    """An argument of a kind, in a schema's words, as numbers."""
    if value is None:
        return [-1]
    if kind.endswith(("Tensor", "Tensor]")):
        return [number_of[value]]
    if kind == "float":
        return list(struct.unpack("q", struct.pack("d", value)))
    items = list(value.encode()) if kind == "str" else list(value)
    return [len(items), *items]
