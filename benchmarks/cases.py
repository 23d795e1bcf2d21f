"""What can be measured: a call of an operator, a layer, a model, a training step; each with its arithmetic and the
traffic that nobody can avoid. And which are measured together: every suite whole, and in a quick form for a first look;
or operators on maps of the user's own, by ``--shape 320x16x16 --kernel 7``."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
        return 2 * self.batch * counts(self.model, "", self.shape)[1]

    @property
    def bytes(self) -> int:
        """Each fused parameter, the input and the output moved once."""
        parameters, _, outputs = counts(self.model, "", self.shape)
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
        return 2 * self.batch * counts(self.model, self.path, (self.channels, self.size, self.size))[1]

    @property
    def bytes(self) -> int:
        """Each parameter, the input and the output moved once."""
        parameters, _, outputs = counts(self.model, self.path, (self.channels, self.size, self.size))
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
def counts(name: str, path: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Parameters of the part at a path in a reparameterised model, and multiply–adds and elements of the output of one
    input."""
    part = ffnet.reparameterize(ffnet.create_model(name, device="meta").eval().get_submodule(path))
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
#: Stage 2 of FFNet-3 at 384²: a map that is no power of two.
LARGE_MAP = (384, 24, 7)
#: Depthwise filters as of RepLKNet, on maps of FFNet-1's stages: (channels, size, kernel).
LARGE_FILTERS = ((80, 64, 31), (160, 32, 31), (320, 16, 31))


class Family(NamedTuple):
    """The depthwise layers of another architecture at 224²: (channels, size, kernel) by stage, and what follows them
    without a layer between."""

    shapes: tuple[tuple[int, int, int], ...]
    activation: str


def _family(channels: tuple[int, ...], kernels: tuple[int, ...], activation: str = "none") -> Family:
    return Family(tuple(zip(channels, (56, 28, 14, 7), kernels, strict=True)), activation)


#: Papers: ConvNeXt arXiv 2201.03545, RepLKNet 2203.06717 (merged filters), StarNet 2403.19967.
FAMILIES = {
    "ConvNeXt-T": _family((96, 192, 384, 768), (7, 7, 7, 7)),
    "RepLKNet-31B": _family((128, 256, 512, 1024), (31, 29, 27, 13), "relu"),
    "StarNet-S4": _family((32, 64, 128, 256), (7, 7, 7, 7)),
}

LAYOUTS = ("channels_last", "nchw")
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward")

#: One call after which one dimension at a time is varied, by operator; and the values it takes.
GROWTH_FROM = {
    "depthwise_conv2d": OperatorCase("depthwise_conv2d", 4, 160, 32, 7),
    "ffnified_attention": OperatorCase("ffnified_attention", 4, 160, 32, 7),
    "channel_mixer": OperatorCase("channel_mixer", 4, 160, 32, 7),
}
GROWTH = {
    "batch": (1, 2, 4, 8, 16),
    "size": (8, 16, 32, 64),
    "channels": (40, 80, 160, 320, 640),
    "kernel": (3, 5, 7, 11, 15, 21, 31),
}
QUICK_GROWTH = {"batch": (1, 4, 16), "size": (8, 32, 64), "channels": (40, 160, 640), "kernel": (3, 7, 15, 31)}


def _stage_shapes(models: Iterable[str]) -> Iterator[tuple[str, int, int, int]]:
    """(operator, channels, size, kernel) of every stage; a depthwise 7×7 on all of them."""
    for model in models:
        for channels, size, kernel in zip(STAGE_DIMS[model], STAGE_SIZES, TOKEN_KERNELS, strict=True):
            for depthwise_kernel in sorted({kernel, 7}):
                yield "depthwise_conv2d", channels, size, depthwise_kernel
            yield "ffnified_attention", channels, size, kernel
            yield "channel_mixer", channels, size, CHANNEL_KERNELS[model]


