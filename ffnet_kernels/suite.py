"""Passes commands on to the benchmark suite, which depends on this package: the folder ``benchmarks`` of a checkout,
installed as ``ffnet_benchmarks``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def package() -> str:
    """The suite's module name: ``benchmarks`` if this package is in a checkout, never another folder of that name."""
    own = Path(__file__).resolve().parents[1] / "benchmarks" / "__init__.py"
    found = importlib.util.find_spec("benchmarks")
    here = found is not None and found.origin is not None and Path(found.origin).resolve() == own
    return "benchmarks" if here else "ffnet_benchmarks"


def run(program: str, arguments: Sequence[str], *, may_restart: bool) -> int:
    """Runs a command of the suite, for which a user wrote `program`, and returns its exit code; 2, with one line on
    stderr, if something is not installed.

    A command line may be restarted with heap settings suited to measuring; a caller in Python must not be.
    """
    name = package()
    try:
        if may_restart:
            importlib.import_module(f"{name}.memory").restart_with_plain_heap()
        return importlib.import_module(f"{name}.__main__").main(list(arguments), program)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in (name, "ffnet", "ffnet_kernels"):
            raise
        print(f"{program}: {error} (pip install 'ffnet-kernels[demo]' brings what it needs)", file=sys.stderr)
        return 2


def interruptible(program: str, main: Callable[[], int]) -> int:
    """Returns what `main` returns; after Ctrl-C prints one line on stderr and returns 130, as shells do."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
