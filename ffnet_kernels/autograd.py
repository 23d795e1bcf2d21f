"""How operators get their gradients: known to torch's dispatcher, and by a shorter way in eager mode.

What ``torch.library.register_autograd`` makes goes through the dispatcher and some twenty frames of Python twice in a
training step, which shows where layers take a millisecond. An ``autograd.Function`` of the same two functions does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def register(library: torch.library.Library, name: str, differentiate: Callable, setup_context: Callable) -> None:
    """Makes an operator of the library differentiable; the two functions are as for ``register_autograd``."""
    torch.library.register_autograd(f"{library.ns}::{name}", differentiate, setup_context=setup_context, lib=library)
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def forward(ctx, *args):  # with setup_context as a method of its own, every call would look at its signature
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    _FUNCTIONS[operator] = type(name, (torch.autograd.Function,), methods)


def call(operator: Any, *args: Any) -> Any:
    """``operator(*args)``, an operator that was registered here."""
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    ):
        return operator(*args)
    return _FUNCTIONS[operator].apply(*args)
