"""The cases that can be measured: a call of an operator, a layer, a model, a training step; each with its arithmetic
and its unavoidable memory traffic. And the suites, sets of cases, each in full and in a quick form."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

import ffnet
from ffnet.voxels import VoxelBlock


class OperatorSpec(NamedTuple):
    """What has to be known of an operator to count its work.

    Attributes:
        filters: depthwise convolutions in it.
        expansion: width of its hidden map relative to C, 0 for none.
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
    """One call of an operator on a map [batch, channels, size, width], by default square; "backward": the gradients of
    all its tensors."""

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
        return self.batch, self.channels, self.size, self.width or self.size

    @property
    def name(self) -> str:
        text = (
            f"{self.operator} {self.channels}x{self.size}x{self.shape[3]} k{self.kernel} b{self.batch} "
            f"{self.dtype} {self.layout}"
        )
        return text if self.direction == "forward" else f"{text} {self.direction}"

    @property
    def flops(self) -> int:
        """Two per multiply–add, including taps on padding, but not activations and what a backward pass recomputes."""
        spec = OPERATORS[self.operator]
        per_output = spec.filters * self.kernel**2 + 2 * spec.expansion * self.channels
        return 2 * math.prod(self.shape) * per_output * (2 if self.direction == "backward" else 1)

    @property
    def bytes(self) -> int:
        """Each input map, weight and output moved once.

        Backward: the input and the incoming gradient read, the gradient of the input written, each weight read and its
        gradient written. A residual adds nothing: its gradient is the incoming one.
        """
        spec, elements = OPERATORS[self.operator], math.prod(self.shape)
        hidden = spec.expansion * self.channels
        weights = spec.filters * self.channels * (self.kernel**2 + 1)
        if hidden:
            weights += 2 * hidden * self.channels + hidden + self.channels
        if self.direction == "backward":
            return (3 * elements + 2 * weights) * itemsize(self.dtype)
        return ((2 + spec.residual) * elements + weights) * itemsize(self.dtype)


class _ForwardPass:
    """Counts of a forward pass of a reparameterised model, or of the part of it at ``path``, in eval mode."""

    model: str
    path: str
    batch: int
    dtype: str
    shape: tuple[int, ...]  # of one input

    @property
    def flops(self) -> int:
        """Two per multiply–add; the products of self-attention are not counted."""
        return 2 * self.batch * counts(self.model, self.path, self.shape)[1]

    @property
    def bytes(self) -> int:
        """Each fused parameter, the input and the output moved once."""
        parameters, _, outputs = counts(self.model, self.path, self.shape)
        return (parameters + self.batch * (math.prod(self.shape) + outputs)) * itemsize(self.dtype)


@dataclass(frozen=True)
class ModelCase(_ForwardPass):
    """One forward pass of a model in eval mode on [batch, 3, size, width], by default square.

    Attributes:
        reference: the dtype that results are compared with: float64, or, for large models that take minutes in it,
            float32 in channels-last. The error of plain PyTorch is then the difference of its two layouts.
    """

    model: str
    batch: int
    size: int = 256
    dtype: str = "float32"
    width: int | None = None
    reference: str = "float64"

    path = ""

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return 3, self.size, self.width or self.size

    @property
    def name(self) -> str:
        return f"{self.model} {self.shape[2]}x{self.size} b{self.batch} {self.dtype}"


#: Models that take no image, or that `ffnet.create_model` makes with arguments only: how, and the shape of an input.
MEMBERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "ffnet_ts": (functools.partial(ffnet.create_model, "ffnet_ts", variables=7, lookback=96, horizon=96), (96, 7)),
    "ffnet_1 hybrid": (
        functools.partial(
            ffnet.create_model, "ffnet_1", token_mixers=("ffnified", "ffnified", ("ffnified", "attention"), "attention")
        ),
        (3, 256, 256),
    ),
    "voxel block": (functools.partial(VoxelBlock, 64), (64, 24, 24, 24)),
}


@dataclass(frozen=True)
class MemberCase(_ForwardPass):
    """One forward pass in eval mode of one of `MEMBERS`."""

    model: str
    batch: int
    dtype: str = "float32"

    path = ""
    reference = "float64"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return MEMBERS[self.model][1]

    @property
    def name(self) -> str:
        return f"{self.model} {'x'.join(map(str, self.shape))} b{self.batch} {self.dtype}"


