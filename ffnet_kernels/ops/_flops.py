"""FLOP formulas for torch's FlopCounterMode: as many as for plain PyTorch's convolutions."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ._operator import Operator, backward_of

_COUNTER = "torch.utils.flop_counter"


def register(operators: Iterable[Operator]) -> None:
    """Registers the operators with the counter once something imports it: importing it takes longer than this
    package."""
    operators = list(operators)
    if _COUNTER in sys.modules:
        _register(operators)
    else:
        sys.meta_path.insert(0, _Importing(operators))


class _Importing(importlib.abc.MetaPathFinder):
    """Imports the counter like any module, and then registers the operators in it."""

    def __init__(self, operators: list[Operator]) -> None:
        self.operators = operators

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register(self.operators)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(operators: list[Operator]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operator in operators:
        for overload in operator.overloads.values():
            backward = backward_of(overload)
            register_flop_formula(overload.overloadpacket)(functools.partial(_forward, operator))
            register_flop_formula(backward.overloadpacket)(
                functools.partial(_backward, operator, [argument.name for argument in backward._schema.arguments])
            )


def _forward(operator: Operator, *args: Any, out_shape: Any) -> int:
    """Takes, like all formulas, the shapes of the tensors among the arguments."""
    from torch.utils.flop_counter import conv_flop_count

    out = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
    convolutions = _convolutions(operator, dict(zip(operator.names, args, strict=True)), out)
    return sum(conv_flop_count(source, weight, result) for _, source, weight, result in convolutions)


def _backward(operator: Operator, names: list[str], *args: Any, out_shape: Any) -> int:
    from torch.utils import flop_counter

    given = dict(zip(names, args, strict=True))
    tensors = [operator.names[i] for i in operator.tensors]
    mask = given["mask"] if "mask" in given else [given["wants_x"], *[True] * (len(tensors) - 1)]
    wanted = dict(zip(tensors, mask, strict=True))
    total = 0
    for name, source, weight, result in _convolutions(operator, given, given["grad"]):
        # A convolution's input needs a gradient if anything before it does.
        before = tensors[: 1 if operator.parallel else tensors.index(name)]
        needed = (any(wanted[tensor] for tensor in before), wanted[name], False)
        geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        count: Any = flop_counter.conv_backward_flop
        total += count(result, source, weight, None, *geometry, needed, out_val=(source, weight, None))
    return total


def _convolutions(operator: Operator, shapes: dict[str, Any], out: Any) -> Iterator[tuple[str, Any, list, list]]:
    """For each weight: its name, and the shapes of its input, of itself, and of its output."""
    source = shapes[operator.names[0]]
    for name in operator.weights:
        if shapes[name] is not None:
            weight = [*shapes[name], 1, 1][:4]
            result = [source[0], weight[0], *out[2:]]
            yield name, source, weight, result
            if not operator.parallel:
                source = result
