"""Captures what a module computes as a graph, by running library code, never user code, on symbols.

Classes of PyTorch, torchvision, timm and ffnet are trusted: their ``forward`` has no effect but its result. It runs on
stand-ins of the modules, whose parameters are symbols and whose attributes are copies, so neither the model nor other
threads notice anything. A module of any other class, with a hook, or with a patched method ends the capture: its parent
then cannot become a program, but modules below it may.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

from . import autocast, kernels
from .shapes import LARGER, evaluate

#: Packages, or parts of packages, whose classes are trusted.
LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "ffnet.", "ffnet_kernels.")
_PLAIN_BASES = ("builtins", "abc", "typing")
#: Packages whose functions these may call: never a user's or a test's.
_HOMES = {
    *(sys.stdlib_module_names - {"unittest"}), "torch", "torchvision", "timm", "ffnet", "ffnet_kernels", "numpy",
    "PIL", "yaml", "huggingface_hub", "safetensors", "packaging", "typing_extensions", "requests", "tqdm",
}  # fmt: skip

#: Where nn.Module itself keeps what its compile() makes, and an optimised one its programs; copies and pickles leave it
#: out.
PLACE = "_compiled_call_impl"

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,)}


class NotCapturable(Exception):
    """Why a module cannot be a program."""


def capture(root: nn.Module, x: Tensor, grows: tuple[bool, bool] = (True, True)) -> fx.Graph:
    """Captures the graph of ``root(x)`` for maps like x, in the present mode of the modules.

    Parameters and buffers are ``get_attr`` nodes, whose ``meta["tensor"]`` is the tensor. ``meta["value"]`` of a node
    is what it is for x, without data, ``meta[LARGER]`` what it is for a larger map; ``meta["paths"]`` the modules it is
    from. Under autocast its casts are nodes, so that the graph is run without it.

    Args:
        root: the module.
        x: a map. Its number of dimensions and its dtype hold for the graph.
        grows: whether the graph is to hold for other numbers of images, and for other heights and widths. Where for
            neither, forward may decide by them.

    Raises:
        NotCapturable: with the reason.
    """
    kinds = {type(module) for _, module in named_modules(root)}
    classes = {cls for kind in filter(is_library, kinds) for cls in kind.__mro__ if cls is not object}
    for holder in (Tensor, *modules_of(classes)):
        refuse_foreign(holder, vars(holder))
    with _NoDraws():
        return _Capture(root, x, grows).graph


class _NoDraws(TorchFunctionMode):
    """Refuses random numbers that do not depend on a symbol, before they are drawn. (A dispatcher mode could tell by a
    tag, but would import torch.compile, which takes two seconds.)"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(function, "__name__", ""))
        # A mode calls PyTorch's functions within themselves, which not all decorators bear, such as torch.autocast's.
        if hasattr(function, "__wrapped__") and getattr(Tensor, name, None) is not function:
            raise NotCapturable(f"{name} is decorated")
        if name.rstrip("_") in _DRAWS:
            arguments = (*args, *(kwargs or {}).values())
            if not any(isinstance(a, fx.Proxy) or (isinstance(a, Tensor) and a.is_meta) for a in arguments):
                raise NotCapturable("it draws random numbers that do not depend on its map")
        return function(*args, **(kwargs or {}))


_DRAWS = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial", "rand_like",
    "randn_like", "randint_like", "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu",
    "native_dropout", "uniform", "random", "exponential", "cauchy", "log_normal", "geometric", "_standard_gamma",
    "_sample_dirichlet", "fractional_max_pool2d", "fractional_max_pool3d", "gumbel_softmax",
}  # fmt: skip


