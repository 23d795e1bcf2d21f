"""What can be measured: a call of an operator, a layer, a model, a training step; each with its arithmetic and the
traffic that nobody can avoid."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

import ffnet


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
    """One call of an operator on a map [batch, channels, size, width], the width being the size by default; "backward":
    the gradients of all its tensors."""

    operator: str
    batch: int
    channels: int
    size: int
    kernel: int
    layout: str = "channels_last"
    dtype: str = "float32"
    direction: str = "forward"
    activation: str = "gelu"
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the map."""
        return self.batch, self.channels, self.size, self.size if self.width is None else self.width

    @property
    def name(self) -> str:
        text = (
            f"{self.operator} {self.channels}x{self.size}x{self.shape[3]} k{self.kernel} b{self.batch} "
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
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelCase:
    """One forward pass of a model in eval mode on [batch, 3, size, width], the width being the size by default."""

    model: str
    batch: int
    size: int = 256
    dtype: str = "float32"
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return 3, self.size, self.size if self.width is None else self.width

    @property
    def name(self) -> str:
        return f"{self.model} {self.shape[2]}x{self.size} b{self.batch} {self.dtype}"

    @property
    def flops(self) -> int:
        """Two per multiply–add of the reparameterised model."""
        return 2 * self.batch * model_counts(self.model, self.shape)[1]

    @property
    def bytes(self) -> int:
        """Each fused parameter, the input and the output moved once."""
        parameters, _, outputs = model_counts(self.model, self.shape)
        return (parameters + self.batch * (math.prod(self.shape) + outputs)) * itemsize(self.dtype)


@dataclass(frozen=True)
class LayerCase:
    """One forward pass of a reparameterised part of a model in eval mode, on the map it gets from a 256² image.

    Attributes:
        path: of the module in the model, as `torch.nn.Module.get_submodule` takes it.
        channels: of its input.
        size: of its input, which is square.
    """

    model: str
    path: str
    channels: int
    size: int
    batch: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model} {self.path} {self.channels}x{self.size}x{self.size} b{self.batch} {self.dtype}"

    @property
    def flops(self) -> int:
        """Two per multiply–add."""
        return 2 * self.batch * layer_counts(self)[1]

    @property
    def bytes(self) -> int:
        """Each parameter, the input and the output moved once."""
        parameters, _, outputs = layer_counts(self)
        return (parameters + self.batch * (self.channels * self.size**2 + outputs)) * itemsize(self.dtype)


@dataclass(frozen=True)
class TrainingCase:
    """Forward pass, loss and all gradients of a model in train mode; with ``autocast``, under it to bfloat16."""

    model: str
    batch: int
    size: int = 256
    dtype: str = "float32"
    autocast: bool = False

    @property
    def name(self) -> str:
        dtype = "bfloat16 autocast" if self.autocast else self.dtype
        return f"{self.model} {self.size}x{self.size} b{self.batch} {dtype} training step"

    @property
    def flops(self) -> int:
        """Three forward passes of the reparameterised model."""
        return 3 * ModelCase(self.model, self.batch, self.size, self.dtype).flops

    @property
    def bytes(self) -> int:
        """Each parameter read and its gradient written, the input read."""
        parameters = ffnet.count_parameters(ffnet.create_model(self.model, device="meta"))
        return (2 * parameters + self.batch * 3 * self.size**2) * itemsize(self.dtype)


Case = OperatorCase | LayerCase | ModelCase | TrainingCase


#: What results call the kinds of cases.
KINDS = {OperatorCase: "operator", LayerCase: "layer", ModelCase: "model", TrainingCase: "training"}


def parameters(case: Any) -> dict[str, Any]:
    """A case as plain data: its kind, and its fields."""
    plain = {"kind": KINDS.get(type(case), "other"), **asdict(case)}
    if isinstance(case, OperatorCase) and case.width is None:
        del plain["width"]  # a square map, as results of record have it
    return plain


def itemsize(dtype: str) -> int:
    """Bytes of an element of the torch dtype of that name."""
    return getattr(torch, dtype).itemsize


@functools.cache
def model_counts(name: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Parameters of the reparameterised model, and multiply–adds and elements of the output of one image."""
    model = ffnet.reparameterize(ffnet.create_model(name, device="meta").eval())
    outputs = model(torch.empty(1, *shape, device="meta")).numel()
    return ffnet.count_parameters(model), ffnet.count_macs(model, shape), outputs


@functools.cache
def layer_counts(case: LayerCase) -> tuple[int, int, int]:
    """Parameters of the reparameterised layer, and multiply–adds and elements of the output of one image."""
    layer = ffnet.reparameterize(ffnet.create_model(case.model, device="meta").eval().get_submodule(case.path))
    shape = (case.channels, case.size, case.size)
    outputs = layer(torch.empty(1, *shape, device="meta")).numel()
    return ffnet.count_parameters(layer), ffnet.count_macs(layer, shape), outputs
