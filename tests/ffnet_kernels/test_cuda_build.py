"""The build of the CUDA library, and the gate on its machine code. All of it runs without a GPU."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest

from ffnet_kernels import native

ROOT = native_build.ROOT
RESOURCES = ROOT / "tools" / "cuda_resources.py"
TABLE = ROOT / "docs" / "cuda-resources.json"

# A loop with an FFMA and a store a pass, and a kernel that does nothing; one whose array, indexed at run time, lies in
# local memory.
LOOP = """
__global__ void nothing(float*) {}
__global__ void loop(float* x, int count) {
  float sum = x[0];
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    sum = sum * x[1] + x[2];
    x[i + 3] = sum;
  }
}
"""
SPILL = """
__global__ void spill(float* x, int count) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[i] = x[i];
  for (int i = 0; i < count; ++i) values[(i * 7) % 32] += x[i];
  for (int i = 0; i < count; ++i) x[i] = values[(i * 5) % 32];
}
"""


@pytest.fixture(scope="module")
def builder():
    return native_build.load_builder(ROOT / "csrc")


@pytest.fixture(scope="module")
def nvcc(builder):
    """For all architectures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFNET_CUDA_ARCHS", "all")
        try:
            return builder.find_nvcc(native_build.compiler())
        except builder.CannotBuild as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="module")
def machine_code(nvcc, tmp_path_factory):
    """{name: object for sm_90} of the two kernels above, with a build record beside them."""
    folder = tmp_path_factory.mktemp("objects")
    objects = {}
    for name, source in (("loop", LOOP), ("spill", SPILL)):
        (folder / f"{name}.cu").write_text(source)
        objects[name] = folder / f"{name}.o"
        command = [*nvcc.command, "-arch=sm_90", "-c", str(folder / f"{name}.cu"), "-o", str(objects[name])]
        subprocess.run(command, check=True)
    (folder / "build_record.json").write_text(json.dumps({"cuda": {"nvcc": "13.0.1"}}))
    return objects


def gate(*arguments) -> subprocess.CompletedProcess:
    result = subprocess.run([sys.executable, str(RESOURCES), *map(str, arguments)], capture_output=True, text=True)
    if "no cuobjdump" in result.stderr:
        pytest.skip(result.stderr.strip())
    return result


@pytest.fixture
def table(machine_code, tmp_path):
    """The table of the loop, to be altered; `check` runs the gate against it."""
    path = tmp_path / "table.json"
    assert gate(machine_code["loop"], "--write", path).returncode == 0
    return path, json.loads(path.read_text())


def check(machine_code, path: Path, content: dict) -> subprocess.CompletedProcess:
    path.write_text(json.dumps(content))
    return gate(machine_code["loop"], "--check", path)


def column(content: dict, name: str) -> int:
    return content["columns"].index(name) - 3


@pytest.fixture
def library():
    path = native.library_dir() / native.CUDA_LIBRARY
    if not path.exists():
        pytest.skip(native.build_record().get("missing", {}).get(native.CUDA_LIBRARY, f"{path} is missing"))
    return path


# ---- the library that was built ----


def symbols(library: Path, kind: str) -> list[tuple[str, str]]:
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    listing = subprocess.run(["nm", "-D", "-P", kind, str(library)], capture_output=True, text=True, check=True).stdout
    return [(line.split()[0], line.split()[1]) for line in listing.splitlines()]


def test_the_library_asks_only_for_the_stable_abi_and_the_system(library):
    """Names of the C and C++ runtime have a version, weak ones may be absent."""
    foreign = [
        name
        for name, kind in symbols(library, "--undefined-only")
        if kind not in "wv"
        and not name.startswith(("aoti_torch_", "torch_"))
        and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)
    ]
    assert foreign == []


def test_the_library_shows_none_of_its_cuda_runtime(library):
    assert [name for name, _ in symbols(library, "--defined-only") if name.startswith(("cuda", "__cuda"))] == []


