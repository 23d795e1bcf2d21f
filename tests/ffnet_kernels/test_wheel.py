"""The wheel and the source archive: their names and contents, and what is left where native libraries are missing.

Nothing is compiled here: one wheel is built where no compiler is, the other around the libraries that are there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import parity
import patience
import pytest
from native_build import load_builder

from ffnet_kernels import native

pytest.importorskip("setuptools", minversion="77")  # of which the package is built, not of what it runs on
pytest.importorskip("pip")
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
#: csrc/build.py of a machine where building is quick.
COPYING_BUILD = """
import shutil
def build(out, work, cuda):
    shutil.copytree({libraries!r}, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
"""


def command(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    unset = {"FFNET_KERNELS_CUDA_HOST": "", "FFNET_KERNELS_LIBRARY_DIR": "", "TRITON_INTERPRET": "0"}
    result = patience.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **unset, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The source archive."""
    folder = tmp_path_factory.mktemp("archive")
    command("setup.py", "--quiet", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder, cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def source(archive, tmp_path_factory) -> Path:
    """It, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    (path,) = folder.iterdir()
    return path


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    command("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, source, cwd=source, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """The wheel with the native libraries of this installation."""
    if native.cpu_library_error():
        pytest.skip("no native library was built")
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(source, folder / "source")
    (copy / "csrc" / "build.py").write_text(COPYING_BUILD.format(libraries=str(native.library_dir())))
    return build_wheel(copy, folder)


def info_of(folder: Path) -> dict:
    """What the package in a folder says of itself."""
    return json.loads(command("-m", "ffnet_kernels", "info", "--json", cwd=folder))


def info_of_a_working_reference(folder: Path) -> dict:
    code = """
import json, torch, ffnet, ffnet_kernels as fk
assert fk.available_backends() == ("reference",)
assert fk.selftest() == []
x, weight = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(4, 1, 3, 3)
y = fk.depthwise_conv2d(x, weight)
assert torch.equal(y, torch.nn.functional.conv2d(x, weight, padding=1, groups=4))
y.sum().backward()
assert x.grad.shape == x.shape
model = fk.optimize(ffnet.create_model("ffnet_1", num_classes=3).eval())
with torch.no_grad():
    for _ in range(2):
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
assert any(row.is_fused for row in fk.report(model).rows), fk.report(model)
print(json.dumps({"origin": fk.__file__, **fk.info()}))
"""
    info = json.loads(command("-c", code, cwd=folder))
    assert Path(info["origin"]).is_relative_to(folder)
    return info


def test_the_archive_holds_what_a_build_reads(archive, source):
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".py")}
    assert sources <= names
    assert {"LICENSE", "CHANGELOG.md", "README.md", "Makefile", "requirements.txt", "tools/compat.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "build_record.json"))]
    assert (source / "csrc" / "COMMIT").read_text().strip() == load_builder(ROOT / "csrc").source_commit(ROOT / "csrc")


def test_without_a_compiler_the_wheel_runs_its_reference(source, tmp_path):
    wheel = build_wheel(source, tmp_path, CXX="/bin/false")
    assert re.fullmatch(r"ffnet_kernels-[\d.]+-py3-none-any\.whl", wheel.name)
    target = tmp_path / "installed"
    command("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    info = info_of_a_working_reference(target)
    assert info["backends"]["cpu"] == "unavailable: no working C++ compiler (CXX=/bin/false)"
    assert info["libraries"] == info["usable_isas"] == []


def test_the_wheel(wheel):
    assert re.fullmatch(r"ffnet_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("ffnet_kernels/lib/build_record.json"))
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about).decode()
    assert {"ffnet_kernels/py.typed", "ffnet/py.typed"} <= set(names)
    assert {f"ffnet_kernels/lib/{name}" for name in record["libraries"]} <= set(names)
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "ffnet_kernels/backends/crossovers").glob("*.json")}
    assert tables
    assert tables <= set(names)
    assert {"commit", "compiler", "flags", "isas", "torch"} <= record.keys()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ffnet_kernels", "ffnet", "ffnet_benchmarks"}
    assert f"{about.removesuffix('METADATA')}licenses/LICENSE" in names
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata


def test_the_manylinux_tag(wheel, tmp_path):
    """Where auditwheel is: of the oldest system that has what the libraries need, with nothing put in."""
    pytest.importorskip("auditwheel")
    output = command(ROOT / "tools" / "wheel.py", wheel.parent, tmp_path, cwd=tmp_path)
    (tagged,) = tmp_path.iterdir()
    assert str(tagged) in output
    assert re.fullmatch(r"ffnet_kernels-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", tagged.name)
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(tagged) as after:
        assert {name for name in after.namelist() if not name.endswith("/")} == set(before.namelist())


def test_without_auditwheel_the_wheel_stays_as_it_is(wheel, tmp_path):
    code = f"""
import runpy, sys
sys.modules["auditwheel"] = None
sys.argv = ["wheel.py", {str(wheel.parent)!r}, {str(tmp_path)!r}]
runpy.run_path({str(ROOT / "tools" / "wheel.py")!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "wheel: no manylinux tag: auditwheel is not installed" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_an_installed_wheel_and_what_is_left_without_its_libraries(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    info = info_of(tmp_path)
    assert info["backends"]["cpu"] == "available"
    assert info["usable_isas"] == parity.ISAS
    library = tmp_path / "ffnet_kernels" / "lib" / native.CPU_LIBRARY
    assert str(library) in info["libraries"]
    for path in library.parent.glob("*.so"):
        path.unlink()
    info = info_of_a_working_reference(tmp_path)
    assert info["backends"]["cpu"] == f"unavailable: {library} is missing (it was built: install the package again)"
    assert info["libraries"] == info["usable_isas"] == []
