"""What contenders prepare and the runner times; no case is known here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
#: Taps of a filter beyond which oneDNN compiles 16-bit depthwise code for minutes.
MOST_TAPS_IN_16_BITS = 100


class Unsupported(Exception):
    """A contender has no way to compute a work; the text says why."""


@dataclass(frozen=True)
class Program:
    """A function and its inputs: calling it runs the first input, which is the one that is timed.

    Attributes:
        function: what runs.
        inputs: one tuple of arguments a call.
        layout: of the maps it reads.
        detail: what is worth knowing of how it runs, e.g. the backend.
        judged: makes of a result the tensors that are checked, where those are more than the result; not timed.
        hoards: whether it keeps memory for its maps between calls, so that a call's cannot be told.
    """

    function: Callable[..., Any]
    inputs: Sequence[tuple]
    layout: str
    detail: str = ""
    judged: Callable[[Any], list[Tensor]] | None = None
    hoards: bool = False

    def __call__(self) -> Any:
        return self.function(*self.inputs[0])

    def outputs(self) -> Tensor:
        """The results of all inputs, along the batch."""
        return torch.cat([self.function(*arguments) for arguments in self.inputs])

    def results(self) -> list[Tensor]:
        """All that is checked."""
        return [self.outputs()] if self.judged is None else self.judged(self())


class Work(Protocol):
    """What all contenders of a case compute."""

    @property
    def layout(self) -> str:
        """The layout in which contenders that are free to choose get their maps."""

    def plain(self, layout: str) -> Program:
        """Plain PyTorch operators, the maps in that layout."""

    def fused(self) -> Program:
        """On ffnet_kernels, backend chosen by itself."""

    def as_trained(self, layout: str) -> Program:
        """As `plain`, before anything was folded."""

    def expected(self) -> Any:
        """What `Program.results` has, in float64; by itself where it is one tensor."""

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        """The largest absolute error of a result that counts as right."""


class CpuWork(Work, Protocol):
    """One that other runtimes may run, too."""

    @property
    def dtype(self) -> torch.dtype:
        """Of maps and weights."""

    @property
    def inference(self) -> bool:
        """Whether it runs in inference mode: no gradients are wanted."""

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        """As `plain` for other runtimes: a module with constant weights, and one tuple of maps a call, all contiguous.

        In float32 whatever the dtype of the work: a runtime is told the precision to compute in.
        """


def laid_out(arguments: dict[str, Any], layout: str) -> dict[str, Any]:
    """The maps and filters among the arguments in a layout."""
    memory_format = MEMORY_FORMATS[layout]
    return {
        name: value.contiguous(memory_format=memory_format) if isinstance(value, Tensor) and value.dim() == 4 else value
        for name, value in arguments.items()
    }


def is_filter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def too_large_for_onednn(arguments: dict[str, Any]) -> bool:
    """Whether oneDNN would compile code for minutes, to run the call once."""
    return any(
        is_filter(v) and v.element_size() == 2 and v[0].numel() > MOST_TAPS_IN_16_BITS for v in arguments.values()
    )


def without_onednn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on PyTorch's own convolutions."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        enabled = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.set_flags(_enabled=False)
        try:
            return function(*arguments, **keywords)
        finally:
            torch.backends.mkldnn.set_flags(_enabled=enabled)

    return run
