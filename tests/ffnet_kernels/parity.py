"""Cases of every operator, as hypothesis strategies, and the rule that judges a kernel's result."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import ffnet_kernels as fk
from ffnet_kernels import native
from ffnet_kernels.backends import choice
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.ops import OPERATORS as OPERATORS_BY_NAME
from ffnet_kernels.selftest import error_limit as error_limit

_ERROR = native.cpu_library_error()
#: The instruction sets of this build and processor.
ISAS: list[str] = [] if _ERROR else list(native.usable_isas())

needs_native = pytest.mark.skipif(bool(_ERROR), reason=f"no native CPU kernels: {_ERROR}")
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param(None, marks=needs_native)])

OPERATORS = ("depthwise_conv2d", "ffnified_attention", "channel_mixer")
LAYOUTS = (
    "nchw",
    "channels_last",
    "stepped",
    "transposed",
    "batch_inside",
    "expanded_batch",
    "expanded_channels",
    "channel_slice",
    "window",
)
WEIGHT_LAYOUTS = ("nchw", "channels_innermost", "channels_last", "stepped", "transposed", "expanded_batch")
_SAMPLE = 4096  # outputs over which plain PyTorch's error is taken


class Case(NamedTuple):
    """A call of a public function, printable enough to repeat it."""

    operator: str
    args: tuple
    kwargs: dict

    def __repr__(self) -> str:
        def text(value: object) -> str:
            return f"<{list(value.shape)} by {value.stride()}>" if isinstance(value, Tensor) else repr(value)

        named = [f"{name}={text(value)}" for name, value in self.kwargs.items()]
        return f"{self.operator}({', '.join([*map(text, self.args), *named])})"

    def checked(self) -> tuple:
        """The arguments as the operators' schemas have them."""
        names = ("stride", "padding", "activation") if "conv2d" in self.operator else ()
        defaults = {"stride": 1, "padding": "same", "activation": "none"} if names else {}
        if not names:
            defaults = {"activation": "gelu", "scale": None, "residual": None}
        return OPERATORS_BY_NAME[self.operator].defined.checked(*self.args, **{**defaults, **self.kwargs})

    def run(self) -> Tensor:
        return getattr(fk, self.operator)(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]


