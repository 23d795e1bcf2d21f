"""Describes this installation and what it can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import native
from .backends import choice

#: All environment variables that are read; the table in docs/install.md is checked against this.
ENVIRONMENT = {
    "FFNET_CPU_ISAS": "instruction sets of the CPU library when it is built: all, or a list such as avx2,avx512",
    "FFNET_CUDA_ARCHS": "architectures of the CUDA library when it is built: all, none, or a list such as 80,90",
    "FFNET_KERNELS_BACKEND": "backend of all calls: auto, reference, cpu, triton or cuda",
    "FFNET_KERNELS_CUDA_HOST": "library of the CUDA kernels compiled for the processor, for tests",
    "FFNET_KERNELS_ISA": "best instruction set of the CPU kernels: baseline, avx2, avx512 or avx512bf16",
    "FFNET_KERNELS_LIBRARY_DIR": "folder of the native libraries, in place of the package's own",
}


def info() -> dict[str, Any]:
    """Describes this installation as plain data: versions, processor, instruction sets, native libraries, backends, and
    why any is missing.

    ``python -m ffnet_kernels info`` prints it.
    """
    usable = choice.available_backends()
    loaded = native.cpu_library_error() is None
    return {
        "ffnet_kernels": _version("ffnet-kernels"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": native.isa() if loaded else None,
        "usable_isas": list(native.usable_isas()),
        "unbuilt_isas": list(native.unbuilt_isas()),
        "backends": {
            name: "available" if name in usable else f"unavailable: {choice.why_unavailable(name)}"
            for name in choice.NAMES[1:]
        },
        "libraries": [str(path) for path in _libraries()],
        "build": native.build_record(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def format_info() -> str:
    """The result of :func:`info` as aligned text."""
    lines = []
    for name, value in info().items():
        if isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if key != "files"}  # sizes and hashes are for --json
            lines += [f"{name}:", *(f"  {key:24} {_text(entry)}" for key, entry in value.items())]
        else:
            lines.append(f"{name + ':':16} {_text(value)}")
    return "\n".join(lines)


def _libraries() -> list[Path]:
    """The native libraries that are loaded."""
    found = [native.library_dir() / native.CPU_LIBRARY] if native.cpu_library_error() is None else []
    if native.cuda_library_error() is None:
        found.append(native.cuda_host_library() or native.library_dir() / native.CUDA_LIBRARY)
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {entry}".strip() for key, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (run from its source)"


def processor() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
