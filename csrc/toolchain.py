"""What build.py needs of the machine: ninja, the C++ compiler, nvcc and its architectures, torch's headers."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Machine code runs on every later minor of its major version, so one architecture of each serves them all (sm_80 is
# 8.0, 8.6, 8.7 and 8.9); what comes after the newest compiles its PTX at the first call. A GPU that neither serves,
# such as sm_110, runs the next backend (backends/cuda.py asks the library).
CUDA_ARCHITECTURES = [75, 80, 90, 100, 120]
COMMIT_FILE = "COMMIT"


class CannotBuild(Exception):
    """The machine lacks something a native build needs; the text says what."""


@dataclass
class Ninja:
    """Collects edges and runs them, saying on stderr how far it is."""

    directory: Path
    edges: list[str] = field(default_factory=list)

    def add(self, output: Path, command: list[str], inputs: list[Path], depfile: bool = False) -> Path:
        rule = f"r{len(self.edges)}"
        deps = f"\n  depfile = {output}.d\n  deps = gcc" if depfile else ""
        self.edges.append(
            f"rule {rule}\n  command = {shlex.join(command).replace('$', '$$')}\n  description = {output.name}{deps}\n"
            f"build {_escape(output)}: {rule} {' '.join(map(_escape, inputs))}\n"
        )
        return output

    def run(self, verbose: bool) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "build.ninja").write_text("\n".join(self.edges))
        command = [find_ninja(), "-C", str(self.directory), *(["-v"] if verbose else [])]
        in_place = sys.stderr.isatty() and not verbose
        log = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                log.append(line)
                step = re.match(r"\[\d+/\d+\]", line)
                if verbose or step:
                    print(f"\r{line.rstrip():79.79}" if in_place else line.rstrip(), end="" if in_place else "\n",
                          file=sys.stderr, flush=True)  # fmt: skip
        if in_place and log:
            print(file=sys.stderr)
        if process.returncode:
            if not verbose:
                print("".join(log), file=sys.stderr)
            raise CannotBuild(f"compilation failed: {_first_error(''.join(log))}")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _first_error(log: str) -> str:
    error = re.search(r".*(\berror\s*:|\bfatal\s*:|undefined reference).*", log)
    return error[0].strip() if error else "see the build log"


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
    source = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>(0).size()); }\n"
    for command in candidates:
        with compiled(command, source) as program:
            if program is not None:
                return command
    raise CannotBuild(f"no working C++ compiler ({'CXX=' + named if named else 'looked for c++, g++, clang++'})")


@contextlib.contextmanager
def compiled(compiler: list[str], source: str) -> Iterator[Path | None]:
    """The program of a source, for as long as the context; None where it does not compile."""
    with tempfile.TemporaryDirectory() as scratch:
        path, program = Path(scratch, "probe.cpp"), Path(scratch, "probe")
        path.write_text(source)
        try:
            done = subprocess.run([*compiler, str(path), "-o", str(program)], capture_output=True)
        except OSError:
            yield None
        else:
            yield program if done.returncode == 0 and program.exists() else None


def wanted_isas(compiler: list[str], header: Path, known: list[str]) -> list[str]:
    """Those of `known` that $FFNET_CPU_ISAS names ("all", or a list), else those that this processor runs.

    `header` is cpu/processor.h, which knows. Where no program runs, as when the compiler is for other machines: all.

    Raises:
        ValueError: for a list with anything else in it.
    """
    text = os.environ.get("FFNET_CPU_ISAS", "").strip()
    words = set(re.split(r"[\s,;]+", text.lower().strip(" ,;")))
    if text:
        if words != {"all"} and not words <= set(known):
            raise ValueError(f"FFNET_CPU_ISAS={text!r} is neither 'all' nor a list of {', '.join(known)}")
        return [isa for isa in known if words == {"all"} or isa == "baseline" or isa in words]
    asks = "\n".join(f'  if (ffnet::processor_runs("{isa}")) std::puts("{isa}");' for isa in known)
    with compiled(compiler, f'#include <cstdio>\n#include "{header}"\nint main() {{\n{asks}\n}}\n') as program:
        if program is None:
            return known
        try:
            answer = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            return known
    return [isa for isa in known if isa in answer]


def compiler_version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "-dumpfullversion"], capture_output=True, text=True).stdout.strip()


def torch_paths(oldest: tuple[int, int]) -> tuple[Path, Path, str]:
    """(headers, libraries, version) of the installed torch."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < oldest:
        needed = ".".join(map(str, oldest))
        raise CannotBuild(f"torch {torch.__version__} is too old: the native kernels need torch {needed} or newer")
    root = Path(torch.__file__).parent
    return root / "include", root / "lib", torch.__version__


