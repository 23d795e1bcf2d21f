"""Hands a command to the benchmark suite, which lies above this package: the folder ``benchmarks`` of a checkout,
installed as ``ffnet_benchmarks``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def package() -> str:
    """The suite's name: that of the checkout where this package is in one, never another folder of that name."""
    own = Path(__file__).resolve().parents[1] / "benchmarks" / "__init__.py"
    found = importlib.util.find_spec("benchmarks")
    here = found is not None and found.origin is not None and Path(found.origin).resolve() == own
    return "benchmarks" if here else "ffnet_benchmarks"


def run(program: str, arguments: Sequence[str], *, may_restart: bool) -> int:
    """The suite's answer to a command and its options; 2 with one line on stderr where something is not installed.

    A command line may be started again with a heap that is fit for measuring; a caller in Python must not be.
    """
    name = package()
    try:
        if may_restart:
            importlib.import_module(f"{name}.memory").restart_with_plain_heap()
        return importlib.import_module(f"{name}.__main__").main(list(arguments))
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in (name, "ffnet", "ffnet_kernels"):
            raise
        print(f"{program}: {error} (pip install 'ffnet-kernels[demo]' brings what it needs)", file=sys.stderr)
        return 2


def interruptible(program: str, main: Callable[[], int]) -> int:
    """What `main` returns; after Ctrl-C one line on stderr, and what shells report of such a process."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
