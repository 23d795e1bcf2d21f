"""Reports which layers of an optimised model run on which operator, and why others do not."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .capture import NotCapturable, is_library
from .optimize import Shortcut, require_module
from .program import Program, is_constant
from .state import State


class Row(NamedTuple):
    """Layers, by their paths, and the operator or PyTorch function that they run on; or why they run as modules."""

    layers: str
    runs_on: str
    is_step: bool = False  # belongs to the program of the row above
    is_fused: bool = False  # an operator, not a function of PyTorch


class Report(NamedTuple):
    """The rows of a model in execution order; prints as a table.

    Attributes:
        own_classes: names of the user's classes, whose modules are called as written and have programs below them only.
    """

    rows: tuple[Row, ...]
    own_classes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max((len(row.runs_on) for row in self.rows if row.is_step), default=0)
        lines = [
            f"  {row.runs_on:{width}}  {row.layers}" if row.is_step else f"{row.layers}: {row.runs_on}"
            for row in self.rows
        ]
        if self.own_classes:
            lines.append(
                f"{', '.join(self.own_classes)}: your code, called as written, with programs only for layers in it; "
                'torch.compile(model, backend="ffnet_kernels") captures all of it'
            )
        return "\n".join(lines) or "nothing is optimised (by `optimize`; what `torch.compile` made is not known here)"


def report(model: nn.Module) -> Report:
    """Reports what an optimised model runs on in its present state and mode; in training mode, with gradients.

    Before the first call, maps of 224² pixels are assumed.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
    """
    require_module(model, "report")
    own = [type(module).__name__ for module in model.modules() if _is_own(type(module)) and _has_shortcut(module)]
    return Report(tuple(_rows(model, "")), tuple(dict.fromkeys(own)))


def _is_own(kind: type) -> bool:
    return not is_library(kind) and not kind.__module__.startswith("torch.")  # which wraps models, too


def _has_shortcut(module: nn.Module) -> bool:
    return any(isinstance(vars(one).get("_compiled_call_impl"), Shortcut) for one in module.modules())


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
        except Exception as error:  # NotCapturable, or an error of a model that is wrong
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
    """A map that a module may accept, without data."""
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