def test_only_a_torch_with_cuda_loads_it(library, monkeypatch):
    import torch

    monkeypatch.delenv("FFNET_KERNELS_CUDA_HOST", raising=False)
    error = native.cuda_library_error.__wrapped__()
    assert error == (f"torch {torch.__version__} is a build without CUDA" if torch.version.cuda is None else None)


def test_the_library_passes_the_gate(library):
    if not TABLE.exists():
        pytest.skip(f"{TABLE.name} was not written yet")
    built = {str(architecture) for architecture in native.build_record()["cuda"]["architectures"]}
    expected = {a for rows in json.loads(TABLE.read_text())["kernels"].values() for a in rows}
    if built != expected:
        pytest.skip(f"built for {sorted(built, key=int)}, the table is of {sorted(expected, key=int)}")
    result = gate(library, "--check", TABLE)
    assert result.returncode == 0, result.stderr


# ---- the gate ----


def test_counts(machine_code, table):
    _, content = table
    assert list(content["kernels"]) == ["loop"]
    registers, stack, _, whole, loop, phases = content["kernels"]["loop"]["90"]
    assert registers > 0
    assert stack == 0
    assert whole[column(content, "global_load")] >= 3
    assert loop[column(content, "fp32")] in (1, 2, 4)  # a pass, or ptxas unrolled it
    assert loop[column(content, "global_store")] == loop[column(content, "fp32")]
    assert sum(loop[1:-1]) == loop[0] < whole[0]
    assert phases is None


def test_an_unchanged_library_passes(machine_code, table):
    result = check(machine_code, *table)
    assert result.returncode == 0, result.stderr


def test_a_spill_is_found(machine_code):
    result = gate(machine_code["spill"])
    assert result.returncode == 1
    assert re.search(r"spill, sm_90: \d+ bytes of stack", result.stderr)


@pytest.mark.parametrize(("place", "name"), [(3, "total"), (4, "total"), (4, "other"), (3, "fp32")])
def test_growth_is_found(machine_code, table, place, name):
    path, content = table
    counts = content["kernels"]["loop"]["90"][place]
    counts[column(content, name)] = int(counts[column(content, name)] / 1.1)
    result = check(machine_code, path, content)
    assert result.returncode == 1
    assert f"loop, sm_90: {name} {'of the main loop ' if place == 4 else ''}grew from" in result.stderr


def test_growth_of_registers_is_found(machine_code, table):
    path, content = table
    content["kernels"]["loop"]["90"][0] -= 1
    assert "loop, sm_90: registers grew from" in check(machine_code, path, content).stderr


def test_another_compiler_is_not_held_to_counts(machine_code, table):
    path, content = table
    content["nvcc"] = "12.8"
    content["kernels"]["loop"]["90"][3][0] //= 2
    result = check(machine_code, path, content)
    assert result.returncode == 0
    assert "counts are not compared" in result.stdout


def test_missing_and_new_kernels_are_found(machine_code, table):
    path, content = table
    rows = content["kernels"].pop("loop")
    content["kernels"]["gone"] = rows
    result = check(machine_code, path, content)
    assert result.returncode == 1
    assert "gone, sm_90 is missing" in result.stderr
    assert "loop, sm_90 is not in the committed table" in result.stderr
    content["kernels"] = {"loop": {**rows, "80": rows["90"]}}
    assert "loop, sm_80 is missing" in check(machine_code, path, content).stderr


# ---- predictions ----


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(RESOURCES.parent)
    specification = importlib.util.spec_from_file_location("cuda_resources", RESOURCES)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "cuda_resources", module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def counts(resources, **given: int) -> list[int]:
    return [given.get(name, 0) for name in resources.COUNTS]


