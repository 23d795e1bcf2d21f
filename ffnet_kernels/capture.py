"""What a module computes, as a graph: found by running library code on symbols, never user code.

Classes of PyTorch, torchvision, timm and ffnet are taken for what they are: their ``forward`` has no effect but its
result. It runs on stand-ins of the modules, whose parameters are symbols and whose attributes are copies, so neither
the model nor other threads see anything of it. A module of any other class, with a hook, or with a patched method ends
the capture: then its parent cannot be a program, though the modules below it may.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from . import kernels
from .shapes import evaluate

#: Packages, or parts of one, whose classes are taken for what they are.
LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "ffnet.", "ffnet_kernels.")
_PLAIN_BASES = ("builtins", "abc", "typing")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,)}


class NotCapturable(Exception):
    """Why a module cannot be a program."""


def capture(root: nn.Module, x: Tensor, *, any_size: bool = True) -> fx.Graph:
    """The graph of ``root(x)`` for maps like x, in the present mode of the modules.

    Parameters and buffers are ``get_attr`` nodes, whose ``meta["tensor"]`` is the tensor. ``meta["value"]`` of a node
    is what it is for x, without data; ``meta["paths"]`` the modules it is from.

    Args:
        root: the module.
        x: a map. Its number of dimensions and its dtype hold for the graph.
        any_size: whether the graph is to hold for other sizes, too; else forward may decide by them.

    Raises:
        NotCapturable: with the reason.
    """
    for name, function in vars(F).items():
        home = str(getattr(function, "__module__", ""))
        if callable(function) and not isinstance(function, type) and not home.startswith(("torch", "typing")):
            raise NotCapturable(f"torch.nn.functional.{name} is not PyTorch's own")
    before = _random_states(x.device)
    graph = _Capture(root, x, any_size).graph
    if not all(map(torch.equal, before, _random_states(x.device))):
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state(before[1], x.device)
        raise NotCapturable("it draws random numbers that do not depend on its map")
    return graph


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def is_library(kind: type) -> bool:
    """Whether a class of modules, with all that it is derived from, is one of those taken for what they are."""
    return all(
        cls.__module__ in _PLAIN_BASES
        or (cls.__module__.startswith(LIBRARIES) and not any(map(_is_foreign, vars(cls).values())))
        for cls in kind.__mro__
    )


def is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def is_patched(module: nn.Module) -> bool:
    """Whether something that the class defines, or code from elsewhere, was put onto the module itself."""
    kind = type(module)
    return any(
        name != "_compiled_call_impl" and (callable(getattr(kind, name, None)) or _is_foreign(value))
        for name, value in vars(module).items()
    )


def _is_foreign(value: Any) -> bool:
    """Whether calling a value would run user code."""
    while isinstance(value, functools.partial | property):
        value = value.func if isinstance(value, functools.partial) else value.fget
    if inspect.isfunction(value) or inspect.ismethod(value):
        return not str(value.__module__).startswith((*LIBRARIES, "torch."))
    return False


def _copy_containers(value: Any) -> Any:
    """Lists and the like copied, so that nobody sees what is put into them."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copy_containers(item)) for key, item in value.items())
    return type(value)(map(_copy_containers, value)) if type(value) in (list, set) else value


class _Symbol(fx.Proxy):
    """A value of the graph. What holds for every map that the graph is for, it tells as it is."""

    tracer: _Capture

    @property
    def value(self) -> Any:
        return self.node.meta.get("value")

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if isinstance(value, Tensor):
            if name in ("ndim", "dtype"):
                return getattr(value, name)
            if name == "device":
                return self.tracer.device
            if name == "shape" and not self.tracer.any_size:
                return value.shape
        return super().__getattr__(name)

    def dim(self) -> Any:
        return self.value.dim() if isinstance(self.value, Tensor) else super().__getattr__("dim")()

    def size(self, *dim: int) -> Any:
        if isinstance(self.value, Tensor) and not self.tracer.any_size:
            return self.value.size(*dim)
        return super().__getattr__("size")(*dim)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As fx's own, which imports half of torch to tell methods from functions."""
        symbols: list[_Symbol] = []
        fx.node.map_aggregate((args, kwargs), lambda a: symbols.append(a) if isinstance(a, _Symbol) else None)
        name = getattr(function, "__name__", "")
        is_method = getattr(Tensor, name, None) is function
        kind, target = ("call_method", name) if is_method else ("call_function", function)
        return symbols[0].tracer.create_proxy(kind, target, args, kwargs or {})


