"""Backend selection: the preference order of backends, the override, and the explanation of a decision."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import cpu, cuda, reference, triton

logger = logging.getLogger("ffnet_kernels")

#: In order of preference, fastest first; the reference takes every call.
BACKENDS: Mapping[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
NAMES = ("auto", "reference", "cpu", "triton", "cuda")


class BackendError(RuntimeError):
    """The backend that was forced cannot run the call; the message says why."""


class _State(threading.local):
    """Per thread: the forced backend, and whether exported programs keep operators. Instance attributes, because
    torch.compile guards on those."""

    def __init__(self) -> None:
        self.forced = os.environ.get("FFNET_KERNELS_BACKEND") or "auto"
        self.keeps_operators = False


_state = _State()


class use_backend(contextlib.ContextDecorator):
    """Forces every operator call of this thread onto one backend, as a context manager or a decorator.

    Args:
        name: ``"auto"`` (choose per call), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: for an unknown name.
        BackendError: on entry, if the backend is not available on this machine; in a call, if the backend does not take
            that call.

    The environment variable ``FFNET_KERNELS_BACKEND`` sets the default for all threads; an unknown name fails in the
    first call.
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "use_backend")
        self.name = name
        self._previous: list[str] = []

    def __enter__(self) -> use_backend:
        _require(self.name)
        self._previous.append(_state.forced)
        _state.forced = self.name
        return self

    def _recreate_cm(self) -> use_backend:
        return use_backend(self.name)  # a decorated function may run in several threads at once

    def __exit__(self, *_exception: object) -> None:
        _state.forced = self._previous.pop()


@contextlib.contextmanager
def keep_operators(wanted: bool) -> Iterator[None]:
    """Context in which programs that ``torch.export`` makes, in this thread, keep operators that a library defines."""
    before, _state.keeps_operators = _state.keeps_operators, wanted
    try:
        yield
    finally:
        _state.keeps_operators = before


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, fastest first; always ends with ``"reference"``."""
    return tuple(name for name, backend in BACKENDS.items() if backend.unavailable() is None)


def why_unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None where it can."""
    return BACKENDS[name].unavailable()


def select(operator: str, args: tuple) -> ModuleType:
    """Selects the backend for a call. Raises BackendError if a forced one does not take it."""
    forced = _state.forced
    if not torch.compiler.is_compiling() and is_transformed():
        if forced not in ("auto", "reference"):
            raise BackendError(
                f"{operator}: backend '{forced}' takes no forward-mode derivative and no torch.func transform"
            )
        return reference
    if forced == "auto":
        if torch.compiler.is_exporting() and not _state.keeps_operators:
            return reference  # an exported program holds plain aten operators and runs anywhere
        for backend in _AVAILABLE:
            if _refusal(backend, operator, args) is None and backend.slower(operator, args) is None:
                return backend
    if forced not in BACKENDS or BACKENDS[forced] not in _AVAILABLE:  # only the environment can force one unchecked
        _check_name(forced, "FFNET_KERNELS_BACKEND")
        _require(forced)
    backend = BACKENDS[forced]
    reason = _refusal(backend, operator, args)
    if reason is None:
        return backend
    if not _has(backend, operator):
        return reference  # a backend may lack kernels for some operators
    raise BackendError(f"{operator}: backend '{forced}' does not take this call: {reason}")


def prefers(backend: ModuleType, operator: str, args: tuple) -> bool:
    """Whether `select` would choose a given backend; without an error if a forced one does not take the call."""
    if _state.forced != "auto" and _refusal(backend, operator, args) is not None:
        return False
    return select(operator, args) is backend


def prefers_cpu() -> bool:
    """Whether no backend is forced and the CPU kernels are available."""
    return _state.forced == "auto" and cpu in _AVAILABLE


def _has(backend: ModuleType, operator: str) -> bool:
    if backend is reference:
        return True
    return operator in (backend.IN_LIBRARY if _state.keeps_operators else backend.OPERATORS)


def _refusal(backend: ModuleType, operator: str, args: tuple) -> str | None:
    return backend.refusal(operator, args) if _has(backend, operator) else "has no kernel for it"


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a torch.func transform is active; only aten operators support those."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Decision(NamedTuple):
    """The backend and variant that run a call, and why faster backends do not."""

    operator: str
    backend: str
    variant: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator} -> {self.backend} ({self.variant})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def decide(operator: str, args: tuple) -> Decision:
    """Like :func:`select`, with the reasons."""
    chosen = select(operator, args)
    name = next(n for n, backend in BACKENDS.items() if backend is chosen)
    refused: dict[str, str] = {}
    for other in NAMES[:0:-1]:
        if other == name:
            break
        if _state.forced not in ("auto", other):
            refused[other] = f"'{_state.forced}' is forced"
        else:
            backend = BACKENDS[other]
            reason: object = why_unavailable(other)
            if reason is None:
                reason = _refusal(backend, operator, args) or backend.slower(operator, args)
            refused[other] = str(reason or "not chosen")
    return Decision(operator, name, chosen.describe(operator, args), refused)


def _check_name(name: Any, origin: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{origin}: expected one of {', '.join(NAMES)}, got {name!r}")


def _require(name: str) -> None:
    reason = None if name == "auto" else why_unavailable(name)
    if reason is not None:
        raise BackendError(f"backend '{name}' is not available: {reason}")


_AVAILABLE: tuple[ModuleType, ...] = tuple(BACKENDS[name] for name in available_backends())
for _name in BACKENDS:
    if (_reason := why_unavailable(_name)) is not None:
        logger.info("backend '%s' is not available: %s", _name, _reason)