def streaming_kernels(resources) -> dict:
    """All kernels that predictions are made of, with main loops as they must be, of few instructions."""
    kernels = {}
    for case in resources.CASES:
        products = {"hmma_k16" if case.size > 8 else "hmma_k8": case.rows * case.rows * case.convolutions}
        optional = case.convolutions == 2  # the residual
        phases = {
            "turn": counts(resources, total=70),
            "fetch": counts(resources, total=140, global_load=4) if optional else counts(resources),
            "row": counts(resources, total=350, **products),
            "result": counts(resources, total=140, global_store=2 * case.rows),
            "residual": counts(resources, total=35, shared_load=14) if optional else counts(resources),
            "setup": counts(resources, total=160),
        }
        row = [96, 0, 1024, counts(resources), counts(resources), [phases[phase] for phase in resources.PHASES]]
        kernels |= {name: {resources.PREDICTED_ARCHITECTURE: row} for name in case.kernels()}
    return kernels


# The shape of a streaming kernel's code: each line an address, an instruction, and where a branch leads.
STREAM = """
00 MUFU.RCP
10 @BRA 40
20 IADD3
30 BRA 60
40 FMUL
50 FMUL
60 ISETP
61 @BRA 70
62 IADD3
63 @BRA 66
64 I2F.RP
65 MUFU.RCP
66 IADD3
70 @BRA a0
80 LDGSTS.E.128
90 LDGDEPBAR
a0 @BRA 130
b0 LDS
c0 @BRA 100
d0 MUFU.EX2
e0 FADD
f0 BRA 110
100 FSEL
110 F2FP
120 HMMA.16816.F32
130 BRA.DIV 1d0
140 @BRA 170
150 FMUL
151 @BRA 154
152 LDS
153 FADD
154 STG.E
170 ISETP
180 @BRA 60
190 IADD3
1a0 @BRA 00
1b0 EXIT
1d0 SHFL
1e0 BRA 140
"""


def test_the_main_loop_is_split_into_phases(resources):
    code = sys.modules["cuda_machine_code"]
    instructions = []
    for line in STREAM.split("\n")[1:-1]:
        address, name, target = re.fullmatch(r"(\w+) ([@\w.]+) ?(\w*)", line).groups()
        operands = f"0x{target}" if target else ""
        instructions.append(code.Instruction(int(address, 16), name.lstrip("@"), operands, name.startswith("@")))
    loops = code.find_loops(instructions)
    assert [(loop[0].address, loop[-1].address) for loop in loops] == [(0x60, 0x180), (0, 0x1A0)]
    main = code.main_loop(loops)
    assert main is loops[0]
    found = dict(zip(code.PHASES, code.phases(loops, main), strict=True))
    parts = {
        "turn": {"total": 8},  # ISETP twice, and the six branches of the loop that nothing skips
        "fetch": {"total": 2, "global_load": 1, "shared_clocks": 4},
        "row": {"total": 7, "shared_load": 1, "mufu": 1, "fp32": 1, "hmma_k16": 1, "shared_clocks": 1},  # no FSEL
        "result": {"total": 3, "fp32": 1, "global_store": 1},
        "residual": {"total": 2, "shared_load": 1, "fp32": 1, "shared_clocks": 1},
        # The longer side of the if-else, and what opens a panel in the loop, without a division.
        "setup": {"total": 9, "mufu": 1, "fp32": 2},
    }
    for phase, expected in parts.items():
        named = {name: n for name, n in zip(code.COUNTS, found[phase], strict=True) if n and name != "other"}
        assert named == expected, phase


def test_how_often_phases_are_executed(resources):
    token_mixer = resources.Case("any", "any", rows=7, convolutions=2, size=16, maps=3, limit=1.3)
    # 22 steps in four turns of the loop.
    assert token_mixer.passes() == [4, 4, 16 / 7, 16 / 7, 16 / 7, 1]
    one = resources.Case("any", "any", rows=3, convolutions=1, size=32, maps=2, limit=1.5)
    assert one.passes() == [11, 0, 32 / 3, 32 / 3, 0, 1]


