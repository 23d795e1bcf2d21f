"""Rules of the repository that no compiler checks."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ffnet_kernels import native
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.info import ENVIRONMENT

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"))
STABLE_HEADERS = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/shim")
VARIABLE = re.compile(r"""["'](FFNET_[A-Z0-9_]+)["']""")


def tracked() -> list[Path]:
    """Files of the repository; outside a clone (an archive), every file but build products."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        hidden = ("build", "dist", "lib")
        files = (p for p in ROOT.rglob("*") if p.is_file())
        return [p for p in files if not any(q.startswith(".") or q in hidden for q in p.relative_to(ROOT).parts)]


def needs(tool: str):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def needs_module(name: str):
    missing = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode != 0
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


needs_library = pytest.mark.skipif(bool(native.cpu_library_error()), reason="no native library was built")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "."], marks=needs_module("ruff"), id="ruff check"),
        pytest.param(["ruff", "format", "--check", "."], marks=needs_module("ruff"), id="ruff format"),
        pytest.param(["mypy"], marks=needs_module("mypy"), id="mypy"),
    ],
)
def test_lint(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def includes(source: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source.read_text(), re.MULTILINE)


def foreign_torch_header(name: str) -> bool:
    of_torch = name.startswith(("torch/", "ATen/", "c10/", "caffe2/")) or name == "torch.h"
    return of_torch and not name.startswith(STABLE_HEADERS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_sources_include_stable_torch_headers_only(source):
    assert not [name for name in includes(source) if foreign_torch_header(name)]


@pytest.mark.parametrize("source", [p for p in SOURCES if p.is_relative_to(CSRC / "cpu")], ids=lambda p: p.name)
def test_kernels_include_neither_torch_nor_python(source):
    assert not [name for name in includes(source) if re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", name)]


def test_kernels_and_python_know_the_same_activations():
    text = (CSRC / "activations.h").read_text().replace("\\\n", "")  # a macro of several lines
    (listed,) = re.findall(r"#define FFNET_ACTIVATIONS\(X\) (.*)", text)
    assert set(re.findall(r"X\((\w+)\)", listed)) == set(ACTIVATIONS)
    page = (ROOT / "docs" / "operators.md").read_text()
    assert [name for name in ACTIVATIONS if f"`{name}`" not in page] == []


def test_the_include_rule_can_fail(tmp_path):
    source = tmp_path / "bad.cpp"
    source.write_text('#include <torch/csrc/stable/ops.h>\n# include <ATen/ATen.h>\n#include "torch/extension.h"\n')
    assert [n for n in includes(source) if foreign_torch_header(n)] == ["ATen/ATen.h", "torch/extension.h"]


def unstable_symbols(listing: str) -> list[str]:
    """Undefined symbols that are C++ of torch, in what `nm --demangle` prints."""
    return re.findall(r"^\s+[UwvV] (.*\b(?:at|c10|torch|caffe2)::.*)$", listing, re.MULTILINE)


@needs("nm")
@needs_library
def test_the_library_needs_the_stable_abi_only():
    library = native.library_dir() / native.CPU_LIBRARY
    command = ["nm", "-D", "--undefined-only", "--demangle", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in listing
    assert not unstable_symbols(listing)
    assert not re.search(r"\bU Py|\bU _Py", listing)


def test_the_symbol_rule_can_fail():
    listing = "   U aoti_torch_get_size\n   U at::_ops::add::call(at::Tensor const&)\n   w c10::Error::what() const\n"
    assert len(unstable_symbols(listing)) == 2


def avx(disassembly: str) -> list[str]:
    """Instructions only later processors have, in what `objdump -d --no-show-raw-insn` prints."""
    found = []
    for line in disassembly.splitlines():
        mnemonic = re.match(r"\s*[0-9a-f]+:\s+(?:[a-z0-9]+ )*?(v\w+)\b", line)
        if re.search(r"%[yz]mm|%k[0-7]", line) or (mnemonic and mnemonic[1] not in ("verr", "verw")):
            found.append(line.strip())
    return found


def foreign_weak_functions(listing: str) -> list[str]:
    """What the linker may take from any object, outside the namespaces of instruction sets, in what `nm` prints."""
    weak = re.findall(r"^\S+ [WVu] (.*)$", listing, re.MULTILINE)
    return [name for name in weak if not re.match(r"_Z[A-Z]*?NK?5ffnet\d+avx|DW\.ref\.", name)]


def test_the_rule_of_weak_functions_can_fail():
    inline, own = "_ZNKSt6vectorIfSaIfEE4sizeEv", "_ZN5ffnet4avx23runIfEEvl"  # std::vector<float>::size(), avx2::run
    assert foreign_weak_functions(f"00 W {inline}\n00 W {own}\n00 T f\n") == [inline]


@pytest.fixture(scope="module")
def kernel_objects(tmp_path_factory) -> dict[str, list[Path]]:
    """Of the portable kernels, with what is compiled like them, and of those for AVX2."""
    work = tmp_path_factory.mktemp("objects")
    code = f"""
import sys; sys.path.insert(0, {str(CSRC)!r})
import subprocess, pathlib, build
work = pathlib.Path({str(work)!r})
ninja = build.Ninja(work)
build.plan(ninja, work, build.find_compiler(), False)
(work / "build.ninja").write_text("\\n".join(ninja.edges))
names = [f"{{isa}}_{{pathlib.Path(s).stem}}" for isa in ("baseline", "avx2") for s in build.KERNEL_SOURCES]
objects = [f"{{work}}/{{name}}.o" for name in [*names, "select"]]
subprocess.run([build.find_ninja(), "-C", str(work), *objects], check=True, stdout=subprocess.DEVNULL)
"""
    environment = {**os.environ, "FFNET_CPU_ISAS": "all"}
    built = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with_avx = sorted(work.glob("avx2_*.o"))
    return {"portable": sorted(set(work.glob("*.o")) - set(with_avx)), "avx2": with_avx}


needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have no AVX")


@pytest.mark.long
@needs("objdump")
@needs_library  # there is a compiler where there is a library
@needs_x86
def test_portable_objects_hold_no_avx(kernel_objects):
    def instructions(path: Path) -> list[str]:
        command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
        return avx(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert len(kernel_objects["portable"]) >= 4
    for path in kernel_objects["portable"]:
        assert not instructions(path), path
    assert instructions(kernel_objects["avx2"][0]), "the check itself finds AVX where it is"


@pytest.mark.long
@needs("nm")
@needs_library
@needs_x86
def test_nothing_of_other_processors_can_be_linked_into_the_portable_path(kernel_objects):
    for path in kernel_objects["avx2"]:
        command = ["nm", "--defined-only", str(path)]
        assert not foreign_weak_functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout), (
            path
        )


def imported(source: Path) -> set[str]:
    """Packages that a module imports anywhere in it; relative imports are its own."""
    nodes = list(ast.walk(ast.parse(source.read_text())))
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    names |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return {name.split(".")[0] for name in names}


def test_the_kernels_know_no_model():
    sources = list((ROOT / "ffnet_kernels").rglob("*.py"))
    assert any("torch" in imported(source) for source in sources)
    for source in sources:
        # suite.py finds the benchmarks by name when a command asks for them.
        assert not imported(source) & {"ffnet", "benchmarks", "ffnet_benchmarks", "tests", "timm"}, source
        assert "ffnet_benchmarks" not in source.read_text() or source.name == "suite.py", source


def test_importing_the_models_loads_no_benchmark():
    others = {"benchmarks", "ffnet_benchmarks", "matplotlib", "timm", "PIL"}
    code = f"import sys, ffnet; print(sorted({others} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def variables() -> set[str]:
    found = set()
    for path in tracked():
        shipped = path.parts[len(ROOT.parts)] in ("ffnet_kernels", "ffnet", "benchmarks", "csrc", "setup.py")
        if shipped and path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            found |= set(VARIABLE.findall(path.read_text()))
    return found


def test_every_environment_variable_is_listed():
    assert variables() == set(ENVIRONMENT)


def test_every_environment_variable_is_documented():
    rows = re.findall(r"^\|\s*`(FFNET_[A-Z0-9_]+)`", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(ENVIRONMENT)
    assert "](docs/install.md)" in (ROOT / "README.md").read_text()


def test_files_stay_readable_and_small():
    code = (".py", ".cpp", ".h", ".cu", ".cuh")
    long = {str(p): n for p in tracked() if p.suffix in code and (n := p.read_text().count("\n")) > 600}
    assert not long
    large = {str(p): p.stat().st_size for p in tracked() if p.stat().st_size > 1 << 20}
    assert not large


def test_file_names_of_tests_are_unique():
    """They share one namespace: the folders are no packages, so as not to shadow the packages they test."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    assert len(names) == len(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_checkout_is_what_is_tested():
    import ffnet_kernels

    assert Path(os.path.realpath(ffnet_kernels.__file__)).is_relative_to(ROOT)
