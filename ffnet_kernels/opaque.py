"""An operator that stands for a whole optimised module in the graphs of ``torch.compile``.

``torch.ops.ffnet_kernels_modules.run(x, module, ...)`` calls the module as eager code does, so that a compiled function
has the programs of `ffnet_kernels.optimize` in it, whatever backend compiles the rest. The modules are traced, too: for
the guards, and for the shape of the result; what is computed from them is not used, and no backend keeps it.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import globally_hooked, is_hooked, is_library, is_patched, named_modules

_library = torch.library.Library("ffnet_kernels_modules", "DEF")
# The shape and strides are those that tracing finds for the result. It must not be captured in a CUDA graph: the first
# call for each shape compares results, and so waits for them.
_library.define(
    "run(Tensor x, str module, SymInt[] shape, SymInt[] stride) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)

_modules: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def name_of(module: nn.Module) -> str:
    """A new name for a module, by which graphs refer to it: one that no other process has for another."""
    name = f"{type(module).__name__}-{secrets.token_hex(8)}"
    _modules[name] = module
    return name


def in_graph(name: str, x: Any, result: Any) -> Any:
    """What torch.compile is to return for a call of a module: its result from the operator, or as it was traced.

    Args:
        name: the module's.
        x: what it is called with.
        result: of its modules, as traced.
    """
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or not isinstance(x, Tensor):
        return result
    if not isinstance(result, Tensor) or result.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        return result
    if not _has_no_effects(name):
        return result
    return torch.ops.ffnet_kernels_modules.run(x, name, result.shape, result.stride())


def _has_no_effects(name: str) -> bool:
    """Whether a call of a module does nothing but compute, and may be traced besides."""
    modules = [module for _, module in named_modules(_modules[name])]
    return not globally_hooked() and not any(
        module.training or is_hooked(module) or is_patched(module) or not is_library(type(module)) for module in modules
    )


# As torch.compiler.assume_constant_result does, which would import all of torch.compile.
_has_no_effects._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run(x: Tensor, name: str, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    module = _modules.get(name)
    if module is None:
        raise RuntimeError(f"{name} is a module of another process, or gone: compile the model again")
    result = module(x)
    if result.shape != torch.Size(shape):
        raise RuntimeError(f"{name} returns {list(result.shape)} instead of {list(shape)}: it changed when it was run")
    if result.stride() == tuple(stride) and result.untyped_storage()._cdata != x.untyped_storage()._cdata:
        return result
    return x.new_empty_strided(shape, stride, dtype=result.dtype).copy_(result)


_library.impl("run", _run, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ffnet_kernels_modules::run", lambda x, name, shape, stride: x.new_empty_strided(shape, stride), lib=_library
)
