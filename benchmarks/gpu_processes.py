"""What ``benchmarks gpu`` does in processes of their own: the build of the libraries, and NVIDIA's sanitizer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ffnet_kernels import native
from ffnet_kernels.backends import choice

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = "compute-sanitizer"

#: Tools, and the cases of the self-test that they watch: they slow kernels down by a factor of 10 to 100.
SANITIZED = (("memcheck", "k=3 "), ("racecheck", "k=3 "), ("memcheck", "k=31 "), ("racecheck", "k=31 "))
LONGEST = 90.0  # seconds of one of them

#: How the texts begin that say why there is no CUDA library where nothing is wrong with it.
NOT_WANTED = ("no CUDA compiler", "left out by", "no working C++ compiler", "ninja is not installed")


def library_state() -> tuple[int, int] | None:
    """Tells one build of the CUDA library from another; None where there is none."""
    try:
        found = (native.library_dir() / native.CUDA_LIBRARY).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def build(device: torch.device, seconds: float) -> dict[str, Any] | None:
    """Brings the libraries up to date with their sources, that of CUDA for this GPU only, unless ``FFNET_CUDA_ARCHS``
    says otherwise or there is one already that runs on it. Returns a row; None where time was up."""
    folder = native.library_dir()
    if os.environ.get("FFNET_KERNELS_LIBRARY_DIR"):
        return {"passed": True, "skipped": "FFNET_KERNELS_LIBRARY_DIR names the libraries"}
    architectures = wanted_architectures(torch.cuda.get_device_capability(device), built_architectures(folder))
    command = [sys.executable, ROOT / "csrc" / "build.py", "--out", folder, "--work", ROOT / "build" / "native"]
    finished = run(command, seconds, {"FFNET_CUDA_ARCHS": architectures})
    if finished is None:
        return None
    code, output = finished
    row: dict[str, Any] = {"passed": code == 0, "architectures": architectures}
    if code != 0 and "no native kernels" not in output:  # refused before anything was built
        return {**row, "error": output}
    missing = json.loads((folder / "build_record.json").read_text())["missing"].get(native.CUDA_LIBRARY)
    if missing is None:
        return row
    if missing.startswith(NOT_WANTED):
        return {**row, "passed": True, "skipped": missing}
    return {**row, "passed": False, "error": f"{missing}\n{output}"}


def wanted_architectures(capability: tuple[int, int], built: Sequence[int]) -> str:
    """What is to be in ``FFNET_CUDA_ARCHS``. Machine code runs on every later minor of its major version."""
    major, minor = capability
    if "FFNET_CUDA_ARCHS" in os.environ:
        return os.environ["FFNET_CUDA_ARCHS"]
    if any(number // 10 == major and number % 10 <= minor for number in built):
        return ",".join(map(str, built))
    return f"{major}{minor}"


def built_architectures(folder: Path) -> list[int]:
    try:
        return json.loads((folder / "build_record.json").read_text())["cuda"]["architectures"]
    except (OSError, ValueError, KeyError):
        return []


def sanitize(tool: str, text: str, seconds: float) -> dict[str, Any] | None:
    """A row: whether the CUDA kernels pass the self-test's cases with this text in their names without a finding of the
    sanitizer; None where time was up."""
    reason = choice.why_unavailable("cuda") or why_no_sanitizer()
    if reason is not None:
        return {"passed": True, "skipped": reason}
    begun = time.monotonic()
    command = [_sanitizer(), "--tool", tool, "--error-exitcode", "86", "--kernel-name", "kns=ffnet", sys.executable]
    command += ["-m", "ffnet_kernels", "selftest", "--backend", "cuda", "--filter", text]
    # Blocks of memory end where tensors end only where torch does not keep and divide them.
    finished = run(command, min(seconds, LONGEST), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if finished is None:
        late = seconds > LONGEST
        return {"passed": False, "error": f"not finished after {LONGEST:.0f} s"} if late else None
    code, output = finished
    took = {"seconds": round(time.monotonic() - begun, 1)}
    return {"passed": True, **took} if code == 0 else {"passed": False, **took, "error": output}


def why_no_sanitizer() -> str | None:
    return None if _sanitizer() else f"{SANITIZER} is not there (looked on the path and in CUDA's folder)"


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=f"{home}/bin")


def run(command: Sequence[object], seconds: float, environment: dict[str, str]) -> tuple[int, str] | None:
    """The exit code of a process and the end of what it printed; None where it was not done in time.

    It is ended together with its children: ninja and the sanitizer have some.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(0.0, seconds))
    except BaseException as event:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(event, subprocess.TimeoutExpired):
            return None
        raise
    return process.returncode, output[-1200:].strip()
