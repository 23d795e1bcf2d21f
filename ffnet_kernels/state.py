"""What a program was made of, and whether it still is so.

Looked at in every call of an optimised model, so in bulk: a thousand dictionaries in tens of microseconds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from .capture import HOOKS

_version_of: Callable[[dict], int] | None
try:
    # Numbers that change whenever a dictionary does: torch.compile guards by them.
    from torch._C._dynamo.guards import dict_version as _version_of
except ImportError:
    _version_of = None

_REGISTRIES = ("_modules", "_parameters", "_buffers")


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class State:
    """Modules of a tree with all their attributes, registries, hooks and the methods of their classes.

    It holds on to what is below the root, not to the root, which may hold on to it.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        below = modules[1:]
        registries = [vars(m)[name] for m in modules for name in _REGISTRIES]
        containers = [m._modules for m in modules if isinstance(m, nn.Sequential | nn.ModuleList | nn.ModuleDict)]
        own = [value for m in modules for name, value in vars(m).items() if name not in _OF_EVERY_MODULE]
        own = list(_containers(own))
        self.lists = [value for value in own if isinstance(value, list)]
        self.list_contents = [list(value) for value in self.lists]
        self.modules = below
        self.dicts = [*map(vars, below), *filter(None, registries), *(d for d in containers if not d)]
        self.dicts += [value for value in own if isinstance(value, dict)]
        self.dicts.append(vars(F))  # which tools patch that count or rewrite
        self.contents = [_without_program(vars(root)), *map(dict, self.dicts)]
        self.versions = self._versions(root)
        self.kinds = [type(root), *map(type, below)]
        self.hooks = [vars(m)[name] for m in modules for name in HOOKS]
        classes = {cls for kind in set(self.kinds) for cls in kind.__mro__ if cls is not object}
        self.classes = [(vars(cls), _methods_of(vars(cls))) for cls in classes]
        self.methods = self._methods()
        self.touched = 0  # how often attributes were set to what they had been

    def is_current(self, root: nn.Module) -> bool:
        """Whether nothing has changed, and no hook waits."""
        versions = self._versions(root)
        if versions is None or versions != self.versions:
            if not self._unchanged(root):
                return False
            self.versions = versions
            self.touched += 1
        return (
            [type(root), *map(type, self.modules)] == self.kinds
            and not any(self.hooks)
            and self._same_lists()
            and self._methods() == self.methods
        )

    def _versions(self, root: nn.Module) -> list[int] | None:
        return None if _version_of is None else [_version_of(vars(root)), *map(_version_of, self.dicts)]

    def _unchanged(self, root: nn.Module) -> bool:
        try:
            return all(map(operator.eq, (_without_program(vars(root)), *self.dicts), self.contents))
        except Exception:  # of a comparison of whatever users keep in a module; of tensors, too
            return False

    def _same_lists(self) -> bool:
        try:
            return self.lists == self.list_contents
        except Exception:  # as above
            return False

    def _methods(self) -> list | None:
        try:
            return [(len(attributes), read(attributes)) for attributes, read in self.classes]
        except KeyError:  # one was deleted
            return None


def _methods_of(attributes: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """What reads the methods of a class, all at once, from its attributes."""
    names = [name for name, value in attributes.items() if callable(value)]
    return operator.itemgetter(*names, "__module__")


def _containers(values: Iterable[Any]) -> Iterator[dict | list]:
    """Dictionaries and lists among values, and in them."""
    for value in values:
        if isinstance(value, dict | list):
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value)


def _without_program(attributes: dict) -> dict:
    """Attributes of a root, which must not be held by what it holds itself."""
    return {name: value for name, value in attributes.items() if name != "_compiled_call_impl"}
