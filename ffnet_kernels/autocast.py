"""Makes the casts of ``torch.autocast`` explicit nodes of a graph, which then runs without autocast.

On the CPU autocast casts the arguments of convolutions and matrix products to its dtype, those of some functions to
float32, and leaves all others alone: those follow type promotion.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Dtypes that a program may be cast to.
DTYPES = (torch.bfloat16,)

#: Functions that autocast runs in its own dtype.
LOWER = frozenset((
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    F.linear, F.scaled_dot_product_attention, operator.matmul, torch.matmul, torch.bmm, torch.mm, torch.addmm,
    torch.baddbmm, "matmul", "bmm", "mm", "addmm", "baddbmm",
))  # fmt: skip
#: Functions that it changes in another way, or only in parts. (`cat` and `stack` promote types by themselves.)
OTHER = frozenset(("einsum", "bilinear", "local_response_norm", "prelu", "pad"))


def dtype() -> torch.dtype | None:
    """The dtype that autocast casts to on the CPU; None if it is off there."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def is_known(x: Tensor) -> bool:
    """Whether programs can reproduce the present autocast mode, if any, for a map."""
    if not torch.is_autocast_enabled(x.device.type) and not torch.is_autocast_enabled("cpu"):
        return True
    return x.is_cpu and torch.get_autocast_dtype("cpu") in DTYPES and x.dtype in (torch.float32, *DTYPES)


def casts(target: Any) -> bool:
    """Whether the floating-point arguments of a function, or of a method of that name, are cast.

    Raises:
        ValueError: if autocast treats it in another way.
    """
    if target in LOWER:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name in OTHER:
        raise ValueError(f"autocast changes what {name} computes with")
    return False


def is_cast(value: Any, to: torch.dtype | None) -> bool:
    """Whether autocast casts a value, where it casts."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in (to, torch.float64)


class SpelledOut:
    """Runs a graph whose casts are explicit with CPU autocast turned off."""

    def __enter__(self) -> None:
        torch.set_autocast_enabled("cpu", False)

    def __exit__(self, *_: Any) -> None:
        torch.set_autocast_enabled("cpu", True)
