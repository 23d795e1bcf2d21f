"""Checks every built kernel of this installation against the float64 reference, in seconds."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .backends import choice, cuda, triton
from .backends.maps import same_padding
from .ops._operator import OPERATORS, Operator

#: What there is to check.
BACKENDS = tuple(name for name in choice.BACKENDS if name != "reference")
FEW = 64  # elements
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


#: The variants of a backend that are checked separately, and what selects each.
_Variant = tuple[str, Callable[[], contextlib.AbstractContextManager]]


class Check(NamedTuple):
    """One comparison: the largest errors, against float64, of the kernel and of plain PyTorch in the same dtype."""

    backend: str
    variant: str
    case: str
    error: float
    eager_error: float
    passed: bool


class Case(NamedTuple):
    """A call of an operator, its arguments as in the schema, in float32 on the CPU, and the layouts of its maps."""

    name: str
    operator: str
    args: tuple
    layouts: tuple[str, ...] = tuple(LAYOUTS)

    @property
    def spec(self) -> Operator:
        return OPERATORS[self.operator]

    def laid_out(self, layout: str) -> tuple:
        """Its arguments with maps in the given layout."""
        maps = (0, self.spec.residual)
        return tuple(_laid_out(a, layout) if i in maps else a for i, a in enumerate(self.args))


class _Place(NamedTuple):
    """The device and the dtypes in which a backend is checked."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    variants: list[_Variant]


def error_limit(reference64: Tensor, eager: Tensor) -> float:
    """The largest absolute error allowed: twice that of plain PyTorch in the same dtype, plus four roundings of the
    largest result.

    Both tensors have the same shape.
    """
    if reference64.numel() == 0:
        return 0.0
    roundings = 4 * torch.finfo(eager.dtype).eps * reference64.abs().max().item()
    return 2 * (eager.double() - reference64).abs().max().item() + roundings


