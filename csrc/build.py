"""Builds the native libraries with ninja: `python csrc/build.py --out DIR`, or from setup.py.

    libffnet_kernels_cpu.so   the CPU operators, LibTorch stable ABI: no Python ABI, no C++ ABI of torch
    _native*.so               pybind11 helper, for the Python that built it; nothing needs it
    libffnet_kernels_cuda.so  the CUDA operators, where there is an nvcc; any torch will do to build it, a CPU one too
    build_record.json         how they were built, or why they were not

A machine that cannot build still gets the record, and the package then runs on its reference.

Code is made for this machine, unless these say otherwise:

FFNET_CPU_ISAS     instruction sets of the CPU library: "all", or a list such as "avx2,avx512"; baseline is always there
FFNET_CUDA_ARCHS   architectures of the CUDA library: "all", "none", or a list such as "80,90"
CXX, CXXFLAGS, CUDA_HOME, NVCC_APPEND_FLAGS   as everywhere
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent
SCHEMAS = CSRC.parent / "ffnet_kernels" / "ops" / "schemas.py"
sys.path.insert(0, str(CSRC))  # only for this import: setup.py and the tests load this file by its path
try:
    from toolchain import (
        COMMIT_FILE,  # noqa: F401  (for setup.py)
        CannotBuild,
        Ninja,
        Nvcc,
        compiler_version,
        find_compiler,
        find_ninja,  # noqa: F401  (for tests that run a plan of their own)
        find_nvcc,
        requested_architectures,
        source_commit,
        torch_paths,
        wanted_isas,
    )
finally:
    sys.path.remove(str(CSRC))

CPU_LIBRARY, CUDA_LIBRARY = "libffnet_kernels_cpu.so", "libffnet_kernels_cuda.so"
HOST_CUDA_LIBRARY = "libffnet_kernels_cuda_host.so"
TORCH_TARGET_VERSION = (2, 11)
WRONG_REQUEST = 2  # the exit code for an environment variable that asks for what there is not; 1: what cannot be built

AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
# Per instruction set: nothing for the baseline, so that it runs on any processor of the architecture.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
# What takes longest comes first, or one core would be left with it at the end. (conv_row_pairs.cpp is empty but for
# avx512bf16.)
KERNEL_SOURCES = [
    "conv_row.cpp", "wgrad_row.cpp", "conv_row_pairs.cpp", "product.cpp", "channel_mixer.cpp", "conv2d.cpp",
    "depthwise_conv2d.cpp", "depthwise_conv2d_backward.cpp", "ffnified_attention.cpp",
    "ffnified_attention_backward.cpp", "pointwise_conv2d.cpp", "pointwise_conv2d_backward.cpp", "few_pixels.cpp",
    "branched_depthwise.cpp", "branched_depthwise_backward.cpp", "batch_norm.cpp", "feed_forward.cpp", "peak.cpp",
    "kernels.cpp",
]  # fmt: skip
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
KERNEL_FLAGS = ["-ffp-contract=fast", "-Wno-maybe-uninitialized"]  # gcc warns of its own AVX-512 header
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
]
SANITIZE_THREAD_FLAGS = ["-fsanitize=thread", "-fno-omit-frame-pointer", "-g", "-O1"]


def isas(compiler: list[str]) -> list[str]:
    known = list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]
    return wanted_isas(compiler, CSRC / "cpu" / "processor.h", known)


def target_version_flag() -> str:
    return f"-DTORCH_TARGET_VERSION={(TORCH_TARGET_VERSION[0] << 56) | (TORCH_TARGET_VERSION[1] << 48):#018x}ULL"


def schema_headers(ninja: Ninja) -> list[str]:
    """Writes the header of the operators' schemas into the folder of a build; flags by which bindings find it."""
    spec = importlib.util.spec_from_file_location("ffnet_kernels_schemas", SCHEMAS)
    assert spec is not None
    assert spec.loader is not None
    schemas = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schemas)
    ninja.directory.mkdir(parents=True, exist_ok=True)
    header, text = ninja.directory / "operator_schemas.h", schemas.header()
    if not header.exists() or header.read_text() != text:  # or what includes it would be compiled again
        header.write_text(text)
    return ["-I", str(ninja.directory)]


