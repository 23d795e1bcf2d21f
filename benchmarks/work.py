"""Builds what a case computes, in the forms contenders run: plain PyTorch in either layout, and on our operators."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ffnet
import ffnet_kernels
from ffnet.layers import DropPath
from ffnet_kernels.selftest import error_limit

from . import reference
from .cases import OPERATORS, Case, LayerCase, ModelCase, OperatorCase, TrainingCase
from .programs import (
    MEMORY_FORMATS,
    CpuWork,
    Program,
    Unsupported,
    is_filter,
    laid_out,
    too_large_for_onednn,
    without_onednn,
)
from .programs import (
    Work as Work,
)
from .training import BackwardWork, TrainingWork

SEED = 0
#: Arguments of operators that are maps; the others are weights.
MAPS = ("x", "query", "residual")


@dataclass(frozen=True)
class OperatorWork:
    """An operator and the arguments of its public function, maps and weights contiguous."""

    operator: str
    arguments: dict[str, Any]
    layout: str = "channels_last"
    inference = True

    @property
    def dtype(self) -> torch.dtype:
        return next(v.dtype for v in self.arguments.values() if isinstance(v, Tensor))

    def plain(self, layout: str) -> Program:
        function, arguments = reference.function(self.operator), self._checked(laid_out(self.arguments, layout))
        if too_large_for_onednn(self.arguments):
            return Program(without_onednn(function), [arguments], layout, "without oneDNN")
        return Program(function, [arguments], layout)

    def fused(self) -> Program:
        # Filters with their channels next to each other, where kernels need not move them in every call.
        arguments = {
            name: channels_innermost(value) if is_filter(value) else value
            for name, value in laid_out(self.arguments, self.layout).items()
        }
        decision = ffnet_kernels.explain(self.operator, **arguments)
        function = functools.partial(getattr(ffnet_kernels, self.operator), **arguments)
        if decision.backend == "reference" and too_large_for_onednn(self.arguments):
            return Program(without_onednn(function), [()], self.layout, "reference without oneDNN")
        return Program(function, [()], self.layout, decision.backend)

    def as_trained(self, layout: str) -> Program:
        raise Unsupported("an operator has no training-time form")

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        single = {name: v.float() if isinstance(v, Tensor) else v for name, v in self.arguments.items()}
        maps = {name: single[name] for name in MAPS if isinstance(single.get(name), Tensor)}
        return _Call(self.operator, self._checked(single), list(maps.values())), [tuple(maps.values())]

    def expected(self) -> Tensor:
        double = {name: v.double() if isinstance(v, Tensor) else v for name, v in self.arguments.items()}
        return reference.function(self.operator)(*self._checked(double))

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        return error_limit(expected, eager)

    def _checked(self, arguments: dict[str, Any]) -> tuple:
        return reference.checked(self.operator, arguments)


class _Call(nn.Module):
    """A call of an operator in plain PyTorch; all arguments but the maps are constants."""

    def __init__(self, operator: str, arguments: tuple, maps: list[Tensor]):
        super().__init__()
        self.function = reference.function(operator)
        self.arguments = arguments
        self.places = [next(i for i, a in enumerate(arguments) if a is one) for one in maps]

    def forward(self, *maps: Tensor) -> Tensor:
        arguments = list(self.arguments)
        for place, one in zip(self.places, maps, strict=True):
            arguments[place] = one
        return self.function(*arguments)


@dataclass(frozen=True)
class ModelWork:
    """A model in eval mode as trained, and its input batches of one size, contiguous."""

    model: nn.Module
    batches: Sequence[Tensor]
    layout: str = "channels_last"
    inference = True

    @property
    def dtype(self) -> torch.dtype:
        return self.batches[0].dtype

    def plain(self, layout: str) -> Program:
        return self._program(ffnet.reparameterize(self.model), layout)

    def fused(self) -> Program:
        # Outside inference mode, as users do it: what is made there are tensors of another kind.
        with torch.inference_mode(False), torch.no_grad():
            model = ffnet.reparameterize(self.model)  # as the other contenders
            model = model.to(memory_format=MEMORY_FORMATS[self.layout])  # type: ignore[call-overload]
            return Program(ffnet_kernels.optimize(model), self._inputs(self.layout), self.layout)

    def as_trained(self, layout: str) -> Program:
        return self._program(copy.deepcopy(self.model), layout)

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        model = ffnet.reparameterize(copy.deepcopy(self.model).float())
        return model, [(batch.float().contiguous(),) for batch in self.batches]

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


def build(case: Case) -> CpuWork:
    """The work of a case, the same in every run."""
    if isinstance(case, ModelCase):
        return _model_work(case)
    if isinstance(case, LayerCase):
        return _layer_work(case)
    if isinstance(case, TrainingCase):
        model = _model_work(ModelCase(case.model, case.batch, case.size, case.dtype))
        return TrainingWork(model.model.train(), model.batches[0], autocast=case.autocast)
    return _operator_work(case)


def _operator_work(case: OperatorCase) -> OperatorWork | BackwardWork:
    generator = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) / fan_in**0.5).to(dtype)

    channels, kernel = case.channels, case.kernel
    shape = case.shape

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
    arguments["activation"] = case.activation
    if case.direction == "backward":
        return BackwardWork(case.operator, arguments, random(*shape), case.layout)
    return OperatorWork(case.operator, arguments, case.layout)


def _model_work(case: ModelCase) -> ModelWork:
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ffnet.create_model(case.model).eval().to(dtype)
        # Stochastic depth would drop other blocks in float64 than in float32, and no training step could be judged.
        for module in model.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        batch = torch.randn(case.batch, *case.shape).to(dtype)
    return ModelWork(model, [batch])


def _layer_work(case: LayerCase) -> ModelWork:
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = ffnet.create_model(case.model).eval().get_submodule(case.path)
        batch = torch.randn(case.batch, case.channels, case.size, case.size)
    return ModelWork(ffnet.reparameterize(layer).to(dtype), [batch.to(dtype)])


def channels_innermost(weight: Tensor) -> Tensor:
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
