"""Builds what a case computes, in the forms contenders run: plain PyTorch in either layout, and on our operators."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import ffnet
import ffnet_kernels
from ffnet_kernels import checks
from ffnet_kernels.backends import reference
from ffnet_kernels.selftest import error_limit

from .specs import OPERATORS, Case, ModelCase, OperatorCase

SEED = 0
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Program:
    """A function and its inputs: calling it runs the first input, which is the one that is timed.

    Attributes:
        function: what runs.
        inputs: one tuple of arguments a call.
        layout: of the maps it reads.
        detail: what is worth knowing of how it runs, e.g. the backend.
    """

    function: Callable[..., Tensor]
    inputs: Sequence[tuple]
    layout: str
    detail: str = ""

    def __call__(self) -> Tensor:
        return self.function(*self.inputs[0])

    def outputs(self) -> Tensor:
        """The results of all inputs, along the batch."""
        return torch.cat([self.function(*arguments) for arguments in self.inputs])


class Work(Protocol):
    """What all contenders of a case compute."""

    @property
    def layout(self) -> str:
        """The layout in which contenders that are free to choose get their maps."""

    def plain(self, layout: str) -> Program:
        """Plain PyTorch operators, the maps in that layout."""

    def fused(self) -> Program:
        """On ffnet_kernels, backend chosen by itself."""

    def as_trained(self, layout: str) -> Program:
        """As `plain`, before anything was folded."""

    def expected(self) -> Tensor:
        """The outputs in float64."""

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        """The largest absolute error that counts as right."""


@dataclass(frozen=True)
class OperatorWork:
    """An operator and the arguments of its public function, maps and weights contiguous."""

    operator: str
    arguments: dict[str, Any]
    layout: str = "channels_last"

    def plain(self, layout: str) -> Program:
        return Program(getattr(reference, self.operator), [self._checked(_laid_out(self.arguments, layout))], layout)

    def fused(self) -> Program:
        # Filters with their channels next to each other, as ffnet_kernels.optimize stores them.
        arguments = {
            name: _channels_innermost(value) if _is_filter(value) else value
            for name, value in _laid_out(self.arguments, self.layout).items()
        }
        decision = ffnet_kernels.explain(self.operator, **arguments)
        function = functools.partial(getattr(ffnet_kernels, self.operator), **arguments)
        return Program(function, [()], self.layout, decision.backend)

    def as_trained(self, layout: str) -> Program:
        raise NotImplementedError("an operator has no training-time form")

    def expected(self) -> Tensor:
        double = {name: v.double() if isinstance(v, Tensor) else v for name, v in self.arguments.items()}
        return getattr(reference, self.operator)(*self._checked(double))

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        return error_limit(expected, eager)

    def _checked(self, arguments: dict[str, Any]) -> tuple:
        return getattr(checks, self.operator)(**arguments)


@dataclass(frozen=True)
class ModelWork:
    """A model in eval mode as trained, and its input batches of one size, contiguous."""

    model: nn.Module
    batches: Sequence[Tensor]
    layout: str = "channels_last"

    def plain(self, layout: str) -> Program:
        return self._program(ffnet.reparameterize(self.model), layout)

    def fused(self) -> Program:
        model = ffnet_kernels.optimize(self.model)
        return Program(model, self._inputs(self.layout), self.layout)

    def as_trained(self, layout: str) -> Program:
        return self._program(copy.deepcopy(self.model), layout)

    def expected(self) -> Tensor:
        model = copy.deepcopy(self.model).double()
        return torch.cat([model(batch.double()) for batch in self.batches])

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        # The layers of a model round in a chain, so equally good orders of summation differ by more than in one
        # operator: twice its limit.
        return 2 * error_limit(expected, eager)

    def _program(self, model: nn.Module, layout: str) -> Program:
        model = model.to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
        return Program(model, self._inputs(layout), layout)

    def _inputs(self, layout: str) -> list[tuple]:
        return [(batch.contiguous(memory_format=MEMORY_FORMATS[layout]),) for batch in self.batches]


def build(case: Case) -> Work:
    """The work of a case, the same in every run."""
    return _operator_work(case) if isinstance(case, OperatorCase) else _model_work(case)


def _operator_work(case: OperatorCase) -> OperatorWork:
    generator = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) / fan_in**0.5).to(dtype)

    channels, kernel = case.channels, case.kernel
    shape = (case.batch, channels, case.size, case.size)

    def filters() -> Tensor:
        return random(channels, 1, kernel, kernel, fan_in=kernel**2)

    arguments: dict[str, Any]
    if case.operator == "depthwise_conv2d":
        arguments = {"x": random(*shape), "weight": filters(), "bias": random(channels), "stride": 1, "padding": "same"}
    elif case.operator == "ffnified_attention":
        arguments = {
            "query": random(*shape),
            "key": filters(),
            "key_bias": random(channels),
            "value": filters(),
            "value_bias": random(channels),
            "scale": None,
            "residual": random(*shape),
        }
    else:
        hidden = OPERATORS[case.operator].expansion * channels
        arguments = {
            "x": random(*shape),
            "weight": filters(),
            "bias": random(channels),
            "expand_weight": random(hidden, channels, fan_in=channels),
            "expand_bias": random(hidden),
            "project_weight": random(channels, hidden, fan_in=hidden),
            "project_bias": random(channels),
            "scale": None,
            "residual": random(*shape),
        }
    return OperatorWork(case.operator, {**arguments, "activation": "gelu"}, case.layout)


def _model_work(case: ModelCase) -> ModelWork:
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ffnet.create_model(case.model).eval().to(dtype)
        batch = torch.randn(case.batch, 3, case.size, case.size).to(dtype)
    return ModelWork(model, [batch])


def _laid_out(arguments: dict[str, Any], layout: str) -> dict[str, Any]:
    memory_format = MEMORY_FORMATS[layout]
    return {
        name: value.contiguous(memory_format=memory_format) if isinstance(value, Tensor) and value.dim() == 4 else value
        for name, value in arguments.items()
    }


def _is_filter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def _channels_innermost(weight: Tensor) -> Tensor:
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
