"""The CPU kernels under ThreadSanitizer: on threads of their own, as it cannot follow those of torch's OpenMP."""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import parity
import patience
import pytest
from native_build import ROOT, compiler, load_builder, runtime_library

pytestmark = [pytest.mark.long, parity.needs_native]

MAIN = Path(__file__).with_name("cpu_races.cpp")
#: Operators in the dtypes that they take; two convolutions in a row take bfloat16 where it has instructions.
CALLS = dict.fromkeys(parity.ISAS, 30) | {"avx512bf16": 31}
#: Two tasks of the backward passes that leave their sums in one place.
RACE = (
    "partial_sums.h",
    "float* sums = data_.data + task * floats_;",
    "float* sums = data_.data + task / 2 * floats_;",
)
#: The last row of a band is not gathered, and read as it was allocated.
UNWRITTEN = ("row_ring.h", "map.stride, count, width_,", "map.stride, count - (count > 1), width_,")


def build(csrc: Path, folder: Path, isas: Sequence[str], sources: Sequence[str] | None = None) -> None:
    """Compiles the kernels of instruction sets, all or those in `sources`, and links all that the folder holds."""
    builder = load_builder(ROOT / "csrc")
    runtime_library("libtsan.so")
    common = ["-std=c++17", "-ffp-contract=fast", "-Wno-maybe-uninitialized", *builder.SANITIZE_THREAD_FLAGS]
    common += [f"-I{csrc / 'cpu'}", "-pthread", f"-DTABLES={','.join(f'{isa}_kernels' for isa in isas)}"]
    ninja = builder.Ninja(folder)

    def compile_one(source: Path, name: str, flags: list[str]) -> Path:
        return builder.compile_step(ninja, [*compiler(), *common, *flags], source, name)

    objects = [compile_one(MAIN, "main", [])]
    for isa in isas:
        for name in sources or builder.KERNEL_SOURCES:
            objects.append(compile_one(csrc / "cpu" / name, f"{isa}_{Path(name).stem}", builder.ISA_FLAGS[isa]))
    linked = {*objects, *(path for isa in isas for path in folder.glob(f"{isa}_*.o"))}
    ninja.add(folder / "races", [*compiler(), *common, *sorted(map(str, linked)), "-o", str(folder / "races")], objects)
    ninja.run(False)


def run(folder: Path) -> subprocess.CompletedProcess:
    fixed_places = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []  # or it finds no memory
    result = patience.run([*fixed_places, folder / "races"])
    if "unexpected memory mapping" in result.stderr or "personality" in result.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {result.stderr.splitlines()[0]}")
    return result


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("races")
    build(ROOT / "csrc", folder, parity.ISAS)
    return folder


def altered(folder: Path, header: str, line: str, faulty: str) -> Path:
    """A copy of csrc/ with another line in a header."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / "cpu" / header
    assert path.read_text().count(line) == 1
    path.write_text(path.read_text().replace(line, faulty))
    return folder / "csrc"


def test_no_two_threads_meet_and_nothing_is_read_unwritten(watched):
    result = run(watched)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "ThreadSanitizer" not in result.stderr
    tried = [line.split()[0] for line in result.stdout.splitlines()]
    assert {isa: tried.count(isa) for isa in parity.ISAS} == {isa: CALLS[isa] for isa in parity.ISAS}


def test_a_race_is_seen(watched, tmp_path):
    build(altered(tmp_path, *RACE), watched, parity.ISAS[-1:], ["depthwise_conv2d_backward.cpp"])
    result = run(watched)
    assert result.returncode == 66, (result.stdout + result.stderr)[-4000:]
    assert "ThreadSanitizer: data race" in result.stderr
    assert RACE[0] in result.stderr


def test_unwritten_scratch_is_seen(watched, tmp_path):
    build(altered(tmp_path, *UNWRITTEN), watched, parity.ISAS[-1:], ["depthwise_conv2d_backward.cpp"])
    result = run(watched)
    assert result.returncode == 1, (result.stdout + result.stderr)[-4000:]
    faults = [line for line in result.stdout.splitlines() if line.endswith(", hold a NaN")]
    assert len(faults) == 3
    assert all(" depthwise_conv2d_backward " in line for line in faults)
