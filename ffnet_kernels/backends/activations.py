"""The activations that can be fused behind a convolution: their PyTorch functions, and the calls that are recognised as
each.

Each is in `ACTIVATE`, in `ACTIVATE_BACKWARD` and, so that programs find it, in `name_of`; csrc/activations.h lists
those of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,  # with PyTorch's default negative slope only
}
#: Their names, as operators accept them.
ACTIVATIONS = tuple(ACTIVATE)

_aten = torch.ops.aten
#: The gradient of each for (incoming gradient, x), as ``aten`` operators that have derivatives themselves.
ACTIVATE_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, x: grad,
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0, 6),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": lambda grad, x: _silu_backward(grad, x),
    "hardswish": lambda grad, x: _aten.hardswish_backward(grad, x),
    "hardsigmoid": lambda grad, x: _aten.hardtanh_backward(grad / 6, x, -3, 3),
    "leaky_relu": lambda grad, x: _aten.leaky_relu_backward(grad, x, 0.01, False),
}


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:  # aten::silu_backward has no derivative
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid * (1 + x * (1 - sigmoid)))


_NAMED: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
}  # fmt: skip


def name_of(target: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """The activation that a call of a function, or of a method by name, computes; `None` if it is none of ours."""

    def argument(place: int, name: str, default: Any) -> Any:
        return args[place] if len(args) > place else kwargs.get(name, default)

    if target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(0, "approximate", "none"))
    if target is F.hardtanh:
        return "relu6" if (argument(0, "min_val", -1), argument(1, "max_val", 1)) == (0, 6) else None
    if target is F.leaky_relu:
        return "leaky_relu" if argument(0, "negative_slope", 0.01) == 0.01 else None
    return _NAMED.get(target)
