"""Which cases are measured together: every suite whole, and in a quick form for a first look."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from .cases import OPERATORS, Case, LayerCase, ModelCase, OperatorCase, TrainingCase

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