def selftest(
    report: Callable[[Check], None] | None = None, *, backend: str | None = None, text: str = ""
) -> list[Check]:
    """Runs every kernel, forward and backward, of every available backend and instruction set on small maps that
    exercise its edge cases.

    Args:
        report: called with each check as it is made.
        backend: only this one, if given. Kernels that run on the CPU for tests only (interpreted Triton kernels, which
            take many minutes, and CUDA kernels in host execution) are checked only if their backend is named.
        text: only cases with this text in their names.

    Returns:
        All checks; ``all(check.passed for check in selftest())`` is the verdict. Empty if only the reference is
        available.

    Raises:
        ValueError: for an unknown backend.
        BackendError: if the backend is not available on this machine.
    """
    if backend is None:
        chosen = [name for name in choice.available_backends() if name in BACKENDS and not _is_for_tests(name)]
    elif backend not in BACKENDS:
        raise ValueError(f"selftest: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    elif (reason := choice.why_unavailable(backend)) is not None:
        raise choice.BackendError(f"backend '{backend}' is not available: {reason}")
    else:
        chosen = [backend]
    checks = []
    for name in chosen:
        for check in _checks(name, text):
            checks.append(check)
            if report:
                report(check)
    return checks


def _is_for_tests(backend: str) -> bool:
    """Whether its kernels only stand in for a GPU's, so that checking them says nothing about this machine."""
    return triton.INTERPRETED if backend == "triton" else backend == "cuda" and native.cuda_host_library() is not None


def _checks(backend: str, text: str) -> Iterator[Check]:
    place, in_turn = _place(backend), backend == "cuda" and _is_for_tests(backend)
    for number, case in enumerate(cases()):
        if text not in case.name:
            continue
        # Host execution is for tests, which have other checks of each type as well.
        for dtype in [place.dtypes[number % len(place.dtypes)]] if in_turn else place.dtypes:
            args = moved(case.args, device=place.device, dtype=dtype)
            # Sums of a few hundred cancelling terms would depend more on their order than on the kernel.
            grad = incoming_gradient(case.spec.reference(*args), mean=1.0)
            expected = _expected(case, args, grad)
            for layout, (variant, selected) in itertools.product(case.layouts, place.variants):
                placed = moved(case.laid_out(layout), device=place.device, dtype=dtype)
                with selected(), poisoned_memory():
                    results = _results(backend, case, placed, _laid_out(grad, layout))
                for one, result in zip(expected, results, strict=True):
                    title = f"{one.name} {layout} {str(dtype).removeprefix('torch.')}"
                    error = _largest(result.double() - one.exact)
                    # NaN compares false: an output that was not written fails.
                    yield Check(backend, variant, title, error, one.eager_error, error <= one.limit)


class _Expected(NamedTuple):
    """A result of a call: its name, its values in float64, the error of plain PyTorch, and the error allowed."""

    name: str
    exact: Tensor
    eager_error: float
    limit: float


def _expected(case: Case, args: tuple, grad: Tensor) -> list[_Expected]:
    names = [case.name, *(f"gradient of {case.spec.names[i]} of {case.name}" for i in _wanted(case, args))]
    exact = _results("reference", case, moved(args, dtype=torch.float64), grad.double())
    eager = _results("reference", case, args, grad)
    errors = [_largest(plain.double() - result) for plain, result in zip(eager, exact, strict=True)]
    # With few elements, plain PyTorch may be exact by chance: its relative error is taken to be the call's largest.
    share = max(error / _largest(result) for error, result in zip(errors, exact, strict=True))
    limits = [
        max(error_limit(result, plain), 2 * share * _largest(result) if result.numel() < FEW else 0.0)
        for result, plain in zip(exact, eager, strict=True)
    ]
    return [_Expected(*row) for row in zip(names, exact, errors, limits, strict=True)]


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _results(backend: str, case: Case, args: tuple, grad: Tensor) -> list[Tensor]:
    """The output, and the wanted gradients for an incoming one."""
    mask = [i in _wanted(case, args) for i in case.spec.tensors]
    return [case.spec.on(backend, *args), *case.spec.backward_on(backend, grad, *args, mask)]


def _wanted(case: Case, args: tuple) -> list[int]:
    """All tensors except a residual, whose gradient is the incoming one."""
    return [i for i in case.spec.tensors if args[i] is not None and i != case.spec.residual]


def incoming_gradient(output: Tensor, mean: float = 0.0) -> Tensor:
    """Random numbers like an output, the same in every run."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    return torch.empty_like(output, requires_grad=False).copy_(values + mean)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which new tensors are filled with NaN, to reveal elements that no kernel writes."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def moved(args: Iterable[Any], **to: Any) -> tuple:
    """Arguments with their tensors on another device, or in another dtype."""
    return tuple(a.to(**to) if isinstance(a, Tensor) else a for a in args)


def _laid_out(values: Any, layout: str) -> Any:
    return values.contiguous(memory_format=LAYOUTS[layout]) if isinstance(values, Tensor) else values


def _place(backend: str) -> _Place:
    cpu = torch.device("cpu")
    if backend == "cpu":
        selecting: list[_Variant] = [(isa, functools.partial(_selected_isa, isa)) for isa in native.usable_isas()]
        return _Place(cpu, (torch.float32, torch.bfloat16, torch.float16), selecting)
    gpu = torch.device("cuda" if torch.cuda.device_count() > 0 else "xpu")
    device = cpu if _is_for_tests(backend) else gpu
    return _Place(device, (torch.bfloat16, torch.float16, torch.float32), [(device.type, contextlib.nullcontext)])


@contextlib.contextmanager
def _selected_isa(isa: str) -> Iterator[None]:
    previous = native.isa()
    native.select_isa(isa)
    try:
        yield
    finally:
        native.select_isa(previous)


def cases() -> Iterator[Case]:
    """All cases, the same in every run. Together they reach every kernel of every backend."""
    generator = torch.Generator().manual_seed(0)
    # Odd and even filters, channels that fill no vector, rows that no wide access fits.
    for kernel in (1, 3, 4, 5, 7, 31):
        for shape in ((1, 35, 9, 17), (1, 16, 18, 34))[: 1 if kernel == 31 else 2]:
            yield _convolution(generator, kernel, shape)
            yield _attention(generator, kernel, shape)
            yield _mixer(generator, kernel, shape)
        yield _convolution(generator, kernel, (2, 19, 16, 5), multiplier=2, stride=2)
    # Rows of one, two and eight windows of the tensor cores' panels, and wider ones; more images than a panel has.
    for kernel, shape in itertools.product((3, 7), ((19, 3, 7, 8), (9, 2, 10, 16), (3, 2, 9, 64), (1, 2, 8, 72))):
        yield _convolution(generator, kernel, shape, layouts=("nchw",))
        yield _attention(generator, kernel, shape, layouts=("nchw",))
    # Whole planes of heights that the CUDA kernels know, among them rows that are no multiple of 16 bytes.
    for size in (7, 8, 14, 16, 28):
        yield _convolution(generator, 7, (3, 2, size, size), layouts=("nchw",))
        yield _attention(generator, 7, (3, 2, size, size), layouts=("nchw",))
    # More channels than one kernel of the channel mixer takes.
    yield _mixer(generator, 3, (1, 136, 3, 4))


def _convolution(
    generator: torch.Generator,
    kernel: int,
    shape: tuple[int, ...],
    multiplier: int = 1,
    stride: int = 1,
    **how: Any,
) -> Case:
    x, weight, bias = _random(generator, shape), *_filter(generator, shape[1] * multiplier, kernel)
    every_backend_has = cuda.ACTIVATIONS
    activation = every_backend_has[(kernel + stride) % len(every_backend_has)]
    args = (x, weight, bias, (stride, stride), same_padding(weight), activation)
    name = f"depthwise_conv2d k={kernel} s={stride} m={multiplier} {_text(shape)} {activation}"
    return Case(name, "depthwise_conv2d", args, **how)


def _attention(generator: torch.Generator, kernel: int, shape: tuple[int, ...], **options: Any) -> Case:
    filters = *_filter(generator, shape[1], kernel), *_filter(generator, shape[1], kernel)
    scale, query, residual = _random(generator, shape[1:2]), _random(generator, shape), _random(generator, shape)
    args = (query, *filters, "gelu", scale, residual)
    return Case(f"ffnified_attention k={kernel} {_text(shape)}", "ffnified_attention", args, **options)


def _mixer(generator: torch.Generator, kernel: int, shape: tuple[int, ...]) -> Case:
    channels, hidden = shape[1], 2 * shape[1] + 1

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    expand = random(hidden, channels) / channels**0.5, random(hidden)
    project = random(channels, hidden) / hidden**0.5, random(channels)
    depthwise = random(*shape), *_filter(generator, channels, kernel)
    args = (*depthwise, *expand, *project, "gelu", random(channels), random(*shape))
    return Case(f"channel_mixer k={kernel} D={hidden} {_text(shape)}", "channel_mixer", args)


def _random(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator)


def _filter(generator: torch.Generator, outputs: int, kernel: int) -> tuple[Tensor, Tensor]:
    """And its bias."""
    weight = torch.randn(outputs, 1, kernel, kernel, generator=generator) / kernel
    return weight, torch.randn(outputs, generator=generator)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
