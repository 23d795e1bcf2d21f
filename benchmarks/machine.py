"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import ffnet_kernels

from .heap import keep_freed_memory

RUNTIMES = ("onnx", "onnxruntime", "openvino")


def machine() -> dict[str, Any]:
    """Processor, threads, instruction set, versions and commit, as plain data."""
    info = ffnet_kernels.info()
    kept = ("processor", "threads", "isa", "torch", "python", "platform", "backends", "environment")
    return {
        **{name: info[name] for name in kept},
        "ffnet_kernels": ffnet_kernels.__version__,
        "runtimes": {name: version for name in RUNTIMES if (version := _version(name))},
        "heap": {"kept": keep_freed_memory(), "tunables": os.environ.get("GLIBC_TUNABLES", "")},
        "commit": _commit() or info["build"].get("commit") or "unknown",
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same in one line."""
    return (
        f"{machine['processor']}, {machine['threads']} threads, isa {machine['isa'] or 'none (reference only)'}, "
        f"torch {machine['torch']}, Python {machine['python']}, ffnet-kernels {machine['ffnet_kernels']}, "
        f"commit {machine['commit']}"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the kernels' source tree, "+" behind it for local changes; None for an installed copy."""
    here = Path(ffnet_kernels.__file__).resolve()
    # An environment inside someone's repository is not under version control there: ask about this very file.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _git(here.parent, "rev-parse", "--short=12", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
