"""The CPU kernels under ThreadSanitizer: on threads of their own, as it cannot follow those of torch's OpenMP."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import parity
import pytest
from native_build import ROOT, compiler, load_builder, runtime_library

from ffnet_kernels import native

pytestmark = [pytest.mark.sanitize, parity.needs_native]

MAIN = Path(__file__).with_name("cpu_races.cpp")
#: Two tasks of the backward passes that leave their sums in one place.
FAULT = ("float* sums = data_.data + task * floats_;", "float* sums = data_.data + task / 2 * floats_;")


def build(csrc: Path, folder: Path, sources: list[str]) -> None:
    """Compiles kernels of the present instruction set into the folder, and links all that it holds."""
    builder = load_builder(ROOT / "csrc")
    runtime_library("libtsan.so")
    flags = ["-std=c++17", "-ffp-contract=fast", "-Wno-maybe-uninitialized", f"-DKERNELS={native.isa()}_kernels"]
    flags += [*builder.SANITIZE_THREAD_FLAGS, *builder.ISA_FLAGS[native.isa()], f"-I{csrc / 'cpu'}", "-pthread"]

    def compile_one(source: Path) -> None:
        command = [*compiler(), *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        subprocess.run(command, check=True, timeout=500)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, [*(csrc / "cpu" / name for name in sources), MAIN]))
    objects = sorted(map(str, folder.glob("*.o")))
    subprocess.run([*compiler(), *flags, *objects, "-o", str(folder / "races")], check=True, timeout=100)


def run(folder: Path) -> subprocess.CompletedProcess:
    fixed_places = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []  # or it finds no memory
    result = subprocess.run([*fixed_places, folder / "races"], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in result.stderr or "personality" in result.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {result.stderr.splitlines()[0]}")
    return result


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("races")
    build(ROOT / "csrc", folder, load_builder(ROOT / "csrc").KERNEL_SOURCES)
    return folder


def test_no_two_threads_meet(watched):
    result = run(watched)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "ThreadSanitizer" not in result.stderr
    assert len(result.stdout.splitlines()) == 27  # operators in the dtypes that they take


def test_a_race_is_seen(watched, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "cpu" / "partial_sums.h"
    assert header.read_text().count(FAULT[0]) == 1
    header.write_text(header.read_text().replace(*FAULT))
    build(tmp_path / "csrc", watched, ["depthwise_conv2d_backward.cpp"])
    result = run(watched)
    assert result.returncode == 66, (result.stdout + result.stderr)[-4000:]
    assert "ThreadSanitizer: data race" in result.stderr
    assert "partial_sums.h" in result.stderr