@contextlib.contextmanager
def selected_isa(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    previous = native.isa()
    native.select_isa(isa)
    try:
        yield
    finally:
        native.select_isa(previous)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills with NaN whatever torch allocates, and the scratch of CPU kernels: what is not written shows."""
    before, filling = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native.poison_scratch(True)
    try:
        yield
    finally:
        native.poison_scratch(False)
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def laid_out(
    shape: tuple[int, ...], layout: str, generator: torch.Generator, gain: float = 1.0, dtype=torch.float32
) -> Tensor:
    """Normally distributed values in a [N, C, H, W] view of the given layout."""
    n, c, h, w = shape

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * gain).to(dtype)

    match layout:
        case "nchw":
            return normal(n, c, h, w)
        case "channels_last":
            return normal(n, h, w, c).permute(0, 3, 1, 2)
        case "channels_innermost":
            return normal(c, h, w, n).permute(3, 0, 1, 2)
        case "stepped":
            return normal(2 * n + 1, 2 * c + 1, 3 * h + 1, 2 * w + 1)[1::2, 1::2, 1::3, 1::2]
        case "transposed":
            return normal(n, c, w, h).mT
        case "batch_inside":
            return normal(c, h, n, w).permute(2, 0, 1, 3)
        case "expanded_batch":
            return normal(1, c, h, w).expand(n, c, h, w)
        case "expanded_channels":
            return normal(n, 1, h, w).expand(n, c, h, w)
        case "channel_slice":
            return normal(n, h, w, c + 5).permute(0, 3, 1, 2)[:, 2 : 2 + c]
        case "window":
            return normal(n, h + 3, w + 2, c).permute(0, 3, 1, 2)[:, :, 1 : 1 + h, 2:]
    raise ValueError(layout)


def expected_formats(operator: str, args: tuple, like: Tensor) -> list[tuple[bool, bool]]:
    """:func:`formats` of a tensor of ``like``'s shape in the format that the convolutions of ``args`` give.

    Both formats where their result has but one channel and so does not tell.
    """
    # By strides alone. Of 16 bits, torch would take minutes for a channels-last map with wide padding.
    out, *weights = (
        torch.empty_strided(t.shape, t.stride())
        for t in (args[0], args[1], *([args[3]] if operator == "ffnified_attention" else []))
    )
    for weight in weights:
        # Wide padding: a map of one pixel would not tell its format.
        out = F.conv2d(out, weight, None, 1, (weight.shape[2], weight.shape[3]), groups=out.shape[1] // weight.shape[1])
    candidates = (torch.contiguous_format, torch.channels_last)
    return [
        formats(torch.empty(like.shape, device="meta", memory_format=candidate))
        for candidate in candidates
        if out.is_contiguous(memory_format=candidate)
    ]


def formats(x: Tensor) -> tuple[bool, bool]:
    return x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def convolutions_in_time(args: tuple, backward: bool = False) -> Iterator[None]:
    """Keeps plain PyTorch from oneDNN where that would compile code for minutes, for large 16-bit filters, and where it
    leaves some of a result unwritten, for 16-bit gradients."""
    filters = [a for a in args if isinstance(a, Tensor) and a.dim() == 4 and a.element_size() == 2]
    large = any(backward or (a.shape[1] == 1 and a[:1].numel() > 100) for a in filters)
    enabled = torch.backends.mkldnn.enabled
    try:
        if large:
            torch.backends.mkldnn.set_flags(_enabled=False)
        yield
    finally:
        if large:
            torch.backends.mkldnn.set_flags(_enabled=enabled)


def reference_of(operator: str, args: tuple) -> tuple:
    """The reference in float64, and in the dtype of the arguments."""
    definition = OPERATORS_BY_NAME[operator.removesuffix("_backward")]
    backward = functools.partial(definition.backward_on, "reference")
    run = backward if operator.endswith("_backward") else definition.reference
    with convolutions_in_time(args, operator.endswith("_backward")):
        return run(*(a.double() if isinstance(a, Tensor) else a for a in args)), run(*args)


def limit_of(operator: str, args: tuple, expected: Tensor, eager: Tensor) -> float:
    """:func:`error_limit`, for a small result with more images: a few elements would judge by plain PyTorch's luck."""
    if 0 < expected.numel() < _SAMPLE:
        generator = torch.Generator().manual_seed(0)
        more = list(args)
        for i, values in enumerate(args):
            if values is args[0] or (i == OPERATORS_BY_NAME[operator].residual and values is not None):
                images = -(-_SAMPLE * values.shape[0] // expected.numel())
                extra = torch.randn(images, *values.shape[1:], generator=generator)
                more[i] = torch.cat([values, extra.to(values.dtype)])
        expected, eager = reference_of(operator, tuple(more))
    return error_limit(expected, eager)


def variants(backend: str) -> list[str | None]:
    """The instruction sets of the CPU kernels; other backends have one variant."""
    return ISAS if backend == "cpu" else [None]


def check(case: Case, backend: str = "cpu") -> None:
    """Every variant of a backend against the float64 reference, relative to plain PyTorch's own error."""
    operator, args = case.operator, case.checked()
    if choice.BACKENDS[backend].refusal(operator, args) is not None:
        decision = fk.explain(operator, *case.args, **case.kwargs)
        assert decision.backend == "reference"
        assert decision.refused[backend], "a refusal gives its reason"
        return
    expected, eager = reference_of(operator, args)
    limit = limit_of(operator, args, expected, eager)
    for isa in variants(backend):
        with selected_isa(isa), poisoned_memory(), fk.use_backend(backend):
            out = case.run()
        assert out.shape == expected.shape
        assert out.dtype == eager.dtype
        if out.numel():  # conv2d's own empty result has the strides of some elementwise product
            assert formats(out) in expected_formats(operator, args, out), f"{isa}: memory format of the output"
            error = (out.double() - expected).abs().max().item()  # NaN, where an element was not written
            assert error <= limit, f"{isa}: error {error:.2e} over the limit {limit:.2e}"


def check_gradients(
    case: Case, backend: str = "cpu", *, layout: str = "nchw", wanted: Collection[int] | None = None
) -> None:
    """As :func:`check`, for the gradient of every tensor of the call, of a random gradient of its result.

    A gradient of a few elements would judge by plain PyTorch's luck: its error there is the worst of several incoming
    gradients, and its share of error that of the call's worst.

    Args:
        layout: of the result's gradient.
        wanted: places of the tensors whose gradients are asked for, in place of all.
    """
    args = case.checked()
    out = reference_of(case.operator, args)[1]
    grad = laid_out(out.shape, layout, torch.Generator().manual_seed(0), dtype=out.dtype)
    places = OPERATORS_BY_NAME[case.operator].tensors
    mask = [args[i] is not None and (wanted is None or i in wanted) for i in places]
    call = (grad, *args, mask)
    expected, eager = reference_of(f"{case.operator}_backward", call)
    few = 64
    unlucky = [
        (plain.double() - exact).abs().max() if exact.numel() else 0
        for plain, exact in zip(eager, expected, strict=True)
    ]
    if any(0 < exact.numel() < few for exact in expected):
        for seed in range(1, 9):
            other = laid_out(out.shape, layout, torch.Generator().manual_seed(seed), dtype=out.dtype)
            pairs = zip(*reference_of(f"{case.operator}_backward", (other, *args, mask)), strict=True)
            errors = [(plain.double() - exact).abs().max() if exact.numel() else 0 for exact, plain in pairs]
            unlucky = [max(a, b) for a, b in zip(unlucky, errors, strict=True)]
    share = max((relative_error(plain, exact) for plain, exact in zip(eager, expected, strict=True)), default=0)
    for isa in variants(backend):
        with selected_isa(isa), poisoned_memory():
            got = backward_of(backend, case.operator)(*call)
        assert len(got) == len(expected)
        for i, (result, exact, plain) in enumerate(zip(got, expected, eager, strict=True)):
            assert result.shape == exact.shape
            assert result.dtype == plain.dtype
            if result.numel():
                error = (result.double() - exact).abs().max().item()
                limit = error_limit(exact, plain)
                if result.numel() < few:
                    roundings = 4 * torch.finfo(plain.dtype).eps * exact.abs().max().item()
                    limit = max(limit, 2 * share * exact.abs().max().item(), 2 * float(unlucky[i]) + roundings)
                assert error <= limit, f"{isa}: gradient {i}: error {error:.2e} over the limit {limit:.2e}"


def backward_of(backend: str, operator: str) -> Callable[..., list[Tensor]]:
    """A backend's own gradients of an operator."""
    return functools.partial(OPERATORS_BY_NAME[operator].backward_on, backend)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """The largest error over the largest exact value."""
    return ((x.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item() if x.numel() else 0.0


def kinds(x: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 inf, 3 -inf, element by element."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def assert_same_kinds(out: Tensor, expected: Tensor) -> None:
    wrong = (kinds(out) != kinds(expected)).nonzero()
    assert not len(wrong), f"at {wrong[0].tolist()}: {out[tuple(wrong[0])]}, not {expected[tuple(wrong[0])]}"


_extents = st.one_of(st.sampled_from([1, 2, 3, 7, 8, 14, 15, 16, 17, 31, 56, 64]), st.integers(1, 70))
_channels = st.one_of(st.sampled_from([1, 3, 4, 5, 8, 15, 16, 17, 24, 32, 33, 64, 96, 200]), st.integers(1, 200))
_sides = st.one_of(st.sampled_from([1, 2, 3, 3, 5, 7, 7, 9, 31]), st.integers(1, 31))
_kernels = st.one_of(
    _sides.map(lambda k: (k, k)), st.tuples(_sides, _sides), st.sampled_from([(1, 51), (3, 7), (11, 3)])
)


class Sizes(NamedTuple):
    """What the cases are drawn from."""

    images: st.SearchStrategy
    channels: st.SearchStrategy
    extents: st.SearchStrategy
    kernels: st.SearchStrategy
    dtypes: st.SearchStrategy
    work: int  # multiplications of a case
    activations: st.SearchStrategy = st.sampled_from(ACTIVATIONS)

    def shape(self, draw: st.DrawFn, cost: int) -> tuple[int, int, int, int]:
        """[N, C, H, W], the largest of C, H and W halved until the work is affordable."""
        n, c, h, w = draw(self.images), draw(self.channels), draw(self.extents), draw(self.extents)
        while n * c * h * w * cost > self.work and max(c, h, w) > 1:
            largest = max(c, h, w)
            c, h, w = (c // 2, h, w) if c == largest else (c, h // 2, w) if h == largest else (c, h, w // 2)
        return n, c, h, w


_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
NATIVE = Sizes(st.integers(0, 3), _channels, _extents, _kernels, _dtypes, 1_500_000)
_generators = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def _vectors(draw: st.DrawFn, length: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor | None:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    match draw(st.sampled_from(["none", "contiguous", "strided", "expanded", "column"])):
        case "contiguous":
            return normal(length)
        case "strided":
            return normal(2 * length + 1)[1::2]
        case "expanded":
            return normal(1).expand(length)
        case "column":
            return normal(length, 1, 1)
    return None


@st.composite
def depthwise_cases(draw: st.DrawFn, sizes: Sizes = NATIVE) -> Case:
    generator, dtype = draw(_generators), draw(sizes.dtypes)
    kernel = draw(sizes.kernels)
    shape = sizes.shape(draw, kernel[0] * kernel[1])
    outputs = shape[1] * draw(st.sampled_from([1, 1, 2]))
    paddings: list = ["same", (kernel[0] // 2, kernel[1] // 2), (kernel[0], 0), 3]
    if shape[2] >= kernel[0] and shape[3] >= kernel[1]:
        paddings += ["valid", 0]
    paddings = [p for p in paddings if p == "same" or _fits(p, kernel, shape)]
    x = laid_out(shape, draw(st.sampled_from(LAYOUTS)), generator, dtype=dtype)
    gain = (kernel[0] * kernel[1]) ** -0.5
    weight = laid_out((outputs, 1, *kernel), draw(st.sampled_from(WEIGHT_LAYOUTS)), generator, gain, dtype)
    stride = draw(st.sampled_from([1, 1, 2, (2, 1), (1, 2)]))
    kwargs = {"stride": stride, "padding": draw(st.sampled_from(paddings)), "activation": draw(sizes.activations)}
    return Case("depthwise_conv2d", (x, weight, draw(_vectors(outputs, generator, dtype))), kwargs)


def _fits(padding, kernel: tuple[int, int], shape: tuple[int, ...]) -> bool:
    height, width = (0, 0) if padding == "valid" else (padding, padding) if isinstance(padding, int) else padding
    return shape[2] + 2 * height >= kernel[0] and shape[3] + 2 * width >= kernel[1]


@st.composite
def attention_cases(draw: st.DrawFn, sizes: Sizes = NATIVE) -> Case:
    generator, dtype = draw(_generators), draw(sizes.dtypes)
    kernels = draw(sizes.kernels), draw(sizes.kernels)
    shape = sizes.shape(draw, sum(kh * kw for kh, kw in kernels))
    query = laid_out(shape, draw(st.sampled_from(LAYOUTS)), generator, dtype=dtype)
    key, value = (
        laid_out((shape[1], 1, *k), draw(st.sampled_from(WEIGHT_LAYOUTS)), generator, (k[0] * k[1]) ** -0.5, dtype)
        for k in kernels
    )
    vectors = [draw(_vectors(shape[1], generator, dtype)) for _ in range(3)]
    layout = draw(st.sampled_from([None, *LAYOUTS]))
    residual = None if layout is None else laid_out(shape, layout, generator, dtype=dtype)
    kwargs = {"activation": draw(sizes.activations), "scale": vectors[2], "residual": residual}
    return Case("ffnified_attention", (query, key, vectors[0], value, vectors[1]), kwargs)


@st.composite
def channel_mixer_cases(draw: st.DrawFn, sizes: Sizes = NATIVE) -> Case:
    generator, dtype = draw(_generators), draw(sizes.dtypes)
    kernel = draw(sizes.kernels)
    hidden, outputs = draw(sizes.channels), draw(sizes.channels)
    shape = sizes.shape(draw, kernel[0] * kernel[1] + hidden)
    x = laid_out(shape, draw(st.sampled_from(LAYOUTS)), generator, dtype=dtype)
    weight = laid_out(
        (shape[1], 1, *kernel), draw(st.sampled_from(WEIGHT_LAYOUTS)), generator, (kernel[0] * kernel[1]) ** -0.5, dtype
    )

    def matrix(rows: int, columns: int) -> Tensor:
        layout = draw(st.sampled_from(["nchw", "stepped", "channels_innermost"]))
        weight = laid_out((rows, columns, 1, 1), layout, generator, columns**-0.5, dtype)
        return weight if draw(st.booleans()) else weight[:, :, 0, 0]

    expand, project = matrix(hidden, shape[1]), matrix(outputs, hidden)
    biases = [draw(_vectors(length, generator, dtype)) for length in (shape[1], hidden, outputs, outputs)]
    layout = draw(st.sampled_from([None, *LAYOUTS]))
    residual = None if layout is None else laid_out((shape[0], outputs, *shape[2:]), layout, generator, dtype=dtype)
    kwargs = {"activation": draw(sizes.activations), "scale": biases[3], "residual": residual}
    return Case("channel_mixer", (x, weight, biases[0], expand, biases[1], project, biases[2]), kwargs)
