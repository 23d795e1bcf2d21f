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

import torch  # before any library: they resolve their symbols in the torch that is loaded

CPU_LIBRARY = "libffnet_kernels_cpu.so"
CUDA_LIBRARY = "libffnet_kernels_cuda.so"


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
        return {"missing": {CPU_LIBRARY: reason, CUDA_LIBRARY: reason}}


@functools.cache
def cpu_library_error() -> str | None:
    """Loads the CPU library on the first call; None where that worked, else the reason."""
    reason = _load(library_dir() / CPU_LIBRARY)
    if reason is not None:
        return reason
    module = helper()
    try:
        if module is not None:
            module.isa()  # refuses a wrong FFNET_KERNELS_ISA here, not in the first call
    except ValueError as error:
        warnings.warn(f"ffnet_kernels runs without its CPU kernels: {error}", RuntimeWarning, stacklevel=2)
        return str(error)
    return None


@functools.cache
def cuda_library_error() -> str | None:
    """The same of the CUDA library, which takes a torch with CUDA; a GPU is not needed to load it."""
    host = cuda_host_library()
    if host is not None:
        return _load(host)
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return _load(library_dir() / CUDA_LIBRARY)


@functools.cache
def cuda_device_error(index: int) -> str | None:
    """Why the loaded CUDA library has no code for a device, or None."""
    library = ctypes.CDLL(str(cuda_host_library() or library_dir() / CUDA_LIBRARY))
    reason = ctypes.create_string_buffer(500)
    failed = library.ffnet_cuda_check_device(ctypes.c_int(index), reason, ctypes.c_size_t(len(reason)))
    return reason.value.decode() if failed else None


def cuda_host_library() -> Path | None:
    """The CUDA kernels compiled for the processor, for tests: where ``FFNET_KERNELS_CUDA_HOST`` says."""
    path = os.environ.get("FFNET_KERNELS_CUDA_HOST")
    return Path(path) if path else None


def _load(path: Path) -> str | None:
    if not path.exists():
        return build_record().get("missing", {}).get(path.name, f"{path} is missing")
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
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