@dataclass(frozen=True)
class LayerCase(_ForwardPass):
    """One forward pass of a reparameterised part of a model in eval mode, on its input for a 256² image.

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
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return self.channels, self.size, self.size

    @property
    def name(self) -> str:
        return f"{self.model} {self.path} {self.channels}x{self.size}x{self.size} b{self.batch} {self.dtype}"


@dataclass(frozen=True)
class TrainingCase:
    """Forward pass, loss and all gradients of a model in train mode; with ``autocast``, under autocast to bfloat16."""

    model: str
    batch: int
    size: int = 256
    dtype: str = "float32"
    autocast: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return 3, self.size, self.size

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
        return (2 * parameters + self.batch * math.prod(self.shape)) * itemsize(self.dtype)


Case = OperatorCase | LayerCase | ModelCase | MemberCase | TrainingCase
#: The kinds of cases, as named in results.
KINDS = {
    OperatorCase: "operator", LayerCase: "layer", ModelCase: "model", MemberCase: "model", TrainingCase: "training",
}  # fmt: skip


def parameters(case: Any) -> dict[str, Any]:
    """A case as plain data: its kind, and its fields."""
    plain = {"kind": KINDS.get(type(case), "other"), **asdict(case)}
    if isinstance(case, OperatorCase) and case.width is None:
        del plain["width"]  # as in results of record, for square maps
    if isinstance(case, ModelCase) and case.reference == "float64":
        del plain["reference"]
    return plain


def itemsize(dtype: str) -> int:
    """Bytes of an element of the torch dtype of that name."""
    return getattr(torch, dtype).itemsize


def make(model: str, **factory: Any) -> Any:
    """A model of ffnet's, or one of `MEMBERS`, in eval mode."""
    return (MEMBERS[model][0] if model in MEMBERS else functools.partial(ffnet.create_model, model))(**factory).eval()


