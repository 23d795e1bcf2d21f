"""Loads the native libraries once, and remembers why where that is not possible."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (the libraries resolve their symbols in the torch that is loaded)

CPU_LIBRARY = "libffnet_kernels_cpu.so"


def library_dir() -> Path:
    """The folder of the native libraries: the package's own, or that of ``FFNET_KERNELS_LIBRARY_DIR``."""
    return Path(os.environ.get("FFNET_KERNELS_LIBRARY_DIR") or Path(__file__).parent / "lib")


@functools.cache
def build_record() -> dict:
    """How the libraries were built (compiler, flags, instruction sets, torch), or why they are missing."""
    try:
        return json.loads((library_dir() / "build_record.json").read_text())
    except (OSError, ValueError):
        reason = f"nothing was built into {library_dir()} (pip install --no-build-isolation . builds)"
        return {"missing": {CPU_LIBRARY: reason}}


@functools.cache
def cpu_library_error() -> str | None:
    """Loads the CPU library on the first call; None where that worked, else the reason."""
    path = library_dir() / CPU_LIBRARY
    if not path.exists():
        return build_record().get("missing", {}).get(CPU_LIBRARY, f"{path} is missing")
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    module = helper()
    try:
        if module is not None:
            module.isa()  # refuses a wrong FFNET_KERNELS_ISA here, not in the first call
    except ValueError as error:
        warnings.warn(f"ffnet_kernels runs without its CPU kernels: {error}", RuntimeWarning, stacklevel=2)
        return str(error)
    return None


@functools.cache
def helper() -> ModuleType | None:
    """The pybind11 helper (instruction sets), or None: nothing but information and ``select_isa`` depends on it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = library_dir() / f"_native{suffix}"
        if path.exists():
            spec = importlib.util.spec_from_file_location("ffnet_kernels._native", path)
            assert spec is not None
            assert spec.loader is not None
            try:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            except ImportError:
                return None
            return module
    return None
