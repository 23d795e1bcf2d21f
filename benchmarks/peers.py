"""The contenders: ours and the baselines. A further one is an object with a name, ``unavailable`` and ``prepare``, in
`CONTENDERS`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from .programs import CpuWork, Program, Unsupported, Work
from .runtimes import OnnxRuntime, OpenVino

OURS = "ours"


class Contender(Protocol):
    """One way to compute a work."""

    @property
    def name(self) -> str:
        """Unique, for the tables."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    def prepare(self, work: Any) -> Program:
        """Everything that is not timed: layout, weights, compilation."""


@dataclass(frozen=True)
class Ours:
    """ffnet_kernels, the backend chosen by itself, maps in the layout of the case."""

    name: str = OURS

    def unavailable(self) -> str | None:
        return None

    def prepare(self, work: Work) -> Program:
        return work.fused()


@dataclass(frozen=True)
class Eager:
    """Plain PyTorch operators, call by call; models reparameterised."""

    name: str
    layout: str

    def unavailable(self) -> str | None:
        return None

    def prepare(self, work: Work) -> Program:
        return work.plain(self.layout)


@dataclass(frozen=True)
class AsTrained:
    """The training-time module tree in eval mode: branches and batch norms run one by one."""

    name: str = "as trained"
    layout: str = "channels_last"

    def unavailable(self) -> str | None:
        return None

    def prepare(self, work: Work) -> Program:
        return work.as_trained(self.layout)


@dataclass(frozen=True)
class TorchCompile:
    """What `Eager` runs, through torch.compile, maps in the layout of the case."""

    name: str = "torch.compile"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def unavailable(self) -> str | None:
        return _why_compile_fails()

    def prepare(self, work: CpuWork) -> Program:
        if not work.inference:
            raise Unsupported("only forward passes are compiled here")
        # One function meets many shapes in a run: without a fresh start the compiler would generalise over them, and
        # give up on it after a few.
        torch._dynamo.reset()
        program = work.plain(work.layout)
        compiled = torch.compile(program.function, dynamic=False, options=dict(self.options))
        return replace(program, function=compiled)


@functools.cache
def _why_compile_fails() -> str | None:
    """Compiles something tiny: whether a C++ compiler works shows in no other way."""
    x = torch.ones(8)
    try:
        compiled = torch.compile(lambda x: torch.relu(x) + 1, dynamic=False)
        right = torch.equal(compiled(x), x + 1)
    except Exception as error:  # the compiler stack raises whatever went wrong in it
        return f"does not compile on this machine: {first_line(error)}"
    finally:
        torch._dynamo.reset()
    return None if right else "compiles wrong code on this machine"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where there is none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


#: All contenders by name. The frozen form (weights constant, packed ahead) compiles longest.
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Ours(),
        Eager("eager nchw", "nchw"),
        Eager("eager channels-last", "channels_last"),
        TorchCompile(),
        TorchCompile("torch.compile frozen", {"freezing": True}),
        TorchCompile("torch.compile max-autotune", {"max_autotune": True, "freezing": True}),
        OnnxRuntime(),
        OpenVino(),
    )
}
#: Those that are installed take part; compiling longer than measuring is for who asks (``--baselines``).
DEFAULT_CONTENDERS = (OURS, "eager nchw", "eager channels-last", "torch.compile", "onnxruntime", "openvino")
