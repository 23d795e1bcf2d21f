"""Records the state that a program was made of, and checks whether it has changed.

The check runs in every call of an optimised model, so it works in bulk: a thousand dictionaries in tens of
microseconds. It runs no user code: objects are compared by identity, never by their own ``==``.
"""

from __future__ import annotations

import gc
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import HOOKS, OF_EVERY_MODULE, PLACE, modules_of, named_modules
from .prefetch import Prefetch

_version_of: Callable[[dict], int] | None
try:
    # Version numbers that change whenever a dictionary does, as used by torch.compile's guards.
    from torch._C._dynamo.guards import dict_version as _version_of
except ImportError:
    _version_of = None

_CONTAINERS_OF_MODULES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_REGISTRIES = ("_modules", "_parameters", "_buffers")


class Contents(NamedTuple):
    """The contents of a dictionary, in order."""

    of: dict
    names: tuple
    values: tuple

    @classmethod
    def taken_of(cls, of: dict) -> Contents:
        return cls(of, tuple(of), tuple(of.values()))

    def are_same(self) -> bool:
        now = self.of
        return (
            len(now) == len(self.names)
            and all(map(is_, now, self.names))
            and (all(map(is_, now.values(), self.values)) or all(map(is_same, now.values(), self.values)))
        )


class Globals(NamedTuple):
    """The globals of a Python module that its functions may call; additions do not matter."""

    of: dict
    names: tuple
    values: tuple

    def are_same(self) -> bool:
        return all(map(is_, map(self.of.get, self.names), self.values))


class State:
    """A tree of modules with all attributes, registries and hooks, and the methods of their classes.

    It references everything below the root, but not the root, which may reference it.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = [module for _, module in named_modules(root)]
        below = modules[1:]
        registries = [vars(m)[name] for m in modules for name in _REGISTRIES]
        containers = [vars(m)["_modules"] for m in modules if isinstance(m, _CONTAINERS_OF_MODULES)]
        own = [value for m in modules for name, value in vars(m).items() if name not in OF_EVERY_MODULE]
        own = list(_containers(own))
        self.lists = [value for value in own if isinstance(value, list)]
        self.items = list(chain.from_iterable(self.lists))
        self.lengths = list(map(len, self.lists))
        self.modules = below
        dicts = [*map(vars, below), *filter(None, registries), *(d for d in containers if not d)]
        dicts += [value for value in own if isinstance(value, dict)]
        self.kinds = [type(root), *map(type, below)]
        classes = {cls for kind in set(self.kinds) for cls in kind.__mro__ if cls is not object}
        self.contents: list[Contents | Globals] = list(map(Contents.taken_of, dicts))
        self.contents += [_globals_of(vars(module)) for module in modules_of(classes)]
        self.dicts = [known.of for known in self.contents]
        self.root = Contents.taken_of(_without_program(vars(root)))
        self.versions = self._versions(root)
        self.hooks = [vars(m)[name] for m in modules for name in HOOKS]
        self.classes = [(vars(cls), _methods_of(vars(cls))) for cls in classes]
        self.classes.append((vars(Tensor), _methods_of(vars(Tensor), _TENSOR_METHODS)))
        self.methods = self._methods()
        # A class's visible dictionary is a read-only proxy without a version; the one behind it has a version.
        self.class_dicts = [gc.get_referents(attributes)[0] for attributes, _ in self.classes]
        self.class_versions = _versions(self.class_dicts)
        self.overridden = _overridden()
        self.touched = 0  # how often attributes were set to the value they already had
        self.prefetch = Prefetch([*self.dicts, *self.hooks, *self.class_dicts, *below])

    def is_current(self, root: nn.Module) -> bool:
        """Whether nothing has changed, and no hook is registered."""
        self.prefetch()
        versions = self._versions(root)
        if versions is None or versions != self.versions:
            root_now = self.root._replace(of=_without_program(vars(root)))
            if not (root_now.are_same() and all(known.are_same() for known in self.contents)):
                return False
            self.versions = versions
            self.touched += 1
        return (
            all(map(is_, map(type, self.modules), self.kinds[1:]))
            and type(root) is self.kinds[0]
            and not any(self.hooks)
            and self._same_lists()
            and self._same_methods()
        )

    def _versions(self, root: nn.Module) -> list[int] | None:
        return _versions([vars(root), *self.dicts])

    def _same_methods(self) -> bool:
        versions = _versions(self.class_dicts)
        if versions is None or versions != self.class_versions:
            if self._methods() != self.methods and not self._only_more_of_tensors():
                return False
            self.class_versions = versions
        return True

    def _same_lists(self) -> bool:
        if not self.lists:
            return True
        items = list(chain.from_iterable(self.lists))
        return list(map(len, self.lists)) == self.lengths and all(map(is_same, items, self.items))

    def _only_more_of_tensors(self) -> bool:
        """Whether the only difference is that Tensor has new attributes, as when parts of PyTorch are imported."""
        now, before = self._methods(), self.methods
        if now is None or before is None or now[:-1] != before[:-1] or now[-1][1] != before[-1][1]:
            return False
        if _overridden() != self.overridden:
            return False
        self.methods = now
        return True

    def _methods(self) -> list | None:
        try:
            return [(len(attributes), read(attributes)) for attributes, read in self.classes]
        except KeyError:  # one was deleted
            return None


def _versions(dicts: list[dict]) -> list[int] | None:
    """The versions of dictionaries; None if they have none."""
    return None if _version_of is None else list(map(_version_of, dicts))


def _overridden() -> set[str]:
    """Methods implemented in C++ that Tensor overrides in Python."""
    return vars(Tensor).keys() & _OF_TENSORS_IN_CPP


_OF_TENSORS_IN_CPP = frozenset(dir(torch._C.TensorBase))


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are the same object, or equal values of a plain type."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in (int, float, complex, str, bytes):
        return a == b
    return kind in (tuple, torch.Size) and len(a) == len(b) and all(map(is_same, a, b))


def _globals_of(namespace: dict) -> Globals:
    # Of torch's functions, those on tensors: others are replaced when torch.compile is imported.
    known = _OF_TENSORS if namespace is vars(torch) else namespace
    names = tuple(name for name in known if callable(namespace.get(name)) and not name.startswith("__"))
    return Globals(namespace, names, tuple(map(namespace.get, names)))


_OF_TENSORS = (*dir(torch._C._VariableFunctions), *torch.functional.__all__)


#: Of Tensor's methods, those that models call; checking all would take as long as a hundred modules.
_TENSOR_METHODS = ("split", "norm", "__rsub__", "__rpow__", "__rdiv__", "__rmatmul__", "__len__", "unflatten")


def _methods_of(attributes: Mapping[str, Any], names: Iterable[str] | None = None) -> Callable:
    """A getter that reads the methods and properties of a class from its attributes, all at once."""
    if names is None:
        names = [name for name, value in attributes.items() if callable(value) or hasattr(type(value), "__get__")]
    return operator.itemgetter(*(name for name in names if name in attributes), "__module__")


_CONTAINERS = (list, dict, OrderedDict, defaultdict)


def _containers(values: Iterable[Any]) -> Iterator[dict | list]:
    """Dictionaries and lists among values, nested ones included."""
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += value if type(value) is list else value.values()


def _without_program(attributes: dict) -> dict:
    """Attributes of a root except its own program, which must not reference itself."""
    return {name: value for name, value in attributes.items() if name != PLACE}
