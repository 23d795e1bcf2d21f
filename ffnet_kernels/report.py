"""What runs on which operator in an optimised model, and what does not."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .capture import NotCapturable
from .optimize import Shortcut, require_module
from .program import Program, is_constant
from .state import State


class Row(NamedTuple):
    """Layers, by their paths, and the operator or the function of PyTorch that they run on; or why there is none."""

    layers: str
    runs_on: str
    is_step: bool = False  # of the program of the row above
    is_fused: bool = False  # an operator, not a function of PyTorch


class Report(NamedTuple):
    """The rows of a model, first to last; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        width = max((len(row.runs_on) for row in self.rows if row.is_step), default=0)
        lines = (
            f"  {row.runs_on:{width}}  {row.layers}" if row.is_step else f"{row.layers}: {row.runs_on}"
            for row in self.rows
        )
        return "\n".join(lines) or "nothing is optimised"


def report(model: nn.Module) -> Report:
    """What an optimised model runs on in its present state and mode: with gradients where it is in training mode.

    Before the first call, for maps of 224² pixels.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
    """
    require_module(model, "report")
    return Report(tuple(_rows(model, "")))


def _rows(module: nn.Module, path: str) -> Iterator[Row]:
    shortcut = vars(module).get("_compiled_call_impl")
    if isinstance(shortcut, Shortcut):
        under_autocast = shortcut.last in shortcut.ways[2:]
        way = shortcut.ways[module.training + 2 * under_autocast]
        try:
            if way.program is None and way.refusal is not None and way.example is not None:
                raise NotCapturable(way.refusal)
            x = _example(module) if way.example is None else way.example
            with torch.autocast("cpu", way.autocast or torch.bfloat16, enabled=under_autocast):
                program = Program(module, State(module), x, way.differentiable)
        except Exception as error:  # NotCapturable, or of a model that is wrong
            yield Row(path or "(model)", f"as it is: {error}")
        else:
            bypass = f"; the last call ran it as it is: {way.bypass}" if way.bypass else ""
            gradients = ", with gradients" if way.differentiable else ""
            cast = "" if program.autocast is None else f", under autocast to {program.autocast}"
            yield Row(path or "(model)", "a program" + gradients + cast + bypass)
            yield from _steps(program, path)
            return
    for name, child in module.named_children():
        yield from _rows(child, f"{path}.{name}".lstrip("."))


def _example(module: nn.Module) -> Tensor:
    """A map that a module may be for, without data."""
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    return torch.empty((1, conv.in_channels, 224, 224), dtype=conv.weight.dtype, device="meta")


def _steps(program: Program, path: str) -> Iterator[Row]:
    for node in program.graph.nodes:
        target: Any = node.target
        if not node.op.startswith("call") or is_constant(node) or target in (getattr, operator.getitem):
            continue
        layers = dict.fromkeys(f"{path}.{layer}".strip(".") for layer in node.meta.get("paths", []))
        function = target if isinstance(target, str) else target.__name__
        is_fused = target in kernels.FUSED
        if not is_fused:
            function = f"torch: {function}" + (f" ({node.meta['reason']})" if "reason" in node.meta else "")
        yield Row(", ".join(layers), function, True, is_fused)
