"""Builds the native libraries with ninja: `python csrc/build.py --out DIR`, or from setup.py.

    libffnet_kernels_cpu.so   the CPU operators, LibTorch stable ABI: no Python ABI, no C++ ABI of torch
    _native*.so               pybind11 helper beside them (optional: without it the instruction set cannot be asked for)
    build_record.json         how they were built, or why they were not

A machine that cannot build still gets the record, and the package then runs on its reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = (2, 11)

# Per instruction set: nothing for the baseline, so that it runs on any processor of the architecture.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"],
}
KERNEL_SOURCES = [
    "kernels.cpp", "depthwise_conv2d.cpp", "depthwise_conv2d_wgrad.cpp", "ffnified_attention.cpp", "channel_mixer.cpp",
]  # fmt: skip
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
KERNEL_FLAGS = ["-ffp-contract=fast", "-Wno-maybe-uninitialized"]  # gcc warns of its own AVX-512 header
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
]


class CannotBuild(Exception):
    """The machine lacks something a native build needs; the text says what."""


@dataclass
class Ninja:
    """Collects edges and runs them."""

    directory: Path
    edges: list[str] = field(default_factory=list)

    def add(self, output: Path, command: list[str], inputs: list[Path], depfile: bool = False) -> Path:
        rule = f"r{len(self.edges)}"
        deps = f"\n  depfile = {output}.d\n  deps = gcc" if depfile else ""
        self.edges.append(
            f"rule {rule}\n  command = {shlex.join(command)}\n  description = {output.name}{deps}\n"
            f"build {_escape(output)}: {rule} {' '.join(map(_escape, inputs))}\n"
        )
        return output

    def run(self, verbose: bool) -> None:
        (self.directory / "build.ninja").write_text("\n".join(self.edges))
        result = subprocess.run(
            [find_ninja(), "-C", str(self.directory), *(["-v"] if verbose else [])], capture_output=True, text=True
        )
        if verbose or result.returncode:
            print(result.stdout, result.stderr, sep="\n", file=sys.stderr)
        if result.returncode:
            raise CannotBuild(f"compilation failed: {_first_error(result.stdout)}")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _first_error(log: str) -> str:
    return next((line.strip() for line in log.splitlines() if "error:" in line), "see the build log")


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise CannotBuild("ninja is not installed (pip install ninja)") from None
        return found


def find_compiler() -> list[str]:
    """The C++ compiler of $CXX, else c++ or g++ on the path, that really compiles a program."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[c] for c in ("c++", "g++", "clang++") if shutil.which(c)]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return static_cast<int>(std::vector<int>(0).size()); }\n")
        for command in candidates:
            try:
                probe = subprocess.run([*command, str(source), "-o", f"{scratch}/probe"], capture_output=True)
            except OSError:
                continue
            if probe.returncode == 0 and Path(scratch, "probe").exists():
                return command
    raise CannotBuild(f"no working C++ compiler ({'CXX=' + named if named else 'looked for c++, g++, clang++'})")


