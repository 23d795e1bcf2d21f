"""How operators get their gradients: known to torch's dispatcher, and by a shorter way in eager mode.

What ``torch.library.register_autograd`` makes goes through the dispatcher and many frames of Python, forward and
backward, which shows where layers are small. An ``autograd.Function`` of the same two functions does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Of an operator: its gradient and what keeps the tensors for it, then the Function made of them.
_DIFFERENTIATED: dict[Any, tuple[Callable, Callable]] = {}
_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def register(library: torch.library.Library, name: str, differentiate: Callable, setup_context: Callable) -> None:
    """Makes an operator of the library differentiable; the two functions are as for ``register_autograd``.

    For `call`, its result must be a tensor or a tuple of tensors: of a list, an autograd.Function sees no tensors.
    """
    torch.library.register_autograd(f"{library.ns}::{name}", differentiate, setup_context=setup_context, lib=library)
    operator = getattr(getattr(torch.ops, library.ns), name).default
    _DIFFERENTIATED[operator] = differentiate, setup_context


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
    function = _FUNCTIONS.get(operator)
    if function is None:
        function = _FUNCTIONS[operator] = _function(operator, *_DIFFERENTIATED[operator])
    return function.apply(*args)


def _function(operator: Any, differentiate: Callable, setup_context: Callable) -> type[torch.autograd.Function]:
    def forward(ctx, *args):  # with setup_context as a method of its own, every call would look at its signature
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(operator.name().rpartition("::")[2], (torch.autograd.Function,), methods)