class _Capture(fx.proxy.GraphAppendingTracer):
    def __init__(self, root: nn.Module, x: Tensor, any_size: bool) -> None:
        super().__init__(fx.Graph())
        self.any_size, self.device = any_size, next((t.device for t in root.parameters()), x.device)
        self.stand_ins: dict[nn.Module, nn.Module] = {}
        self.paths = {module: path for path, module in root.named_modules()}
        self.inside: list[str] = []
        symbol = self.create_proxy("placeholder", "x", (), {})
        symbol.node.meta["value"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        try:
            result = self.stand_in(root)(symbol)
            self.graph.output(self.create_arg(result))
        except NotCapturable:
            raise
        except Exception as error:  # whatever library code raises on symbols
            raise NotCapturable(f"{type(root).__name__} cannot run on symbols: {error}") from error
        finally:
            for stand_in in self.stand_ins.values():  # which refer to themselves, and to the model
                stand_in.__dict__.clear()
            self.stand_ins.clear()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["paths"] = [self.inside[-1]] if self.inside else []
        if kind.startswith("call"):
            with torch.no_grad():
                node.meta["value"] = evaluate(node, lambda other: other.meta["value"])
        return node

    def stand_in(self, module: nn.Module) -> nn.Module:
        """An object of the module's class and attributes whose tensors are symbols and whose calls come here."""
        known = self.stand_ins.get(module)
        if known is not None:
            return known
        stand_in = object.__new__(type(module))
        self.stand_ins[module] = stand_in
        attributes: dict[str, Any] = {name: _copy_containers(value) for name, value in vars(module).items()}
        for registry in ("_parameters", "_buffers"):
            attributes[registry] = {
                name: None if tensor is None else self.symbol(module, name, tensor)
                for name, tensor in attributes[registry].items()
            }
        attributes["_modules"] = {
            name: None if child is None else self.stand_in(child) for name, child in attributes["_modules"].items()
        }
        attributes["_compiled_call_impl"] = functools.partial(self.call, module, stand_in)
        stand_in.__dict__.update(attributes)
        return stand_in

    def symbol(self, module: nn.Module, name: str, tensor: Tensor) -> fx.Proxy:
        symbol = self.constant(f"{self.paths[module]}.{name}".lstrip("."), tensor)
        if name in ("running_mean", "running_var"):  # which batch normalisation moves without PyTorch's counting it
            symbol.node.meta["counted_by"] = module._buffers.get("num_batches_tracked")
        return symbol

    def create_arg(self, a: Any) -> Any:
        if type(a) in (
            Tensor,
            nn.Parameter,
        ):  # one that a module keeps elsewhere than in its registries, such as in a cache
            return self.constant(f"constant_{len(self.graph.nodes)}", a).node
        return super().create_arg(a)

    def constant(self, name: str, tensor: Tensor) -> fx.Proxy:
        symbol = self.create_proxy("get_attr", name, (), {})
        symbol.node.meta.update(tensor=tensor, value=torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        return symbol

    def call(self, module: nn.Module, stand_in: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What nn.Module's ``__call__`` does on a stand-in."""
        kind: Any = type(module)
        where = f"{self.paths[module] or 'the model'} ({kind.__name__})"
        if not is_library(kind):
            raise NotCapturable(f"{where} is of a class whose code may do more than its result shows")
        if is_hooked(module):
            raise NotCapturable(f"{where} has a hook")
        if is_patched(module):
            raise NotCapturable(f"{where} has a patched method")
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            raise NotCapturable(f"{where} is called under torch.utils.checkpoint")
        if module._compiled_call_impl is not None and not getattr(module._compiled_call_impl, "is_program", False):
            raise NotCapturable(f"{where} is compiled by torch.compile")
        self.inside.append(self.paths[module])
        if kind in _NORMS and len(args) == 1 and not kwargs:
            result = self.batch_norm(module, stand_in, args[0])
        else:
            result = kind.forward(stand_in, *args, **kwargs)
        self.inside.pop()
        return result

    def batch_norm(self, module: Any, stand_in: Any, x: Any) -> Any:
        args = (x, stand_in.running_mean, stand_in.running_var, stand_in.weight, stand_in.bias)
        dimensions = _NORMS[type(module)]
        if not module.training and module.running_mean is not None and module.running_var is not None:
            return self.create_proxy("call_function", kernels.batch_norm, (*args, module.eps, dimensions), {})
        is_tracked = module.training and module.track_running_stats
        tracked = (stand_in.num_batches_tracked, module.momentum) if is_tracked else (None, None)
        if not is_tracked:
            args = (x, None, None, stand_in.weight, stand_in.bias)
        return self.create_proxy("call_function", kernels.batch_norm_training, (*args, *tracked, module.eps), {})


def globally_hooked() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