@dataclass
class Nvcc:
    """A CUDA compiler that works, and the architectures it is to build for."""

    command: list[str]
    version: str
    includes: list[str]
    libraries: list[str]  # folders
    architectures: list[int]

    def target_flags(self) -> list[str]:
        newest = self.architectures[-1]
        binaries = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        return [*binaries, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def requested_architectures() -> list[int] | None:
    """The numbers in $FFNET_CUDA_ARCHS; an empty list for no CUDA library, None where nothing is asked for."""
    text = os.environ.get("FFNET_CUDA_ARCHS", "").strip()
    if text.lower() in ("", "all", "none"):
        return {"": None, "all": CUDA_ARCHITECTURES, "none": []}[text.lower()]
    words = re.split(r"[\s,;]+", text.strip(" ,;"))
    if not all(re.fullmatch(r"\d{2,3}", word) for word in words):
        raise ValueError(f"FFNET_CUDA_ARCHS={text!r} is neither 'all' nor 'none' nor a list such as '80,90'")
    return sorted({int(word) for word in words})


def present_architectures() -> list[int]:
    """Those of the GPUs that torch finds in this machine: a torch without CUDA could not load the library."""
    import torch

    capabilities = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return sorted({10 * major + minor for major, minor in capabilities})


def find_nvcc(compiler: list[str]) -> Nvcc:
    """The nvcc of $CUDA_HOME, else of the path, else of /usr/local/cuda, with `compiler` for the code of the host, and
    the architectures: those that were asked for, else those of this machine's GPUs."""
    requested = requested_architectures()
    wanted = present_architectures() if requested is None else requested
    if requested is None and not wanted:
        raise CannotBuild("torch finds no GPU here to build it for (FFNET_CUDA_ARCHS=all builds it for other machines)")
    if not wanted:
        raise CannotBuild(f"left out by FFNET_CUDA_ARCHS={os.environ['FFNET_CUDA_ARCHS']!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise CannotBuild(f"no CUDA compiler (looked for {places[0] if home else 'nvcc on the path, /usr/local/cuda'})")
    try:
        version = re.search(r"release [\d.]+, V([\d.]+)", _output(found, "--version"))
        known = sorted(int(number) for number in re.findall(r"sm_(\d+)", _output(found, "--list-gpu-code")))
        program = [word for word in compiler if not word.startswith("-")][-1]  # the last of `ccache g++ -m64`
        command = [found, "-ccbin", program]
        dryrun = _output(*command, "--dryrun", "-x", "cu", "-c", "probe.cu")
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{found} does not work: {(getattr(error, 'output', None) or str(error)).strip()}") from None
    if requested is None or requested is CUDA_ARCHITECTURES:  # those of them that this nvcc can build for
        oldest = CUDA_ARCHITECTURES[0]
        able = [architecture for architecture in wanted if architecture in known and architecture >= oldest]
        if not able:
            raise CannotBuild(f"{found} cannot build for any of {wanted}, only for {known} from {oldest} on")
        wanted = able
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"FFNET_CUDA_ARCHS: {found} cannot build for {unknown}, only for {known}")
    return Nvcc(
        command=command,
        version=version[1] if version else "unknown",
        includes=re.findall(r'-I([^"\s]+)', _variable(dryrun, "INCLUDES")),
        libraries=re.findall(r'-L([^"\s]+)', _variable(dryrun, "LIBRARIES")),
        architectures=wanted,
    )


def _output(*command: str) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return result.stdout


def _variable(dryrun: str, name: str) -> str:
    found = re.search(rf"^#\$ {name}=(.*)$", dryrun, re.MULTILINE)
    return found[1] if found else ""


def source_commit(folder: Path) -> str:
    """Of the archive that a folder was unpacked from (setup.py writes it there), else of its clone."""
    if (folder / COMMIT_FILE).is_file():
        return (folder / COMMIT_FILE).read_text().strip()
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
