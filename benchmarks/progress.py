"""Progress on stderr: tqdm where it is installed and someone is watching, else nothing."""

from __future__ import annotations

import contextlib
from typing import Protocol


class Bar(Protocol):
    def update(self, steps: int = 1) -> object: ...
    def set_description_str(self, text: str) -> object: ...


class _Silent:
    def update(self, steps: int = 1) -> None:
        pass

    def set_description_str(self, text: str) -> None:
        pass


INTERRUPTED = 130  # as shells report a process that Ctrl-C ended
SILENT: Bar = _Silent()


def bar(total: int, text: str, *, leave: bool = False) -> contextlib.AbstractContextManager[Bar]:
    """A context manager that gives a bar of ``total`` steps."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(SILENT)
    return tqdm(total=total, desc=text, leave=leave, disable=None)