def modules_of(classes: Iterable[type]) -> list[Any]:
    """The modules of Python's in which the classes' methods, and what these call, look up functions: of PyTorch's the
    classes' own, ``torch`` and ``torch.nn.functional``; of other libraries all on the way."""
    names = dict.fromkeys(("torch", F.__name__, *(cls.__module__ for cls in classes)))
    waiting = list(names)
    while waiting:
        module = sys.modules.get(waiting.pop())
        if module is None or _home(module.__name__) in ("torch", "builtins"):
            continue
        for value in list(vars(module).values()):
            home = str(getattr(value, "__module__", None))
            if inspect.isfunction(value) and home not in names and _is_of_library(home):
                names[home] = None
                waiting.append(home)
    return [sys.modules[name] for name in names if name in sys.modules and name not in _PLAIN_BASES]


def refuse_foreign(holder: Any, attributes: Any) -> None:
    """Refuses Python modules and classes that were patched from outside: capture would run the patch."""
    for name, value in list(attributes.items()):  # torch.compile puts its own into modules, with two underscores
        if (holder is Tensor or not name.startswith("__")) and is_foreign(value):
            raise NotCapturable(f"{getattr(holder, '__name__', holder)}.{name} is not its own")


def refuse_other_containers(result: Any) -> None:
    """Refuses results in containers that a graph would turn into others, such as an OrderedDict into a dict."""
    if isinstance(result, tuple | list | dict):
        if type(result) not in (tuple, list, dict) and not hasattr(result, "_fields"):
            raise NotCapturable(f"its result is a {type(result).__name__}")
        for part in result.values() if isinstance(result, dict) else result:
            refuse_other_containers(part)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``root.named_modules()``, without calling a method of the modules."""
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = vars(module).get("_modules") or {}
        below = [(f"{path}.{name}".lstrip("."), child) for name, child in children.items() if child is not None]
        waiting += reversed(below)


@functools.cache
def _is_of_library(module: str) -> bool:
    return module.startswith(LIBRARIES)


def is_library(kind: type) -> bool:
    """Whether a module class and all its bases are of trusted packages."""
    return all(
        (cls.__module__ in _PLAIN_BASES and _home_of(cls) in _HOMES)
        or (_is_of_library(cls.__module__) and not any(is_foreign(value) for value in vars(cls).values()))
        for cls in kind.__mro__
    )


def is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def is_patched(module: nn.Module) -> bool:
    """Whether the module itself overrides what its class defines, or holds code from elsewhere."""
    kind = type(module)
    return any(
        name not in OF_EVERY_MODULE and (callable(getattr(kind, name, None)) or is_foreign(value))
        for name, value in vars(module).items()
    )


OF_EVERY_MODULE = frozenset((*vars(nn.Module()), PLACE))


def is_foreign(value: Any) -> bool:
    """Whether calling a value, or what it holds, would run code from outside the given packages.

    Decided by where the code is defined, not by the function's name, which a patch may copy.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = value if isinstance(value, type) else type(value)
        if type(value) in (list, tuple, set, frozenset):
            waiting += value
        elif type(value) in (dict, OrderedDict):
            waiting += value.values()
        elif inspect.isfunction(value):
            if _home(value.__globals__.get("__name__")) not in _HOMES:
                return True
            waiting += _closed_over(value)
        elif callable(value) or hasattr(kind, "__get__"):
            owner = None if kind is value else getattr(value, "__self__", None)  # of a bound method
            if inspect.ismethod(value) or isinstance(owner, type):
                kind = owner if isinstance(owner, type) else type(owner)
            if _home_of(kind) not in _HOMES:
                return True
            waiting += [] if isinstance(value, type) else _parts(value)
    return False


def _parts(value: Any) -> list[Any]:
    """What a wrapper of PyTorch or the standard library calls: partial, property, lru_cache, a bound method."""
    names = ("func", "args", "keywords", "fget", "fset", "fdel", "__func__")
    kept = vars(value).values() if type(value).__module__ == "functools" else ()
    return [*(getattr(value, name) for name in names if hasattr(type(value), name)), *kept]