def test_predicted_clocks(resources):
    phases = [
        counts(resources, total=80),
        counts(resources, total=40, shared_clocks=56),
        counts(resources, total=160, hmma_k16=14, hmma_k8=6, mufu=16, shared_clocks=40),
        counts(resources, total=24),
        counts(resources, total=10, shared_clocks=4),
        counts(resources, total=800, mufu=8),
    ]
    clocks = resources.clocks(phases, [2, 1, 8, 4, 4, 1], size=8, maps=3)
    assert clocks == {
        "issue": (2 * 80 + 40 + 8 * 160 + 4 * 24 + 4 * 10 + 800) / 8 / 4,
        "tensor": 2 * 14 + 6,
        "special": 2 * (16 + 1),
        "shared": 56 / 8 + 40 + 4 * 4 / 8,
        "memory": pytest.approx(128 * 6 / 14.46),
    }
    assert resources.ratio(clocks) == pytest.approx(75.5 / (128 * 6 / 14.46))


def test_predictions_within_their_limits_pass(resources):
    assert resources.predictions(streaming_kernels(resources)) == []


@pytest.mark.parametrize("dtype", ["Half", "BFloat16"])
def test_a_prediction_over_its_limit_is_found(resources, tmp_path, monkeypatch, dtype):
    kernels = streaming_kernels(resources)
    architecture = resources.PREDICTED_ARCHITECTURE
    row = json.loads(json.dumps(kernels[f"attention_forward_kernel<{dtype}, 7, alone>"][architecture]))
    row[5][resources.PHASES.index("setup")][0] *= 10
    kernels[f"attention_forward_kernel<{dtype}, 7, alone>"] = {architecture: row}
    library, table = tmp_path / "library.so", tmp_path / "table.json"
    library.touch()
    resources.write_table(table, kernels, "unknown")
    monkeypatch.setattr(resources, "collect", lambda path: kernels)
    monkeypatch.setattr(sys, "argv", ["resources.py", str(library), "--check", str(table)])
    with pytest.raises(SystemExit) as exit:
        resources.main()
    # (2 · (70 + 140) + 8/7 · (350 + 140 + 35) + 1600) / 8 rows / 4 = 81.9 clocks, against 53.1 of memory
    ours = "token mixer, 7x7 at 8x8: predicted to take 1.54 times as long as its memory accesses, the limit is 1.3"
    assert ours in str(exit.value.code).splitlines()
    assert "16x16" not in str(exit.value.code)
    assert "| token mixer | 7×7 | 8² | 81.9 | 14.0 | 0.0 | 0.0 | 53.1 | **1.54** | 1.3 **exceeded** | 1.00 |" in (
        resources.markdown(kernels, "unknown")
    )


@pytest.mark.parametrize("phase", ["row", "result", "fetch", "residual"])
def test_a_main_loop_that_is_read_wrongly_is_found(resources, phase):
    kernels = streaming_kernels(resources)
    name = "attention_forward_kernel<Half, 7, aligned>"
    phases = kernels[name][resources.PREDICTED_ARCHITECTURE][5]
    place = resources.PHASES.index(phase)
    phases[0], phases[place] = phases[place], phases[0]
    assert any(p.startswith(f"{name}, sm_90: its main loop does not have") for p in resources.predictions(kernels))


# ---- what is built ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80,90", [80, 90]),
        ("90 80;80", [80, 90]),
        (" 120, ", [120]),
        ("all", [75, 80, 90, 100, 120]),
        ("none", []),
        ("", None),
        (None, None),
    ],
)
def test_architectures(builder, monkeypatch, text, expected):
    monkeypatch.delenv("FFNET_CUDA_ARCHS", raising=False)
    if text is not None:
        monkeypatch.setenv("FFNET_CUDA_ARCHS", text)
    assert builder.requested_architectures() == expected


@pytest.mark.parametrize("text", ["sm_90", "9.0", "90a", "80,all", "9"])
def test_wrong_architectures_are_told(tmp_path, text):
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, env={"FFNET_CUDA_ARCHS": text}, capture_output=True, text=True)
    assert result.returncode == 2
    message = f"ffnet-kernels: FFNET_CUDA_ARCHS={text!r} is neither 'all' nor 'none' nor a list such as '80,90'"
    assert result.stderr.strip() == message
    assert list(tmp_path.glob("*.so")) == []


