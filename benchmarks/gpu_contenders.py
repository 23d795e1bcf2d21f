"""What an operator is timed against on a GPU, and our backends one by one."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ffnet_kernels.backends import choice, reference
from ffnet_kernels.backends.activations import ACTIVATE
from ffnet_kernels.ops import OPERATORS

from .peers import OURS
from .programs import Unsupported
from .work import OperatorWork, Program, channels_innermost, is_filter

BACKENDS = ("cuda", "triton")
EAGER_NCHW, EAGER, CUDNN_NCHW, CUDNN, COMPILED, COPY = (
    "eager nchw", "eager channels-last", "cudnn nchw", "cudnn channels-last", "torch.compile channels-last", "copy",
)  # fmt: skip


def is_ours(contender: str) -> bool:
    return contender == OURS or contender.split()[0] in BACKENDS


@dataclass(frozen=True)
class OnBackend:
    """An operator on a backend's kernels, whatever the chooser would take. ``stored``: filters lie as `optimize` stores
    them, with their channels innermost; else as parameters that are trained."""

    backend: str
    layout: str = "channels_last"
    stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.backend} {self.layout.replace('_', '-')}"

    def unavailable(self) -> str | None:
        return choice.why_unavailable(self.backend)

    def prepare(self, work: Any) -> Program:
        program, backend = work.plain(self.layout), choice.BACKENDS[self.backend]
        args = program.inputs[0]
        if self.stored and self.layout == "channels_last":
            args = tuple(channels_innermost(a) if is_filter(a) else a for a in args)
        detail = backend.describe(work.operator, args)
        function = functools.partial(OPERATORS[work.operator].on, self.backend)
        return replace(program, function=function, inputs=[args], detail=detail)


@dataclass(frozen=True)
class Cudnn:
    """As `Eager`, depthwise convolutions by cuDNN where PyTorch takes a kernel of its own."""

    name: str
    layout: str

    def unavailable(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "there is no cuDNN"

    def prepare(self, work: Any) -> Program:
        program = work.plain(self.layout)

        def run(*args: Any) -> Tensor:
            with mock.patch.object(reference, "convolve", _cudnn_convolve):
                return program.function(*args)

        return replace(program, function=run)

    def differs(self, work: OperatorWork) -> bool:
        """Whether PyTorch, asked for the operator's depthwise convolution, would not take cuDNN itself."""
        if self.unavailable() or work.operator == "channel_mixer":
            return False
        x, weight = work.plain(self.layout).inputs[0][:2]
        pads = [(side - 1) // 2 for side in weight.shape[2:]]
        options = ([1, 1], pads, [1, 1], False, [0, 0], x.shape[1])
        return torch._C._select_conv_backend(x, weight, None, *options) != torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]


def _cudnn_convolve(x, weight, bias, stride, padding) -> Tensor:
    """As `reference.convolve`, for even padding."""
    top, _, left, _ = padding
    out = torch.cudnn_convolution(
        x, weight, (top, left), tuple(stride), (1, 1), x.shape[1], benchmark=True, deterministic=False, allow_tf32=False
    )
    return out if bias is None else out + bias[:, None, None]


@dataclass(frozen=True)
class SubquadraticOps:
    """A depthwise convolution by fast Fourier transform, of NVIDIA's subquadratic-ops where that is installed.

    Its ``fft_conv2d(x, kernel)`` takes a kernel of the map's size [C, H, W] and gives their linear convolution, H×W of
    it from (H // 2, W // 2) on, as the tests of its version 0.1 say. So the filter stands turned around in a kernel of
    zeros, where that crop makes it the cross-correlation of layers. Bias and activation follow, as in `Eager`.
    """

    name: str = "subquadratic-ops nchw"

    def takes(self, work: OperatorWork) -> bool:
        """Whether it can compute the work: one filter, which fits into the map in its place, in float32 or float64."""
        if work.operator != "depthwise_conv2d" or work.dtype not in (torch.float32, torch.float64):
            return False
        x, weight, _, stride, padding, _ = work.plain("nchw").inputs[0]
        places = zip(x.shape[2:], weight.shape[2:], self._last(x, padding), strict=True)
        fits = all(taps - 1 <= last < side for side, taps, last in places)
        return fits and tuple(stride) == (1, 1) and weight.shape[0] == x.shape[1]

    def unavailable(self) -> str | None:
        try:
            importlib.import_module("subquadratic_ops_torch.fft_conv2d")
        except ImportError as error:
            return f"not installed (pip install subquadratic-ops-torch-cu13): {error}"
        return None

    def prepare(self, work: Any) -> Program:
        if reason := self.unavailable():
            raise Unsupported(reason)
        convolve = importlib.import_module("subquadratic_ops_torch.fft_conv2d").fft_conv2d
        x, weight, bias, _, padding, activation = work.plain("nchw").inputs[0]
        (kh, kw), (bottom, right) = weight.shape[2:], self._last(x, padding)
        kernel = x.new_zeros(x.shape[1:])
        kernel[:, bottom - kh + 1 : bottom + 1, right - kw + 1 : right + 1] = weight[:, 0].flip(1, 2)

        def run(x: Tensor) -> Tensor:
            out = convolve(x, kernel)
            return ACTIVATE[activation](out if bias is None else out + bias[:, None, None])

        return Program(run, [(x,)], "nchw")

    @staticmethod
    def _last(x: Tensor, padding: Any) -> tuple[int, int]:
        """Where in the kernel the filter's first tap stands, turned around: its last place, by rows and columns."""
        top, _, left, _ = padding
        return x.shape[2] // 2 + top, x.shape[3] // 2 + left


@dataclass(frozen=True)
class Copy:
    """As many bytes read and written by a plain copy: the floor."""

    bytes: int
    device: torch.device
    name: str = COPY

    def unavailable(self) -> str | None:
        return None

    def prepare(self, work: Any) -> Program:
        source = torch.empty(self.bytes // 2, dtype=torch.uint8, device=self.device).random_()
        return Program(torch.empty_like(source).copy_, [(source,)], "")