def _operators(quick: bool) -> Iterator[Case]:
    models = ("ffnet_1",) if quick else tuple(STAGE_DIMS)
    shapes = [*_stage_shapes(models), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    dtypes, layouts = (DTYPES[:1], LAYOUTS[:1]) if quick else (DTYPES, LAYOUTS)
    for dtype, (operator, channels, size, kernel), batch, layout in itertools.product(dtypes, shapes, BATCHES, layouts):
        yield OperatorCase(operator, batch, channels, size, kernel, layout, dtype)
    if not quick:
        yield from _families()


def _families() -> Iterator[Case]:
    for dtype, batch in itertools.product(DTYPES, BATCHES):
        for family in FAMILIES.values():
            for channels, size, kernel in family.shapes:
                yield OperatorCase(
                    "depthwise_conv2d", batch, channels, size, kernel, dtype=dtype, activation=family.activation
                )


def _backward(quick: bool) -> Iterator[Case]:
    shapes = [*_stage_shapes(("ffnet_1",)), *((operator, *LARGE_MAP) for operator in OPERATORS)]
    dtypes, batches = (DTYPES[:1], BATCHES[:1]) if quick else (DTYPES, BATCHES)
    for dtype, (operator, channels, size, kernel), batch in itertools.product(dtypes, shapes, batches):
        yield OperatorCase(operator, batch, channels, size, kernel, dtype=dtype, direction="backward")


def _layers(quick: bool) -> Iterator[Case]:
    """Stem, a downsampling, and the first block's mixers of each stage."""
    models = ("ffnet_1",) if quick else tuple(STAGE_DIMS)
    dtypes, batches = (DTYPES[:1], BATCHES[:1]) if quick else (DTYPES, BATCHES)
    for dtype, model, batch in itertools.product(dtypes, models, batches):
        yield LayerCase(model, "patch_embed", 3, 4 * STAGE_SIZES[0], batch, dtype)
        yield LayerCase(model, "stages.1.0", STAGE_DIMS[model][0], STAGE_SIZES[0], batch, dtype)
        for stage, (channels, size) in enumerate(zip(STAGE_DIMS[model], STAGE_SIZES, strict=True)):
            block = f"stages.{stage}.{1 if stage else 0}"
            for mixer in ("token_mixer", "channel_mixer"):
                yield LayerCase(model, f"{block}.{mixer}", channels, size, batch, dtype)


def _models(quick: bool) -> Iterator[Case]:
    models, dtypes = (("ffnet_1",), DTYPES[:1]) if quick else (tuple(STAGE_DIMS), DTYPES)
    for dtype, model, batch in itertools.product(dtypes, models, BATCHES):
        yield ModelCase(model, batch, dtype=dtype)


def _dense(quick: bool) -> Iterator[Case]:
    """Segmentation, which holds the backbones: a quarter of a megapixel, and a whole one."""
    cases = itertools.product(DTYPES, ("ffnet_seg_ade20k", "ffnet_2_upernet"), (512, 1024))
    for dtype, model, size in itertools.islice(cases, 1 if quick else None):
        yield ModelCase(model, 1, size, dtype)


def _super_resolution(quick: bool) -> Iterator[Case]:
    """640×360 to 1280×720."""
    cases = itertools.product(DTYPES, ("ffnet_sr_light", "ffnet_sr_large"))
    for dtype, model in itertools.islice(cases, 1 if quick else None):
        yield ModelCase(model, 1, 360, dtype, width=640)


def _training(quick: bool) -> Iterator[Case]:
    models = ("ffnet_1",) if quick else ("ffnet_1", "ffnet_2")
    yield from (TrainingCase(model, 4, autocast=autocast) for model in models for autocast in (False, True))


def _growth(quick: bool) -> Iterator[Case]:
    """Each operator as one dimension grows and the others stay."""
    growth = QUICK_GROWTH if quick else GROWTH
    for base, dimension in itertools.product(GROWTH_FROM.values(), growth):
        for value in growth[dimension]:
            yield replace(base, **{dimension: value})  # type: ignore[arg-type]


def _record(quick: bool) -> Iterator[Case]:
    """What the goals of `benchmarks.goals` are about, in both dtypes; quick: of FFNet-1 at batch 1."""
    dims, batches = (("ffnet_1",), BATCHES[:1]) if quick else (tuple(STAGE_DIMS), BATCHES)
    for dtype in DTYPES:
        shapes = [shape for shape in _stage_shapes(dims) if shape[0] != "depthwise_conv2d" or shape[3] == 7]
        for batch, (operator, channels, size, kernel) in itertools.product(batches, shapes):
            forward = OperatorCase(operator, batch, channels, size, kernel, dtype=dtype)
            yield forward
            if operator != "channel_mixer":
                yield replace(forward, direction="backward")
        for (channels, size, kernel), direction in itertools.product(LARGE_FILTERS, DIRECTIONS):
            yield OperatorCase(
                "depthwise_conv2d", 1, channels, size, kernel, dtype=dtype, direction=direction, activation="none"
            )
        for model, batch in itertools.product(dims, batches):
            yield ModelCase(model, batch, dtype=dtype)
        if not quick:
            yield ModelCase("ffnet_4", 1, 384, dtype)
    yield TrainingCase("ffnet_1", 4)


SUITES: dict[str, Callable[[bool], Iterable[Case]]] = {
    "ops": _operators,
    "backward": _backward,
    "growth": _growth,
    "layers": _layers,
    "models": _models,
    "dense": _dense,
    "super-resolution": _super_resolution,
    "train": _training,
    "record": _record,
}
#: What is measured where nothing is named; the others repeat parts of it or take longer.
DEFAULT_SUITES = ("ops", "growth", "layers", "models", "train")


def suite(names: str | Iterable[str], text: str = "", *, quick: bool = False) -> list[Case]:
    """The cases of one suite or several whose names contain ``text``, each once."""
    names = (names,) if isinstance(names, str) else names
    cases = dict.fromkeys(case for name in names for case in SUITES[name](quick))
    return [case for case in cases if text in case.name]


#: Whose peak memory is measured.
MEMORY_CASES: tuple[Case, ...] = (
    ModelCase("ffnet_1", 8),
    ModelCase("ffnet_1", 8, dtype="bfloat16"),
    TrainingCase("ffnet_1", 4),
    ModelCase("ffnet_seg_ade20k", 1, 512),
    ModelCase("ffnet_seg_ade20k", 1, 1024),
    ModelCase("ffnet_sr_light", 1, 360, width=640),
    TrainingCase("ffnet_1", 4, autocast=True),
)


SHAPE_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_KERNEL, DEFAULT_BATCH = 7, 1
#: Where their results and chart go if nothing else is said.
FOLDER = Path("bench")


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; all but ``--shape`` ask for it."""
    group = parser.add_argument_group(
        "maps of your own", f"--shape in place of --suite; results and chart go to --out (default: {FOLDER})"
    )
    group.add_argument("--shape", type=shapes, metavar="CxHxW", help="of one image, such as 320x16x16; or several: A,B")
    group.add_argument("--kernel", type=numbers, metavar="K,K", help=f"filter sizes (default: {DEFAULT_KERNEL})")
    group.add_argument("--batch", type=numbers, metavar="N,N", help=f"images in a call (default: {DEFAULT_BATCH})")
    for option, known, default in (
        ("operator", tuple(OPERATORS), "all"),
        ("dtype", SHAPE_DTYPES, SHAPE_DTYPES[0]),
        ("layout", LAYOUTS, LAYOUTS[0]),
        ("direction", DIRECTIONS, DIRECTIONS[0]),
    ):
        group.add_argument(
            f"--{option}",
            type=functools.partial(chosen, known=known),
            metavar="NAME,NAME",
            help=f"some of {', '.join(known)}, or 'all' (default: {default})",
        )


def own_cases(options: argparse.Namespace) -> list[Case]:
    """A case for each combination of what was asked for; none where there is no ``--shape``.

    Raises:
        ValueError: for options of shapes without a shape.
    """
    if options.shape is None:
        names = ("kernel", "batch", "operator", "dtype", "layout", "direction")
        if given := [f"--{name}" for name in names if getattr(options, name) is not None]:
            raise ValueError(f"expected --shape with {', '.join(given)}, such as --shape 320x16x16")
        return []
    choices = (
        options.dtype or SHAPE_DTYPES[:1], options.shape, options.kernel or (DEFAULT_KERNEL,),
        options.batch or (DEFAULT_BATCH,), options.operator or tuple(OPERATORS), options.layout or LAYOUTS[:1],
        options.direction or DIRECTIONS[:1],
    )  # fmt: skip
    found: list[Case] = []
    for dtype, (channels, height, width), kernel, batch, operator, layout, direction in itertools.product(*choices):
        case = OperatorCase(operator, batch, channels, height, kernel, layout, dtype, direction)
        found.append(case if width == height else replace(case, width=width))
    return found


def shapes(text: str) -> tuple[tuple[int, int, int], ...]:
    """Channels, height and width of maps. Raises argparse's error for anything but maps CxHxW."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)[x×*](\d+)[x×*](\d+)", part.strip())
        sizes = tuple(map(int, match.groups())) if match else (0,)
        if min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"expected channels x height x width, such as 320x16x16, got {part!r}")
        found.append(sizes)
    return tuple(dict.fromkeys(found))  # type: ignore[arg-type]


def numbers(text: str) -> tuple[int, ...]:
    """Raises argparse's error for anything but positive integers with commas between."""
    return tuple(dict.fromkeys(positive(part.strip()) for part in text.split(",")))


def positive(text: str) -> int:
    """An option's integer, 1 or more. Raises argparse's error for anything else."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def chosen(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """An option's names, each once: some of those known, with commas between, or ``all``. Raises argparse's error for
    others."""
    names = tuple(known) if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {next(iter(unknown), text)!r}")
    return tuple(dict.fromkeys(names))
