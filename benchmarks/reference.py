"""Operators in plain PyTorch, as the measured package has them: this commit's or, for `base`, an older one's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import ffnet_kernels
from ffnet_kernels.backends import reference


def checked(operator: str, arguments: dict[str, Any]) -> tuple:
    """Named arguments of a public function as its operator takes them."""
    if _is_old():
        return getattr(importlib.import_module("ffnet_kernels.checks"), operator)(**arguments)
    return ffnet_kernels.ops.OPERATORS[operator].defined.checked(**arguments)


def function(operator: str) -> Callable[..., Any]:
    """The operator of such arguments."""
    return getattr(reference, operator) if _is_old() else ffnet_kernels.ops.OPERATORS[operator].reference


def _is_old() -> bool:
    """Whether the package is of a commit that had the operators in a few modules and no registry."""
    return not hasattr(ffnet_kernels, "ops")
