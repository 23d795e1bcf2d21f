"""Prefetches memory.

A guard inspects about a thousand small objects, which a model's maps and weights have meanwhile evicted from the
caches. One cache miss after the other takes several times as long as reading them from the cache.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from . import native

_OBJECT = 1  # cache lines: the head, where its type and the size and version of a dictionary are
_TENSOR = 4  # a TensorImpl
_STORAGE = 2  # a StorageImpl


class Prefetch:
    """Prefetches objects; these may have been freed, as nothing is read."""

    calls: Sequence[Callable[[], None]] = ()

    def __init__(self, objects: Iterable[object] = (), tensors: Sequence[Tensor] = (), storages: Iterable[int] = ()):
        helper = native.helper()
        if helper is None:
            return
        places = (map(id, [*objects, *tensors]), (tensor._cdata for tensor in tensors), storages)
        self.calls = [
            functools.partial(helper.fetch, addresses, lines)
            for addresses, lines in zip((array("Q", of) for of in places), (_OBJECT, _TENSOR, _STORAGE), strict=True)
            if addresses
        ]

    def __call__(self) -> None:
        for call in self.calls:
            call()