def test_an_architecture_that_nvcc_lacks_is_told(builder, nvcc, monkeypatch):
    monkeypatch.setenv("FFNET_CUDA_ARCHS", "80,35")
    with pytest.raises(ValueError, match=r"cannot build for \[35\], only for \[.*80"):
        builder.find_nvcc(native_build.compiler())


def test_all_architectures_are_one_of_each_major(nvcc, monkeypatch):
    majors = [architecture // 10 for architecture in nvcc.architectures]
    assert majors == sorted(set(majors))
    assert nvcc.target_flags()[-1].endswith(f"code=compute_{nvcc.architectures[-1]}")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([(9, 0), (9, 0)], [90]), ([(12, 0), (8, 0)], [80, 120]), ([(3, 5), (9, 0)], [90]), ([(3, 5)], None), ([], None)],
)
def test_unless_asked_it_is_built_for_the_gpus_that_are_here(nvcc, builder, monkeypatch, gpus, expected):
    monkeypatch.delenv("FFNET_CUDA_ARCHS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: gpus[index])
    if expected is not None:
        assert builder.find_nvcc(native_build.compiler()).architectures == expected
        return
    reason = r"cannot build for any of \[35\]" if gpus else "torch finds no GPU here to build it for"
    with pytest.raises(builder.CannotBuild, match=reason):
        builder.find_nvcc(native_build.compiler())


@pytest.fixture
def small_build(tmp_path, monkeypatch):
    """The builder of a copy of csrc/, whose CPU library is one empty file, to be quick."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cu"))
    builder = native_build.load_builder(tmp_path / "csrc")

    def plan(ninja, out, compiler, sanitize):
        source = tmp_path / "empty.cpp"
        source.write_text("")
        output = out / builder.CPU_LIBRARY
        ninja.add(output, [*compiler, "-shared", "-fPIC", str(source), "-o", str(output)], [source])
        return {"libraries": [builder.CPU_LIBRARY], "missing": {}}

    native_build.compiler()
    monkeypatch.setattr(builder, "plan", plan)
    monkeypatch.setenv("FFNET_CUDA_ARCHS", "90")
    (tmp_path / "csrc" / "cuda" / "kernel.cu").write_text("__global__ void kernel() { this is no C++ }\n")
    return builder, tmp_path


def assert_only_the_cpu_library(builder, folder) -> str:
    """There is a record and a CPU library; returns why there is no other, not even one of an earlier build."""
    (folder / "lib").mkdir()
    (folder / "lib" / native.CUDA_LIBRARY).write_bytes(b"old")
    assert builder.build(folder / "lib", folder / "work", cuda=True) is None
    assert [path.name for path in (folder / "lib").glob("*.so")] == [native.CPU_LIBRARY]
    record = json.loads((folder / "lib" / "build_record.json").read_text())
    assert record["libraries"] == [native.CPU_LIBRARY]
    return record["missing"][native.CUDA_LIBRARY]


def test_without_nvcc_there_is_a_cpu_library(small_build, monkeypatch):
    builder, folder = small_build
    monkeypatch.setenv("CUDA_HOME", str(folder))
    assert assert_only_the_cpu_library(builder, folder) == f"no CUDA compiler (looked for {folder}/bin/nvcc)"


def test_an_nvcc_that_fails_leaves_the_cpu_library(small_build, monkeypatch):
    builder, folder = small_build
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    assert assert_only_the_cpu_library(builder, folder) == f"{folder}/bin/nvcc does not work: no licence"


def test_left_out_on_request(small_build, monkeypatch):
    builder, folder = small_build
    monkeypatch.setenv("FFNET_CUDA_ARCHS", "none")
    assert assert_only_the_cpu_library(builder, folder) == "left out by FFNET_CUDA_ARCHS='none'"


def test_a_kernel_that_does_not_compile_leaves_the_cpu_library(small_build, nvcc, monkeypatch):
    builder, folder = small_build
    monkeypatch.setenv("FFNET_CUDA_ARCHS", "90")
    reason = assert_only_the_cpu_library(builder, folder)
    assert re.match(r"compilation failed: .*kernel\.cu\(1\): error:", reason)