def compile_step(ninja: Ninja, command: list[str], source: Path, name: str) -> Path:
    """With every header it reads as a dependency, torch's and CUDA's too: they change under a kept build folder."""
    output = ninja.directory / f"{name}.o"
    command = [*command, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
    return ninja.add(output, command, [source], depfile=True)


def plan(ninja: Ninja, out: Path, compiler: list[str], sanitize: bool) -> dict[str, object]:
    """Adds every compile and link step of the CPU library and the helper; returns the build record."""
    include, library, torch_version = torch_paths(TORCH_TARGET_VERSION)
    extra = [*shlex.split(os.environ.get("CXXFLAGS", "")), *(SANITIZE_FLAGS if sanitize else [])]
    common = [*COMMON_FLAGS, *extra]
    built = isas(compiler)

    def compile_one(source: Path, name: str, flags: list[str]) -> Path:
        return compile_step(ninja, [*compiler, *common, *flags], source, name)

    objects = []
    for source in KERNEL_SOURCES:
        for isa in built:
            flags = [*KERNEL_FLAGS, *ISA_FLAGS[isa]]
            objects.append(compile_one(CSRC / "cpu" / source, f"{isa}_{Path(source).stem}", flags))
    tables = ",".join(f"{isa}_kernels" for isa in built)
    objects.append(compile_one(CSRC / "cpu" / "select.cpp", "select", [f"-DFFNET_TABLES={tables}"]))
    objects.append(compile_one(CSRC / "cpu" / "scratch.cpp", "scratch", []))
    objects.append(compile_one(CSRC / "bindings" / "c_interface.cpp", "c_interface", []))
    binding_flags = [*schema_headers(ninja), "-isystem", str(include), target_version_flag()]
    for name in ("torch_cpu", "torch_cpu_steps", "torch_cpu_backward", "torch_cpu_training"):
        objects.append(compile_one(CSRC / "bindings" / f"{name}.cpp", name, binding_flags))
    link = [*compiler, "-shared", *extra]
    cpu_library = ninja.add(
        out / CPU_LIBRARY,
        [*link, *map(str, objects), f"-L{library}", "-ltorch_cpu", "-Wl,--no-undefined",
         f"-Wl,-soname,{CPU_LIBRARY}", "-o", str(out / CPU_LIBRARY)],
        objects,
    )  # fmt: skip
    record: dict[str, object] = {
        "torch": torch_version,
        "torch_target_version": ".".join(map(str, TORCH_TARGET_VERSION)),
        "compiler": " ".join(compiler) + " " + compiler_version(compiler),
        "flags": " ".join([*common, *KERNEL_FLAGS]),
        "isas": {isa: " ".join(ISA_FLAGS[isa]) for isa in built},
        "libraries": [CPU_LIBRARY],
        "commit": source_commit(CSRC),
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
    record["libraries"] = [CPU_LIBRARY, name]
    return record


def cuda_sources() -> list[Path]:
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if not sources:
        raise CannotBuild("there are no CUDA sources")
    return sources


def cuda_bindings() -> list[Path]:
    return sorted((CSRC / "bindings").glob("torch_cuda*.cpp"))


def plan_cuda(ninja: Ninja, out: Path, compiler: list[str], nvcc: Nvcc) -> dict[str, object]:
    """Adds every step of the CUDA library; returns its part of the build record."""
    include, library, _ = torch_paths(TORCH_TARGET_VERSION)
    flags = [*CUDA_FLAGS, *nvcc.target_flags()]
    objects = [compile_step(ninja, [*nvcc.command, *flags], source, source.stem) for source in cuda_sources()]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    includes = [flag for folder in (include, *nvcc.includes) for flag in ("-isystem", str(folder))]
    binding = [*compiler, *COMMON_FLAGS, *extra, *schema_headers(ninja), *includes, "-DUSE_CUDA", target_version_flag()]
    objects += [compile_step(ninja, binding, source, source.stem) for source in cuda_bindings()]
    # Undefined symbols stay: a CPU torch, against which this may be linked, lacks those of streams. libtorch.so, needed
    # by name, brings them where the library is loaded. The CUDA runtime is inside, hidden from torch's own.
    ninja.add(
        out / CUDA_LIBRARY,
        [*compiler, "-shared", *extra, *map(str, objects), *(f"-L{folder}" for folder in (library, *nvcc.libraries)),
         "-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL",
         f"-Wl,-soname,{CUDA_LIBRARY}", "-o", str(out / CUDA_LIBRARY)],
        objects,
    )  # fmt: skip
    return {"nvcc": nvcc.version, "architectures": nvcc.architectures, "flags": " ".join(flags)}


def build_cuda(out: Path, work: Path, compiler: list[str], verbose: bool) -> tuple[dict[str, object], str | None]:
    """Builds the CUDA library beside the CPU's: (its part of the record, None), or ({}, why there is none)."""
    try:
        ninja = Ninja(work)
        record = plan_cuda(ninja, out, compiler, find_nvcc(compiler))
        ninja.run(verbose)
        return record, None
    except CannotBuild as reason:
        (out / CUDA_LIBRARY).unlink(missing_ok=True)
        return {}, str(reason)


def build_host_cuda(out: Path, work: Path, sanitizer: list[str], verbose: bool) -> None:
    """The CUDA kernels as C++ for the processor (csrc/cuda/host), for tests; raises CannotBuild."""
    include, library, _ = torch_paths(TORCH_TARGET_VERSION)
    compiler, ninja = find_compiler(), Ninja(work)
    common = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
              "-DFFNET_HOST_EXECUTION"]  # fmt: skip
    command = [*compiler, *common, *sanitizer]
    sources = [*cuda_sources(), *sorted((CSRC / "cuda" / "host").glob("*.cpp"))]
    objects = [compile_step(ninja, [*command, "-x", "c++"], source, source.stem) for source in sources]
    binding = [*command, *schema_headers(ninja), "-isystem", str(include), target_version_flag()]
    objects += [compile_step(ninja, binding, source, source.stem) for source in cuda_bindings()]
    ninja.add(
        out / HOST_CUDA_LIBRARY,
        [*compiler, "-shared", *sanitizer, *map(str, objects), f"-L{library}", "-ltorch_cpu",
         *([] if sanitizer else ["-Wl,--no-undefined"]), "-o", str(out / HOST_CUDA_LIBRARY)],
        objects,
    )  # fmt: skip
    ninja.run(verbose)


def fingerprint(library: Path) -> dict[str, object]:
    """What ffnet_kernels/native.py knows a library by before it loads it: one that was cut short ends the process."""
    content = library.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def build(out: Path, work: Path, *, sanitize: bool = False, cuda: bool = False, verbose: bool = False) -> str | None:
    """Builds into `out` with intermediate files in `work`; returns None, or why there is no native library.

    A CUDA library that cannot be built is no reason to fail: the record says why. What the caller did wrong is raised:
    ImportError where torch is missing, ValueError for a wrong FFNET_CPU_ISAS or FFNET_CUDA_ARCHS.
    """
    out, work = out.resolve(), work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        requested_architectures()
        compiler = find_compiler()
        ninja = Ninja(work)
        record = plan(ninja, out, compiler, sanitize)
        ninja.run(verbose)
        reason = None
    except CannotBuild as error:
        reason = str(error)
        record = {"missing": {CPU_LIBRARY: reason, CUDA_LIBRARY: reason}}
        for stale in out.glob("*.so"):
            stale.unlink()
    if reason is None and cuda:
        part, why = build_cuda(out, work / "cuda", compiler, verbose)
        if why is None:
            record["cuda"] = part
            record["libraries"] = [*record["libraries"], CUDA_LIBRARY]
        else:
            record["missing"] = {**record["missing"], CUDA_LIBRARY: why}
    record["files"] = {name: fingerprint(out / name) for name in record.get("libraries", [])}
    (out / "build_record.json").write_text(json.dumps(record, indent=2) + "\n")
    return reason


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native libraries of ffnet-kernels.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the libraries")
    parser.add_argument("--work", type=Path, help="folder for objects (default: OUT/objects)")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="with AddressSanitizer and UndefinedBehaviorSanitizer, without the CUDA library",
    )
    parser.add_argument("--sanitize-thread", action="store_true", help="--host-cuda with ThreadSanitizer")
    parser.add_argument("--host-cuda", action="store_true", help="only the CUDA kernels for the processor, for tests")
    parser.add_argument("--verbose", action="store_true", help="print every command")
    options = parser.parse_args()
    if options.sanitize_thread and (options.sanitize or not options.host_cuda):
        parser.error("--sanitize-thread goes with --host-cuda and without --sanitize")
    out, work = options.out.resolve(), (options.work or options.out / "objects").resolve()
    try:
        if options.host_cuda:
            out.mkdir(parents=True, exist_ok=True)
            sanitizer = SANITIZE_FLAGS if options.sanitize else SANITIZE_THREAD_FLAGS if options.sanitize_thread else []
            build_host_cuda(out, work, sanitizer, options.verbose)
            return
        reason = build(out, work, sanitize=options.sanitize, cuda=not options.sanitize, verbose=options.verbose)
    except CannotBuild as error:
        sys.exit(f"ffnet-kernels: {error}")
    except ValueError as error:
        print(f"ffnet-kernels: {error}", file=sys.stderr)
        sys.exit(WRONG_REQUEST)
    if reason:
        sys.exit(f"ffnet-kernels: no native kernels: {reason}")
    missing = json.loads((out / "build_record.json").read_text())["missing"].get(CUDA_LIBRARY)
    if missing and requested_architectures():
        sys.exit(f"ffnet-kernels: no CUDA kernels: {missing}")


if __name__ == "__main__":
    main()