def _closed_over(function: Any) -> list[Any]:
    """What a function refers to by its closure, or wraps."""
    found = [getattr(function, "__wrapped__", None)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # of one that is empty
            found.append(cell.cell_contents)
    return [part for part in found if callable(part)]


def _home(module: Any) -> str:
    return str(module).partition(".")[0]


def _home_of(kind: type) -> str:
    """Python calls what `exec` defines builtin, too, but makes its own types otherwise."""
    return "exec" if kind.__module__ == "builtins" and kind.__flags__ & _ON_THE_HEAP else _home(kind.__module__)


_ON_THE_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _copy_containers(value: Any) -> Any:
    """Copies lists and the like, so that what is put into them stays unseen; keys and elements of sets are not hashed,
    which could run a user's function."""
    if type(value) in (dict, OrderedDict):
        copy = value.copy()
        if all(type(key) in (str, int) for key in copy):
            for key, item in value.items():
                copy[key] = _copy_containers(item)
        return copy
    if type(value) is set:
        return value.copy()
    return list(map(_copy_containers, value)) if type(value) is list else value


class _Symbol(fx.Proxy):
    """A value of the graph. It answers whatever holds for all maps that the graph is for."""

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
        """Like fx's own, which imports half of torch to tell methods from functions."""
        symbols: list[_Symbol] = []
        fx.node.map_aggregate((args, kwargs), lambda a: symbols.append(a) if isinstance(a, _Symbol) else None)
        name = getattr(function, "__name__", "")
        is_method = getattr(Tensor, name, None) is function
        kind, target = ("call_method", name) if is_method else ("call_function", function)
        return symbols[0].tracer.create_proxy(kind, target, args, kwargs or {})


class _Foreign:
    """Stands in for a module of an untrusted class: calling it ends the capture."""

    def __init__(self, kind: type, refuse: Any) -> None:
        self.kind, self.refuse = kind, refuse

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # which isinstance asks, too
        return self.kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.refuse()

    def __getattr__(self, name: str) -> Any:
        return self.refuse()


class _Capture(fx.proxy.GraphAppendingTracer):
    def __init__(self, root: nn.Module, x: Tensor, grows: tuple[bool, bool]) -> None:
        super().__init__(fx.Graph())
        kept = (t for _, module in named_modules(root) for t in vars(module)["_parameters"].values())
        self.any_size = any(grows)
        self.device = next((t.device for t in kept if type(t) is nn.Parameter), x.device)
        self.stand_ins: dict[int, Any] = {}
        self.paths = {id(module): path for path, module in named_modules(root)}
        self.is_library: Any = functools.cache(is_library)
        self.inside: list[str] = []
        self.autocast, self.gradients = autocast.dtype(), _gradients()
        self.cast_nodes: dict[fx.Node, fx.Node] = {}
        symbol = self.create_proxy("placeholder", "x", (), {})
        symbol.node.meta["value"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        images, pixels = grows
        larger = [n if i == 1 else 2 * n if (pixels if i else images) else n for i, n in enumerate(x.shape)]
        symbol.node.meta[LARGER] = x.new_empty(larger, device="meta")
        try:
            result = self.stand_in(root)(symbol)
            refuse_other_containers(result)
            self.graph.output(self.create_arg(result))
        except NotCapturable:
            raise
        except Exception as error:  # library code may raise anything on symbols
            raise NotCapturable(f"{type(root).__name__} cannot run on symbols: {error}") from error
        finally:
            for stand_in in self.stand_ins.values():  # which refer to themselves, and to the model
                vars(stand_in).clear()
            self.stand_ins.clear()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        if kind.startswith("call") and autocast.dtype() != self.autocast:
            raise NotCapturable("it switches autocast by itself")
        if kind.startswith("call") and _gradients() != self.gradients:
            raise NotCapturable("it switches gradients by itself, or has a gradient of its own")
        if kind.startswith("call") and self.autocast is not None:
            args, kwargs = self.as_autocast(target, args, kwargs)
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["paths"] = [self.inside[-1]] if self.inside else []
        if kind.startswith("call"):
            with torch.no_grad(), _NoDraws():  # again, as a mode is off where it handles a call
                node.meta["value"] = evaluate(node, lambda other: other.meta["value"])
                node.meta[LARGER] = evaluate(node, lambda other: other.meta[LARGER])
        return node

    def as_autocast(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call as autocast would pass them on."""
        try:
            if not autocast.casts(target):
                return args, kwargs
        except ValueError as error:
            raise NotCapturable(str(error)) from None
        return fx.map_arg((args, kwargs), self.cast)

    def cast(self, node: fx.Node) -> fx.Node:
        value: Any = node.meta.get("value")
        if value is None:
            raise NotCapturable(f"autocast may cast {node}, whose dtype is not known")
        if not autocast.is_cast(value, self.autocast):
            return node
        if node not in self.cast_nodes:
            with self.graph.inserting_after(node):
                cast = self.create_node("call_method", "to", (node, self.autocast), {})
            self.cast_nodes[node] = cast
        return self.cast_nodes[node]

    def stand_in(self, module: nn.Module) -> Any:
        """An object with the module's class and attributes whose tensors are symbols and whose calls are routed
        here."""
        known = self.stand_ins.get(id(module))
        if known is not None:
            return known
        if not self.is_library(type(module)):  # creating or destroying one may run code of the class
            self.stand_ins[id(module)] = _Foreign(type(module), functools.partial(self.call, module, None))
            return self.stand_ins[id(module)]
        stand_in = object.__new__(type(module))
        self.stand_ins[id(module)] = stand_in
        attributes: dict[str, Any] = {name: _copy_containers(value) for name, value in vars(module).items()}
        for registry in ("_parameters", "_buffers"):
            attributes[registry] = {
                name: None if tensor is None else self.symbol(module, name, tensor)
                for name, tensor in attributes[registry].items()
            }
        attributes["_modules"] = {
            name: None if child is None else self.stand_in(child) for name, child in attributes["_modules"].items()
        }
        attributes[PLACE] = functools.partial(self.call, module, stand_in)
        stand_in.__dict__.update(attributes)
        return stand_in

    def symbol(self, module: nn.Module, name: str, tensor: Tensor) -> fx.Proxy:
        symbol = self.constant(f"{self.paths[id(module)]}.{name}".lstrip("."), tensor)
        if name in ("running_mean", "running_var"):  # batch normalisation updates these without a new version
            symbol.node.meta["counted_by"] = module._buffers.get("num_batches_tracked")
        return symbol

    def create_arg(self, a: Any) -> Any:
        if type(a) in (
            Tensor,
            nn.Parameter,
        ):  # a tensor that a module keeps outside its registries, such as in a cache
            return self.constant(f"constant_{len(self.graph.nodes)}", a).node
        return super().create_arg(a)

    def constant(self, name: str, tensor: Tensor) -> fx.Proxy:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise NotCapturable(f"{name} is a {type(tensor).__name__}, which may compute in its own way")
        symbol = self.create_proxy("get_attr", name, (), {})
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        symbol.node.meta.update({"tensor": tensor, "value": value, LARGER: value})
        return symbol

    def call(self, module: nn.Module, stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        """What nn.Module's ``__call__`` does, for a stand-in."""
        kind: Any = type(module)
        where = f"{self.paths[id(module)] or 'the model'} ({kind.__name__})"
        if not self.is_library(kind):
            raise NotCapturable(f"{where} is of a class whose code may do more than its result shows")
        if is_hooked(module):
            raise NotCapturable(f"{where} has a hook")
        if is_patched(module):
            raise NotCapturable(f"{where} has a patched method")
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            raise NotCapturable(f"{where} is called under torch.utils.checkpoint")
        compiled = vars(module).get(PLACE)
        if compiled is not None and not getattr(compiled, "is_program", False):
            raise NotCapturable(f"{where} is compiled by torch.compile")
        self.inside.append(self.paths[id(module)])
        if kind in _NORMS and len(args) == 1 and not kwargs and _norm_code(kind) == _NORM_CODE[kind]:
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


def _norm_code(kind: Any) -> tuple:
    return kind.forward, kind._check_input_dim, F.batch_norm, torch.batch_norm


_NORM_CODE = {kind: _norm_code(kind) for kind in _NORMS}


def _gradients() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def globally_hooked() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