@functools.cache
def counts(name: str, path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Parameters of the part at a path in a reparameterised model, and multiply–adds and output elements for one
    input."""
    part = ffnet.reparameterize(make(name, device="meta").get_submodule(path))
    outputs = part(torch.empty(1, *shape, device="meta")).numel()
    return ffnet.count_parameters(part), ffnet.count_macs(part, shape), outputs


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
#: (channels, size, kernel) of stage 2 of FFNet-3 at 384²: a map whose size is not a power of two.
LARGE_MAP = (384, 24, 7)
#: Depthwise filters as large as RepLKNet's, on maps of FFNet-1's stages.
LARGE_FILTERS = ((80, 64, 31), (160, 32, 31), (320, 16, 31))
#: Channels, kernels and activation of the depthwise layers of other architectures at 224², on maps of 56², 28², 14² and
#: 7². Papers: ConvNeXt arXiv 2201.03545, RepLKNet 2203.06717 (merged filters), StarNet 2403.19967.
FAMILIES = {
    "ConvNeXt-T": ((96, 192, 384, 768), (7, 7, 7, 7), "none"),
    "RepLKNet-31B": ((128, 256, 512, 1024), (31, 29, 27, 13), "relu"),
    "StarNet-S4": ((32, 64, 128, 256), (7, 7, 7, 7), "none"),
}

LAYOUTS = ("channels_last", "nchw")
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward")

#: One call of each operator, and the values of the one dimension that is varied at a time.
GROWTH_FROM = {operator: OperatorCase(operator, 4, 160, 32, 7) for operator in OPERATORS}
GROWTH = {
    "batch": (1, 2, 4, 8, 16),
    "size": (8, 16, 32, 64),
    "channels": (40, 80, 160, 320, 640),
    "kernel": (3, 5, 7, 11, 15, 21, 31),
}
QUICK_GROWTH = {"batch": (1, 4, 16), "size": (8, 32, 64), "channels": (40, 160, 640), "kernel": (3, 7, 15, 31)}


def _first(quick: bool, choices: tuple) -> tuple:
    return choices[:1] if quick else choices


def _models(quick: bool) -> tuple[str, ...]:
    return _first(quick, tuple(STAGE_DIMS))


def _stage_shapes(models: Iterable[str]) -> Iterator[tuple[str, int, int, int]]:
    """(operator, channels, size, kernel) of every stage; a depthwise 7×7 on all of them."""
    for model in models:
        for channels, size, kernel in zip(STAGE_DIMS[model], STAGE_SIZES, TOKEN_KERNELS, strict=True):
            for depthwise_kernel in sorted({kernel, 7}):
                yield "depthwise_conv2d", channels, size, depthwise_kernel
            yield "ffnified_attention", channels, size, kernel
            yield "channel_mixer", channels, size, CHANNEL_KERNELS[model]


def _operators(quick: bool) -> Iterator[Case]:
    shapes = [*_stage_shapes(_models(quick)), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    choices = _first(quick, DTYPES), shapes, BATCHES, _first(quick, LAYOUTS)
    for dtype, (operator, channels, size, kernel), batch, layout in itertools.product(*choices):
        yield OperatorCase(operator, batch, channels, size, kernel, layout, dtype)
    if not quick:
        for dtype, batch, (dims, kernels, activation) in itertools.product(DTYPES, BATCHES, FAMILIES.values()):
            for shape in zip(dims, (56, 28, 14, 7), kernels, strict=True):
                yield OperatorCase("depthwise_conv2d", batch, *shape, dtype=dtype, activation=activation)


def _backward(quick: bool) -> Iterator[Case]:
    shapes = [*_stage_shapes(("ffnet_1",)), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    for dtype, shape, batch in itertools.product(_first(quick, DTYPES), shapes, _first(quick, BATCHES)):
        operator, channels, size, kernel = shape
        yield OperatorCase(operator, batch, channels, size, kernel, dtype=dtype, direction="backward")


def _layers(quick: bool) -> Iterator[Case]:
    """Stem, a downsampling, and the first block's mixers of each stage."""
    for dtype, model, batch in itertools.product(_first(quick, DTYPES), _models(quick), _first(quick, BATCHES)):
        yield LayerCase(model, "patch_embed", 3, 4 * STAGE_SIZES[0], batch, dtype)
        yield LayerCase(model, "stages.1.0", STAGE_DIMS[model][0], STAGE_SIZES[0], batch, dtype)
        for stage, (channels, size) in enumerate(zip(STAGE_DIMS[model], STAGE_SIZES, strict=True)):
            for mixer in ("token_mixer", "channel_mixer"):
                yield LayerCase(model, f"stages.{stage}.{min(stage, 1)}.{mixer}", channels, size, batch, dtype)


def _whole_models(quick: bool) -> Iterator[Case]:
    for dtype, model, batch in itertools.product(_first(quick, DTYPES), _models(quick), BATCHES):
        yield ModelCase(model, batch, dtype=dtype)


def _dense(quick: bool) -> Iterator[Case]:
    """Segmentation, backbones included, on a quarter of a megapixel and a whole one."""
    models = (("ffnet_seg_ade20k", 512), ("ffnet_seg_ade20k", 1024), ("ffnet_2_upernet", 512))
    for dtype, (model, size) in _first(quick, tuple(itertools.product(DTYPES, models))):
        yield ModelCase(model, 1, size, dtype, reference="float32")


def _super_resolution(quick: bool) -> Iterator[Case]:
    """160×90 to 320×180: plain PyTorch takes seconds per call, and a minute for 640×360."""
    choices = itertools.product(DTYPES, ("ffnet_sr_light", "ffnet_sr_large"))
    for dtype, model in _first(quick, tuple(choices)):
        yield ModelCase(model, 1, 90, dtype, width=160, reference="float32")


def _family(quick: bool) -> Iterator[Case]:
    """The other members: time series, hybrids, voxels."""
    for dtype, model in itertools.product(DTYPES[:1] if quick else DTYPES, MEMBERS):
        yield MemberCase(model, 1, dtype)


def _training(quick: bool) -> Iterator[Case]:
    models = ("ffnet_1",) if quick else ("ffnet_1", "ffnet_2")
    yield from (TrainingCase(model, 4, autocast=autocast) for model in models for autocast in (False, True))


def _growth(quick: bool) -> Iterator[Case]:
    """Each operator as one dimension grows and the others stay."""
    growth = QUICK_GROWTH if quick else GROWTH
    for base, dimension in itertools.product(GROWTH_FROM.values(), growth):
        yield from (replace(base, **{dimension: value}) for value in growth[dimension])  # type: ignore[arg-type]


def _record(quick: bool) -> Iterator[Case]:
    """The cases that `benchmarks.goals` sets goals for, in both dtypes; quick: those of FFNet-1 at batch 1."""
    models, batches = _models(quick), _first(quick, BATCHES)
    for dtype in DTYPES:
        for batch, (operator, channels, size, kernel) in itertools.product(batches, _stage_shapes(models)):
            if operator == "depthwise_conv2d" and kernel != 7:
                continue
            forward = OperatorCase(operator, batch, channels, size, kernel, dtype=dtype)
            yield forward
            if operator != "channel_mixer":
                yield replace(forward, direction="backward")
        for shape, direction in itertools.product(LARGE_FILTERS, DIRECTIONS):
            yield OperatorCase("depthwise_conv2d", 1, *shape, dtype=dtype, direction=direction, activation="none")
        for model, batch in itertools.product(models, batches):
            yield ModelCase(model, batch, dtype=dtype)
        if not quick:
            yield ModelCase("ffnet_4", 1, 384, dtype)
    yield TrainingCase("ffnet_1", 4)


SUITES: dict[str, Callable[[bool], Iterable[Case]]] = {
    "ops": _operators,
    "backward": _backward,
    "growth": _growth,
    "layers": _layers,
    "models": _whole_models,
    "dense": _dense,
    "super-resolution": _super_resolution,
    "family": _family,
    "train": _training,
    "record": _record,
}
#: Measured by default; the others repeat parts of these or take longer.
DEFAULT_SUITES = ("ops", "growth", "layers", "models", "train")


def suite(names: str | Iterable[str], text: str = "", *, quick: bool = False) -> list[Case]:
    """The cases of one suite or several whose names contain ``text``, each once."""
    names = (names,) if isinstance(names, str) else names
    cases = dict.fromkeys(case for name in names for case in SUITES[name](quick))
    return [case for case in cases if text in case.name]


#: The cases whose peak memory is measured.
MEMORY_CASES: tuple[Case, ...] = (
    ModelCase("ffnet_1", 8),
    ModelCase("ffnet_1", 8, dtype="bfloat16"),
    TrainingCase("ffnet_1", 4),
    ModelCase("ffnet_seg_ade20k", 1, 512),
    ModelCase("ffnet_seg_ade20k", 1, 1024),
    ModelCase("ffnet_sr_light", 1, 360, width=640),
    TrainingCase("ffnet_1", 4, autocast=True),
)
