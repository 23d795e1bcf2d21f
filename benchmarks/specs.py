"""What is measured: shapes of the operators and models, by suite, with their arithmetic and unavoidable traffic."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import ffnet

#: Channels of each stage; the maps of a 256² input are 64², 32², 16² and 8².
STAGE_DIMS = {
    "ffnet_1": (80, 160, 320, 640),
    "ffnet_2": (88, 176, 352, 704),
    "ffnet_3": (96, 192, 384, 768),
    "ffnet_4": (128, 256, 512, 1024),
}
STAGE_SIZES = (64, 32, 16, 8)
TOKEN_KERNELS = (3, 3, 7, 7)
CHANNEL_KERNELS = {"ffnet_1": 3, "ffnet_2": 7, "ffnet_3": 7, "ffnet_4": 7}
#: Stage 2 of FFNet-3 at 384²: a map that is no power of two.
LARGE_MAP = (384, 24, 7)
LAYOUTS = ("channels_last", "nchw")
BATCHES = (1, 8)


@dataclass(frozen=True)
class OperatorSpec:
    """What an operator does per map, as far as counting goes.

    Attributes:
        filters: depthwise convolutions in it.
        expansion: width of its hidden map over C, 0 for none.
        residual: whether it adds a residual map.
    """

    filters: int
    expansion: int
    residual: bool


#: As FFNet uses them: GELU everywhere, residual added inside, layer scale folded away.
OPERATORS = {
    "depthwise_conv2d": OperatorSpec(filters=1, expansion=0, residual=False),
    "ffnified_attention": OperatorSpec(filters=2, expansion=0, residual=True),
    "channel_mixer": OperatorSpec(filters=1, expansion=3, residual=True),
}


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator on a map [batch, channels, size, size]."""

    operator: str
    batch: int
    channels: int
    size: int
    kernel: int
    layout: str = "channels_last"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return (
            f"{self.operator} {self.channels}x{self.size}x{self.size} k{self.kernel} b{self.batch} "
            f"{self.dtype} {self.layout}"
        )

    @property
    def flops(self) -> int:
        """Two per multiply–add, taps on padding counted, activations not."""
        spec = OPERATORS[self.operator]
        per_output = spec.filters * self.kernel**2 + 2 * spec.expansion * self.channels
        return 2 * self._elements * per_output

    @property
    def bytes(self) -> int:
        """Each input map, weight and output moved once."""
        spec = OPERATORS[self.operator]
        hidden = spec.expansion * self.channels
        weights = spec.filters * self.channels * (self.kernel**2 + 1)
        if hidden:
            weights += 2 * hidden * self.channels + hidden + self.channels
        return ((2 + spec.residual) * self._elements + weights) * itemsize(self.dtype)

    @property
    def _elements(self) -> int:
        return self.batch * self.channels * self.size**2


@dataclass(frozen=True)
class ModelCase:
    """One forward pass of a model in eval mode on [batch, 3, size, size]."""

    model: str
    batch: int
    size: int = 256
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}x{self.size} b{self.batch} {self.dtype}"

    @property
    def flops(self) -> int:
        """Two per multiply–add of the reparameterised model."""
        return 2 * self.batch * model_counts(self.model, self.size)[1]

    @property
    def bytes(self) -> int:
        """Each fused parameter, the input and the logits moved once."""
        parameters = model_counts(self.model, self.size)[0]
        return (parameters + self.batch * (3 * self.size**2 + 1000)) * itemsize(self.dtype)


Case = OperatorCase | ModelCase


def itemsize(dtype: str) -> int:
    """Bytes of an element of the torch dtype of that name."""
    return getattr(torch, dtype).itemsize


@functools.cache
def model_counts(name: str, size: int) -> tuple[int, int]:
    """Parameters and multiply–adds per image of the reparameterised model."""
    model = ffnet.reparameterize(ffnet.create_model(name, device="meta"))
    return ffnet.count_parameters(model), ffnet.count_macs(model, (3, size, size))


def _shapes(models: tuple[str, ...]) -> Iterator[tuple[str, int, int, int]]:
    """(operator, channels, size, kernel) of every stage; a depthwise 7×7 on all of them."""
    for model in models:
        for channels, size, kernel in zip(STAGE_DIMS[model], STAGE_SIZES, TOKEN_KERNELS, strict=True):
            for depthwise_kernel in sorted({kernel, 7}):
                yield "depthwise_conv2d", channels, size, depthwise_kernel
            yield "ffnified_attention", channels, size, kernel
            yield "channel_mixer", channels, size, CHANNEL_KERNELS[model]


def _quick() -> list[Case]:
    shapes = [*_shapes(("ffnet_1",)), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    return [OperatorCase(shape[0], batch, *shape[1:]) for shape, batch in itertools.product(shapes, BATCHES)]


def _operators() -> list[Case]:
    shapes = [*_shapes(tuple(STAGE_DIMS)), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    return [
        OperatorCase(operator, batch, channels, size, kernel, layout)
        for (operator, channels, size, kernel), batch, layout in itertools.product(shapes, BATCHES, LAYOUTS)
    ]


def _models() -> list[Case]:
    return [ModelCase(model, batch) for model, batch in itertools.product(STAGE_DIMS, BATCHES)]


SUITES = {"quick": _quick, "ops": _operators, "models": _models}


def suite(name: str, text: str = "") -> list[Case]:
    """The cases of a suite whose names contain ``text``."""
    return [case for case in SUITES[name]() if text in case.name]
