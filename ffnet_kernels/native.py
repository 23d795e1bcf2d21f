"""Loads the native libraries once, and remembers why if that fails."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch  # before any library, as they resolve their symbols in the torch that is loaded

CPU_LIBRARY = "libffnet_kernels_cpu.so"
CUDA_LIBRARY = "libffnet_kernels_cuda.so"

#: Called with the name of the instruction set in use whenever that may have changed.
when_isa_changes: list[Callable[[str], object]] = []


def library_dir() -> Path:
    """The folder of the native libraries: the package's own, or ``FFNET_KERNELS_LIBRARY_DIR``."""
    return Path(os.environ.get("FFNET_KERNELS_LIBRARY_DIR") or Path(__file__).parent / "lib")


@functools.cache
def build_record() -> dict:
    """How the libraries were built (compiler, flags, instruction sets, torch), or why they are missing."""
    try:
        record = json.loads((library_dir() / "build_record.json").read_text())
        if isinstance(record, dict):
            return record
        raise ValueError("no build record")
    except (OSError, ValueError):
        reason = f"nothing was built into {library_dir()} (pip install --no-build-isolation . builds)"
        return {"missing": {CPU_LIBRARY: reason, CUDA_LIBRARY: reason}}


@functools.cache
def cpu_library_error() -> str | None:
    """Loads the CPU library on the first call; None if that worked, else the reason."""
    reason = _load(library_dir() / CPU_LIBRARY)
    if reason is not None:
        return reason
    try:
        _ = _cpu_library().ffnet_cpu_unbuilt_isa  # its most recent function
        select_isa("")  # so that a wrong FFNET_KERNELS_ISA fails here, not in the first call
    except AttributeError as error:
        return f"{CPU_LIBRARY} is not of this version of the package: {error}"
    except ValueError as error:
        warnings.warn(f"ffnet_kernels runs without its CPU kernels: {error}", RuntimeWarning, stacklevel=2)
        return str(error)
    return None


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    """The C functions of csrc/bindings/c_interface.cpp."""
    library = ctypes.CDLL(str(library_dir() / CPU_LIBRARY))
    library.ffnet_cpu_isa.restype = ctypes.c_char_p
    return library


@functools.cache
def usable_isas() -> tuple[str, ...]:
    """The instruction sets that the CPU library has code for and this processor runs, slowest first; none without the
    library.

    ``FFNET_KERNELS_ISA`` restricts the processor to the named one and those below it.
    """
    return _names("ffnet_cpu_usable_isa")


def select_isa(name: str) -> None:
    """Restricts calls to this instruction set; an empty name restores the default.

    Raises:
        ValueError: for an instruction set that this build or processor does not have, also if ``FFNET_KERNELS_ISA``
            names it.
    """
    reason = ctypes.create_string_buffer(500)
    if _cpu_library().ffnet_cpu_select_isa(name.encode(), reason, ctypes.c_size_t(len(reason))):
        raise ValueError(reason.value.decode())
    for told in when_isa_changes:
        told(isa())


def isa() -> str:
    """The instruction set in use. This and the functions below need ``cpu_library_error()`` to be None."""
    return _cpu_library().ffnet_cpu_isa().decode()


def lanes() -> int:
    """Channels in one vector of it."""
    return _cpu_library().ffnet_cpu_lanes()


def is_unrolled(kh: int, kw: int) -> bool:
    """Whether filters of this size have specialised code in it."""
    return bool(_cpu_library().ffnet_cpu_is_unrolled(ctypes.c_int64(kh), ctypes.c_int64(kw)))


def unbuilt_isas() -> tuple[str, ...]:
    """Instruction sets that this processor runs but the CPU library, built on another one, lacks."""
    return _names("ffnet_cpu_unbuilt_isa")


def _names(function: str) -> tuple[str, ...]:
    """The names that a C function returns for 0, 1, ... until there are no more; none without the library."""
    if cpu_library_error() is not None:
        return ()
    name_of = getattr(_cpu_library(), function)
    name_of.restype = ctypes.c_char_p
    names = (name_of(ctypes.c_size_t(index)) for index in itertools.count())
    return tuple(name.decode() for name in itertools.takewhile(bool, names))


def poison_scratch(wanted: bool) -> None:
    """For tests: fills the CPU kernels' scratch memory with NaN before use. Does nothing without the library."""
    if cpu_library_error() is None:
        _cpu_library().ffnet_cpu_poison_scratch(ctypes.c_int(wanted))


@functools.cache
def cuda_library_error() -> str | None:
    """The same for the CUDA library, which needs a torch with CUDA, but no GPU to load."""
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
    """The CUDA kernels compiled for the processor, for tests: the library at ``FFNET_KERNELS_CUDA_HOST``."""
    path = os.environ.get("FFNET_KERNELS_CUDA_HOST")
    return Path(path) if path else None


def _load(path: Path) -> str | None:
    if not path.exists():
        record = build_record()
        again = " (it was built: install the package again)" if path.name in record.get("libraries", ()) else ""
        return record.get("missing", {}).get(path.name, f"{path} is missing{again}")
    try:
        reason = _damage(path)
        if reason is None:
            ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return reason


def _damage(path: Path) -> str | None:
    """Why a library is not the one that was built, or None: loading a truncated one would end the process."""
    content = path.read_bytes()
    built = build_record().get("files", {}).get(path.name) if path.parent == library_dir() else None
    what = None
    if built is not None and len(content) != built["bytes"]:
        what = f"it has {len(content)} bytes instead of {built['bytes']}"
    elif built is not None and hashlib.sha256(content).hexdigest() != built["sha256"]:
        what = "its SHA-256 is not that of the build record"
    elif len(content) < _elf_bytes(content):
        what = f"it has {len(content)} bytes instead of {_elf_bytes(content)}"
    return f"{path.name} is damaged: {what} (install the package again)" if what else None


def _elf_bytes(content: bytes) -> int:
    """The minimum size of a 64-bit ELF file, according to its header; 0 for any other file."""
    if content[:5] != b"\x7fELF\2" or len(content) < 64:
        return 0
    order = "<" if content[5] == 1 else ">"
    programs, sections, program_size, program_count, section_size, section_count = struct.unpack_from(
        f"{order}32x2Q6x4H", content
    )
    return max(programs + program_size * program_count, sections + section_size * section_count)


@functools.cache
def helper() -> ModuleType | None:
    """The pybind11 helper, or None: it is optional, and loads only in the Python version that it was built for."""
    if cpu_library_error() is not None:
        return None  # loading it would load that library, too
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = library_dir() / f"_native{suffix}"
        if path.exists() and _damage(path) is None:
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
