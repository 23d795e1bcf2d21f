"""Triton kernels for GPUs: float32, bfloat16 and float16, NCHW and channels-last, any stride, filters up to 31×31.

``TRITON_INTERPRET=1`` runs them on CPU tensors, slowly, for tests. Nothing here imports Triton before the first call.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import reference
from .launch import INTERPRETED, recording

logger = logging.getLogger("ffnet_kernels")

NAME = "triton"
OLDEST = (3, 5)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PIXELS = 2**31 - 2**10
_HOSTS = {"depthwise_conv2d": "depthwise", "ffnified_attention": "attention", "channel_mixer": "mixer"}
OPERATORS = tuple(_HOSTS)
#: Operators that a program loaded without Python may contain.
IN_LIBRARY: tuple[str, ...] = ()
_DEVICES = ("cuda", "xpu")
_HOW_TO_INTERPRET = "TRITON_INTERPRET=1 in the environment runs the kernels on CPU tensors, slowly, for tests"


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; {_oldest()}"
    version = _installed()
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is installed; {_oldest()}"
    if not INTERPRETED and not _gpus():
        return f"there is no GPU; {_HOW_TO_INTERPRET}"
    return None


def _oldest() -> str:
    return f"{'.'.join(map(str, OLDEST))} or newer is needed"


def _installed() -> str | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-xpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None  # built from source: accepted as it is


def _gpus() -> bool:
    return torch.cuda.device_count() > 0 or (hasattr(torch, "xpu") and torch.xpu.device_count() > 0)


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.device.type not in _DEVICES and not (INTERPRETED and x.device.type == "cpu"):
        return f"takes GPU tensors, got {x.device}; {_HOW_TO_INTERPRET}"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    if operator.startswith("channel_mixer") and x.shape[0] * x.shape[2] * x.shape[3] > _MOST_PIXELS:
        return f"takes up to {_MOST_PIXELS} pixels, got the shape {list(x.shape)}"
    return None


def slower(operator: str, args: tuple) -> str | None:
    return "interpreted on the CPU, for tests" if args[0].device.type == "cpu" else None


def describe(operator: str, args: tuple) -> str:
    """The kernels that the call would launch, with their tiles."""
    module = _module(operator)
    if module is None:
        return "Triton does not import; plain PyTorch operators"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, recording() as launches:
        fakes = tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        module.forward(getattr(torch.ops.ffnet_kernels_triton, operator).default(*fakes), *fakes)
    return "; ".join(map(str, launches))


def run_forward(operator: Any, out: Tensor, args: tuple) -> Tensor:
    """Computes a checked call of an ``ops.Operator`` into ``out``."""
    module = _module(operator.name)
    return out.copy_(operator.reference(*args)) if module is None else module.forward(out, *args)


def run_backward(operator: Any, call: tuple) -> list:
    """The gradients of a call; None where one is not needed."""
    module = _module(operator.name)
    if module is None:
        return operator.defined.gradient(reference, *call)
    grads = module.backward(*call)
    return operator.defined.gradient(_module("depthwise_conv2d"), *call) if grads is None else grads


@functools.cache
def _module(operator: str) -> Any:
    """The host side of an operator; None, with one warning, if Triton cannot be imported."""
    try:
        if INTERPRETED:
            from . import interpreter

            interpreter.mend()
        return importlib.import_module(f".{_HOSTS[operator]}", __name__)
    except ImportError as error:
        logger.warning("Triton does not import, plain PyTorch runs in its place: %s", error)
        return None
