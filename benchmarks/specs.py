"""What is measured: shapes of the operators and models, by suite, with their arithmetic and unavoidable traffic."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

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
#: Depthwise filters as of RepLKNet, on maps of FFNet-1's stages: (channels, size, kernel).
LARGE_FILTERS = ((80, 64, 31), (160, 32, 31), (320, 16, 31))
#: Stage 2 of FFNet-3 at 384²: a map that is no power of two.
LARGE_MAP = (384, 24, 7)
LAYOUTS = ("channels_last", "nchw")
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward")


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
    """One call of an operator on a map [batch, channels, size, size]; "backward": the gradients of all its tensors."""

    operator: str
    batch: int
    channels: int
    size: int
    kernel: int
    layout: str = "channels_last"
    dtype: str = "float32"
    direction: str = "forward"
    activation: str = "gelu"

    @property
    def name(self) -> str:
        text = (
            f"{self.operator} {self.channels}x{self.size}x{self.size} k{self.kernel} b{self.batch} "
            f"{self.dtype} {self.layout}"
        )
        return text if self.direction == "forward" else f"{text} {self.direction}"

    @property
    def flops(self) -> int:
        """Two per multiply–add, taps on padding counted, activations and what a backward pass computes anew not."""
        spec = OPERATORS[self.operator]
        per_output = spec.filters * self.kernel**2 + 2 * spec.expansion * self.channels
        return 2 * self._elements * per_output * (2 if self.direction == "backward" else 1)

    @property
    def bytes(self) -> int:
        """Each input map, weight and output moved once.

        Backward: the input and the incoming gradient read, the gradient of the input written, each weight read and its
        gradient written. A residual costs nothing: its gradient is the incoming one.
        """
        spec = OPERATORS[self.operator]
        hidden = spec.expansion * self.channels
        weights = spec.filters * self.channels * (self.kernel**2 + 1)
        if hidden:
            weights += 2 * hidden * self.channels + hidden + self.channels
        if self.direction == "backward":
            return (3 * self._elements + 2 * weights) * itemsize(self.dtype)
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


@dataclass(frozen=True)
class TrainingCase:
    """Forward pass, loss and all gradients of a model in train mode."""

    model: str
    batch: int
    size: int = 256
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}x{self.size} b{self.batch} {self.dtype} training step"

    @property
    def flops(self) -> int:
        """Three forward passes of the reparameterised model."""
        return 3 * ModelCase(self.model, self.batch, self.size, self.dtype).flops

    @property
    def bytes(self) -> int:
        """Each parameter read and its gradient written, the input read."""
        parameters = ffnet.count_parameters(ffnet.create_model(self.model, device="meta"))
        return (2 * parameters + self.batch * 3 * self.size**2) * itemsize(self.dtype)


Case = OperatorCase | ModelCase | TrainingCase


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


def _record() -> Iterator[Case]:
    """What the goals of `benchmarks.goals` are about, in both dtypes."""
    for dtype in DTYPES:
        shapes = [shape for shape in _shapes(tuple(STAGE_DIMS)) if shape[0] != "depthwise_conv2d" or shape[3] == 7]
        for batch, (operator, channels, size, kernel) in itertools.product(BATCHES, shapes):
            forward = OperatorCase(operator, batch, channels, size, kernel, dtype=dtype)
            yield forward
            if operator != "channel_mixer":
                yield replace(forward, direction="backward")
        for (channels, size, kernel), direction in itertools.product(LARGE_FILTERS, DIRECTIONS):
            yield OperatorCase(
                "depthwise_conv2d", 1, channels, size, kernel, dtype=dtype, direction=direction, activation="none"
            )
        for model, batch in itertools.product(STAGE_DIMS, BATCHES):
            yield ModelCase(model, batch, dtype=dtype)
        yield ModelCase("ffnet_4", 1, 384, dtype)
    yield TrainingCase("ffnet_1", 4)


def _backward() -> list[Case]:
    shapes = [*_shapes(("ffnet_1",)), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    return [
        OperatorCase(shape[0], batch, *shape[1:], dtype=dtype, direction="backward")
        for dtype, shape, batch in itertools.product(DTYPES, shapes, BATCHES)
    ]


def _in_both_dtypes(cases: Iterable[Case]) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype, case in itertools.product(DTYPES, cases)]


SUITES: dict[str, Callable[[], Iterable[Case]]] = {
    "quick": _quick,
    "ops": lambda: _in_both_dtypes(_operators()),
    "backward": _backward,
    "models": lambda: _in_both_dtypes(_models()),
    "training": lambda: [TrainingCase("ffnet_1", 4)],
    "record": _record,
}


def suite(name: str, text: str = "") -> list[Case]:
    """The cases of a suite whose names contain ``text``."""
    return [case for case in SUITES[name]() if text in case.name]
