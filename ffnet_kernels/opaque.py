"""An operator that stands for a whole optimised module in the graphs of ``torch.compile``.

``torch.ops.ffnet_kernels_modules.run(x, module, ...)`` calls the module as eager code does, so that a compiled function
has the programs of `ffnet_kernels.optimize` in it, whatever backend compiles the rest. The modules are traced, too: for
the guards, and for the shape of the result; what is computed from them is not used.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

_library = torch.library.Library("ffnet_kernels_modules", "DEF")
# The module is known by its key. The shape and strides are those that tracing finds for the result. It must not be
# captured in a CUDA graph: the first call for each shape compares results, and so waits for them.
_library.define(
    "run(Tensor x, Tensor module, SymInt[] shape, SymInt[] stride) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)

_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def key_of(module: nn.Module) -> Tensor:
    """A new key of a module for `run`, which no other process has for another.

    It is a tensor, and so an input of graphs: models of one class share one.
    """
    number = secrets.randbits(63)
    _modules[number] = module
    with torch.inference_mode(False), _disable_current_modes():
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def may_stand_for(args: tuple, kwargs: dict, result: Any) -> bool:
    """Whether the operator can take a call's arguments and return its result; traced by torch.compile."""
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or len(args) != 1 or kwargs:
        return False
    x = args[0]
    if not (isinstance(x, Tensor) and isinstance(result, Tensor)) or x.device.type not in ("cpu", "cuda"):
        return False
    return result.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def drop_unused(graph: fx.Graph) -> None:
    """Removes what was traced, none of which is used, unless sizes are symbols, which may be.

    Backends would remove it from what they compile, but take hundreds of parameters as arguments in every call.
    """
    if any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in graph.nodes):
        return
    for node in reversed(graph.nodes):
        if node.op != "placeholder" and not node.users:
            graph.erase_node(node)


def _run(x: Tensor, module: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    called = _modules.get(int(module))
    if called is None:
        raise RuntimeError("this graph calls a module of another process, or one that is gone: compile the model again")
    result = called(x)
    if result.shape != torch.Size(shape):
        raise RuntimeError(f"{type(called).__name__} returned {list(result.shape)}, not {list(shape)} as when traced")
    if result.stride() == tuple(stride) and result.untyped_storage()._cdata != x.untyped_storage()._cdata:
        return result
    return x.new_empty_strided(shape, stride, dtype=result.dtype).copy_(result)


_library.impl("run", _run, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ffnet_kernels_modules::run", lambda x, module, shape, stride: x.new_empty_strided(shape, stride), lib=_library
)