def torch_paths() -> tuple[Path, Path, str]:
    """(headers, libraries, version) of the installed torch, without importing it into the build's decision twice."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET_VERSION:
        needed = ".".join(map(str, TORCH_TARGET_VERSION))
        raise CannotBuild(f"torch {torch.__version__} is too old: the native kernels need torch {needed} or newer")
    root = Path(torch.__file__).parent
    return root / "include", root / "lib", torch.__version__


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def plan(ninja: Ninja, out: Path, compiler: list[str], sanitize: bool) -> dict[str, object]:
    """Adds every compile and link step; returns the build record."""
    include, library, torch_version = torch_paths()
    extra = [*shlex.split(os.environ.get("CXXFLAGS", "")), *(SANITIZE_FLAGS if sanitize else [])]
    common = [*COMMON_FLAGS, *extra]
    if len(isas()) > 1:
        common.append("-DFFNET_HAVE_X86_KERNELS")

    def compile_one(source: Path, name: str, flags: list[str]) -> Path:
        output = ninja.directory / f"{name}.o"
        command = [*compiler, *common, *flags, "-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        return ninja.add(output, command, [source], depfile=True)

    objects = [compile_one(CSRC / "cpu" / "select.cpp", "select", [])]
    for isa in isas():
        for source in KERNEL_SOURCES:
            flags = [*KERNEL_FLAGS, *ISA_FLAGS[isa]]
            objects.append(compile_one(CSRC / "cpu" / source, f"{isa}_{Path(source).stem}", flags))
    target = (TORCH_TARGET_VERSION[0] << 56) | (TORCH_TARGET_VERSION[1] << 48)
    binding_flags = ["-isystem", str(include), f"-DTORCH_TARGET_VERSION={target:#018x}ULL"]
    objects.append(compile_one(CSRC / "bindings" / "torch_cpu.cpp", "torch_cpu", binding_flags))
    link = [*compiler, "-shared", *extra]
    cpu_library = ninja.add(
        out / "libffnet_kernels_cpu.so",
        [*link, *map(str, objects), f"-L{library}", "-ltorch_cpu", "-Wl,--no-undefined",
         "-Wl,-soname,libffnet_kernels_cpu.so", "-o", str(out / "libffnet_kernels_cpu.so")],
        objects,
    )  # fmt: skip
    record: dict[str, object] = {
        "torch": torch_version,
        "torch_target_version": ".".join(map(str, TORCH_TARGET_VERSION)),
        "compiler": " ".join(compiler) + " " + compiler_version(compiler),
        "flags": " ".join([*common, *KERNEL_FLAGS]),
        "isas": {isa: " ".join(ISA_FLAGS[isa]) for isa in isas()},
        "libraries": ["libffnet_kernels_cpu.so"],
        "commit": git_commit(),
        "missing": {},
    }
    try:
        import pybind11
    except ImportError:
        record["missing"] = {"_native": "pybind11 was not installed when the package was built"}
        return record
    flags = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    helper = compile_one(CSRC / "bindings" / "helper.cpp", "helper", flags)
    name = "_native" + str(sysconfig.get_config_var("EXT_SUFFIX"))
    ninja.add(
        out / name, [*link, str(helper), str(cpu_library), "-Wl,-rpath,$ORIGIN", f"-L{library}",
                     f"-Wl,-rpath-link,{library}", "-o", str(out / name)], [helper, cpu_library],
    )  # fmt: skip
    record["libraries"] = ["libffnet_kernels_cpu.so", name]
    return record


def compiler_version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "-dumpfullversion"], capture_output=True, text=True).stdout.strip()


def git_commit() -> str | None:
    command = ["git", "-C", str(CSRC), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def build(out: Path, work: Path, *, sanitize: bool = False, verbose: bool = False) -> str | None:
    """Builds into `out` with intermediate files in `work`; returns None, or why there is no native library.

    Raises ImportError where torch is missing: that is a mistake of the caller, not a property of the machine.
    """
    out, work = out.resolve(), work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    try:
        compiler = find_compiler()
        ninja = Ninja(work)
        record = plan(ninja, out, compiler, sanitize)
        ninja.run(verbose)
        reason = None
    except CannotBuild as error:
        reason = str(error)
        record = {"missing": {"libffnet_kernels_cpu.so": reason}}
        for stale in out.glob("*.so"):
            stale.unlink()
    (out / "build_record.json").write_text(json.dumps(record, indent=2) + "\n")
    return reason


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native libraries of ffnet-kernels.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the libraries")
    parser.add_argument("--work", type=Path, help="folder for objects (default: OUT/objects)")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--verbose", action="store_true", help="print every command")
    options = parser.parse_args()
    reason = build(
        options.out, options.work or options.out / "objects", sanitize=options.sanitize, verbose=options.verbose
    )
    if reason:
        sys.exit(f"ffnet-kernels: no native kernels: {reason}")


if __name__ == "__main__":
    main()
