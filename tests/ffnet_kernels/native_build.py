"""Builds copies of csrc/, whole or with a fault planted in one line, into a folder of a test."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import patience
import pytest

ROOT = Path(__file__).parents[2]


def load_builder(csrc: Path) -> ModuleType:
    name = f"build_of_{csrc.parent.name}"
    spec = importlib.util.spec_from_file_location(name, csrc / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.SCHEMAS = ROOT / "ffnet_kernels" / "ops" / "schemas.py"  # which copies of csrc/ have not beside them
    return module


def compiler() -> list[str]:
    """The compiler a build takes; skips where there is none."""
    builder = load_builder(ROOT / "csrc")
    try:
        return builder.find_compiler()
    except builder.CannotBuild as reason:
        pytest.skip(str(reason))


def has_compiler() -> bool:
    builder = load_builder(ROOT / "csrc")
    try:
        return bool(builder.find_compiler())
    except builder.CannotBuild:
        return False


def build_with_fault(folder: Path, source: str, line: str, faulty: str, *, sanitize: bool = False) -> Path:
    """The folder of a library of the portable kernels in which ``line`` of csrc/``source`` reads ``faulty``.

    Another call for the same folder compiles what differs only.
    """
    compiler()
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text()
            if path == ROOT / "csrc" / source:
                assert text.count(line) == 1, f"csrc/{source} no longer holds the line to alter once: {line}"
                text = text.replace(line, faulty)
            copy = folder / "csrc" / path.relative_to(ROOT / "csrc")
            if not copy.exists() or copy.read_text() != text:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text)
    builder = load_builder(folder / "csrc")
    builder.isas = lambda compiler: ["baseline"]
    assert builder.build(folder / "lib", folder / "work", sanitize=sanitize) is None
    return folder / "lib"


def build_cuda_host(folder: Path, sanitizer: str = "", faults: dict[str, tuple] | None = None) -> Path:
    """The CUDA kernels for the processor, with a sanitizer ("", "address" or "thread"), of a copy of csrc/ in `folder`.

    ``faults`` are code to alter, with any white space, and what it becomes, by its source, or several such pairs. A
    second call compiles what differs only.
    """
    compiler()
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    for source, edits in (faults or {}).items():
        for line, faulty in [edits] if isinstance(edits[0], str) else edits:
            pattern = r"\s*".join(re.escape(part) for part in line.split())
            text, found = re.subn(pattern, lambda _, faulty=faulty: faulty, (folder / "csrc" / source).read_text())
            assert found == 1, f"csrc/{source} no longer holds the code to alter once: {line}"
            (folder / "csrc" / source).write_text(text)
    builder = load_builder(folder / "csrc")
    flags = {"": [], "address": builder.SANITIZE_FLAGS, "thread": builder.SANITIZE_THREAD_FLAGS}[sanitizer]
    (folder / "lib").mkdir(exist_ok=True)
    builder.build_host_cuda(folder / "lib", folder / "work", flags, False)
    return folder / "lib" / builder.HOST_CUDA_LIBRARY


def runtime_library(name: str) -> str:
    """A library of the compiler; skips where there is none."""
    command = [*compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).exists():
        pytest.skip(f"the compiler has no {name}")
    return path


def sanitizer_environment() -> dict[str, str]:
    """Python itself is built without sanitizers: their runtime is loaded before it."""
    return {
        "LD_PRELOAD": " ".join(map(runtime_library, ("libasan.so", "libubsan.so"))),
        # Python and torch keep memory to the end; the kernels own one buffer a thread.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    }


def run_tests(library: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """pytest in a process of its own, on another build of the kernels."""
    environment = {**os.environ, **(environment or {}), "FFNET_KERNELS_LIBRARY_DIR": str(library)}
    return patience.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments], cwd=ROOT, env=environment
    )
