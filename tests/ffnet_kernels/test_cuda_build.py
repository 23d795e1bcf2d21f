"""The build of the CUDA library, and the gate on its machine code. All of it runs without a GPU."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import native_build
import pytest

from ffnet_kernels import native

ROOT = native_build.ROOT
RESOURCES = ROOT / "tools" / "cuda_resources.py"
TABLE = ROOT / "docs" / "cuda-resources.json"
PREDICTED_ARCHITECTURE = "90"

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


def test_the_library_passes_the_gate(library, tmp_path):
    """For the architectures it was built for."""
    built = {str(architecture) for architecture in native.build_record()["cuda"]["architectures"]}
    content = json.loads(TABLE.read_text())
    kernels = {name: {a: row for a, row in rows.items() if a in built} for name, rows in content["kernels"].items()}
    content["kernels"] = {name: rows for name, rows in kernels.items() if rows}
    assert content["kernels"], f"the table has none of {sorted(built, key=int)}"
    if PREDICTED_ARCHITECTURE not in built:
        content["predictions"] = []
    table = tmp_path / TABLE.name
    table.write_text(json.dumps(content))
    result = gate(library, "--check", table)
    assert result.returncode == 0, result.stderr


# ---- the gate ----


def test_counts(machine_code, table):
    _, content = table
    assert list(content["kernels"]) == ["loop"]
    registers, stack, _, whole, loop = content["kernels"]["loop"]["90"]
    assert registers > 0
    assert stack == 0
    assert whole[column(content, "global_load")] >= 3
    assert loop[column(content, "fp32")] in (1, 2, 4)  # a pass, or ptxas unrolled it
    assert loop[column(content, "global_store")] == loop[column(content, "fp32")]
    assert sum(loop[1:-1]) == loop[0] < whole[0]


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
def tools(monkeypatch):
    """cuda_machine_code, cuda_stall_model, cuda_predictions and cuda_resources, which import each other by name."""
    monkeypatch.syspath_prepend(RESOURCES.parent)
    names = ("cuda_machine_code", "cuda_stall_model", "cuda_predictions", "cuda_resources")
    modules = {name: importlib.import_module(name) for name in names}
    yield SimpleNamespace(**{name.removeprefix("cuda_"): module for name, module in modules.items()})
    for name in names:
        sys.modules.pop(name, None)


#: Of the model's instructions: stall, barrier of the result, of the operands, barriers to wait for. 7: no barrier.
def instruction(code, address, name, stall=1, result=7, operand=7, waits=0, operands="", conditional=False):
    control = stall | result << 5 | operand << 8 | waits << 11
    return code.Instruction(address, name, operands, conditional, control)


def products(code, count, apart):
    """Products of sums that take turns, `apart` of them, as the assembler has them wait: 33 clocks for a result."""
    names = []
    for i in range(count):
        names.append(("HMMA.16816.F32", 2))
        if i % apart == apart - 1:
            names += [("NOP", 15)] * ((33 - 2 * apart) // 15) + [("NOP", (33 - 2 * apart) % 15)]
    return [instruction(code, 16 * i, name, stall) for i, (name, stall) in enumerate(names)]


def test_a_warp_alone_waits_for_its_results(tools):
    code, model = tools.machine_code, tools.stall_model
    load = [instruction(code, 0, "LDS", result=0), instruction(code, 16, "FADD", waits=1), *(
        instruction(code, 32 + 16 * i, "FADD", 4) for i in range(4))]  # fmt: skip
    alone, four = (model.clocks_a_panel(load, warps, 8) for warps in (1, 4))
    # The load's result after 33 clocks, an addition, four with 4 clocks each; four warps overlap all but the issue.
    assert alone == pytest.approx(33 + 1 + 4 * 4 + 0, abs=2)
    assert four < alone / 2
    assert four >= len(load)


def test_no_warp_count_beats_the_issue_or_a_unit(tools):
    code, model = tools.machine_code, tools.stall_model
    additions = [instruction(code, 16 * i, "FADD") for i in range(40)]
    special = [instruction(code, 16 * i, "MUFU.EX2") for i in range(40)]
    assert model.clocks_a_panel(additions, 4, 8) == pytest.approx(40, rel=0.02)
    assert model.clocks_a_panel(special, 4, 8) == pytest.approx(40 * 8, rel=0.02)


def test_a_planted_worse_schedule_is_found(tools):
    """The same products, each waiting for the one before, as where branches leave nothing to put between."""
    code, model = tools.machine_code, tools.stall_model
    good, bad = (model.clocks_a_panel(products(code, 70, apart), 3, 8) for apart in (7, 1))
    assert good == pytest.approx(70 * 6.4, rel=0.05)
    assert bad == pytest.approx(70 * 33 / 3, rel=0.1)


def test_resident_blocks(tools):
    resident = tools.stall_model.resident_blocks
    assert [resident(registers, 43008) for registers in (168, 169, 128, 255)] == [3, 2, 4, 2]
    assert resident(64, 100 * 1024) == 2  # as shared memory allows
    assert resident(16, 0) == 16  # as threads do


def test_waves(tools):
    """Blocks in a second wave, on few multiprocessors, cost what those of a first one do; memory caps the sum."""
    model = tools.stall_model
    gpu = model.Gpu("of a test", 4, 1e9, 4e12, "")

    def clocks(blocks, panel_bytes=1e-9):
        return model.clocks_of_grid(blocks, 2, [100.0, 150.0], [10.0, 10.0], panel_bytes, gpu)

    assert clocks([3] * 8) == pytest.approx(10 + 3 * 2 * 150)
    assert clocks([3] * 4) == pytest.approx(10 + 3 * 100)
    assert clocks([3] * 9) > clocks([3] * 8) + 300
    # 32 warps of 3 panels, 4000 bytes a clock.
    assert clocks([3] * 8, 1e6) == pytest.approx(10 + 32 * 3 * 1e6 / 4000, rel=0.01)


def test_splits_fill_whole_waves(tools):
    """As where 480 blocks of 3 panels were too many for 396 places."""
    split = tools.stall_model.split
    panels = split(16, 320, 16, 17, 3, 132)
    blocks = -(-(-(-16 // panels) * 320) // 4)
    assert blocks <= 396
    assert split(3, 4, 16, 17, 3, 132) == 1  # too few to fill it


@pytest.fixture
def built_code(tools, monkeypatch):
    """Kernels of some cases, in the shape that predictions are made of, of few instructions."""
    code = tools.machine_code

    def kernel(case):
        names = {8: "HMMA.1688.F32"}.get(case.size, "HMMA.16816.F32")
        inside = case.filter * case.filter * case.convolutions if case.full_turns else 0
        outside = case.products - inside * case.full_turns
        body = [names] * outside + ["STG.E"] * 4
        loop = [names] * inside + ["FADD"] * 3
        lines = [instruction(code, 16 * i, "MOV") for i in range(8)]
        place = 16 * len(lines)
        first = place
        for name in body:
            lines.append(instruction(code, place, name))
            place += 16
        if case.full_turns:
            begin = place
            for name in loop:
                lines.append(instruction(code, place, name))
                place += 16
            lines.append(instruction(code, place, "BRA", operands=hex(begin), conditional=True))
            place += 16
        lines.append(instruction(code, place, "BRA", operands=hex(first), conditional=True))
        return [*lines, instruction(code, place + 16, "EXIT")]

    sizes = {("token mixer", 64), ("token mixer", 16), ("token mixer", 8), ("depthwise", 14)}
    cases = [case for case in tools.predictions.CASES if (case.operator, case.size) in sizes]
    monkeypatch.setattr(tools.predictions, "CASES", cases)
    return {case.name(dtype): kernel(case) for case in cases for dtype in tools.predictions.DTYPES}


def predicted(tools, code):
    return tools.predictions.predict_all(code, dict.fromkeys(code, 128))


def test_lean_kernels_pass(tools, built_code):
    predictions, problems = predicted(tools, built_code)
    assert problems == []
    assert len(predictions) == len(tools.predictions.CASES) * 2
    assert {p.gpu.name for p in predictions} == {"H100 SXM", "H200"}


NAME = "attention_forward_kernel<{}, 7, aligned, PlaneRows<16>>"


@pytest.mark.parametrize("dtype", ["Half", "BFloat16"])
def test_a_prediction_over_its_limit_is_found(tools, built_code, dtype):
    code, name = tools.machine_code, NAME.format(dtype)
    loop = built_code[name]
    start = next(i for i, each in enumerate(loop) if each.name == "STG.E")
    loop[start:start] = [instruction(code, loop[start].address - 1, "MUFU.EX2", 15) for _ in range(500)]
    predictions, problems = predicted(tools, built_code)
    assert any(p.startswith("token mixer, 7x7 at 16x16, H200: predicted to take") for p in problems)
    assert not any("8x8" in p for p in problems)
    assert "**exceeded**" in tools.predictions.markdown(predictions)


@pytest.mark.parametrize("fault", ["gone", "a product less", "a branch around a product", "another loop"])
def test_code_that_would_be_read_wrongly_is_found(tools, built_code, fault):
    code, name = tools.machine_code, NAME.format("Half")
    kernel = built_code[name]
    place = next(i for i, each in enumerate(kernel) if each.name.startswith("HMMA"))
    if fault == "gone":
        del built_code[name]
    elif fault == "a product less":
        kernel[place] = instruction(code, kernel[place].address, "FADD")
    elif fault == "a branch around a product":
        target = hex(kernel[place + 2].address)
        kernel[place] = instruction(code, kernel[place].address, "BRA", operands=target, conditional=True)
    else:
        target = hex(kernel[place + 3].address)
        kernel[place + 9] = instruction(code, kernel[place + 9].address, "BRA", operands=target, conditional=True)
    _, problems = predicted(tools, built_code)
    assert [p for p in problems if p.startswith(f"{name}, sm_90: ")]


def test_predictions_that_grow_or_go_are_found(tools, built_code):
    rows = tools.predictions.table(predicted(tools, built_code)[0])
    compare = tools.resources.compare_predictions
    assert compare(rows, rows) == []
    worse = [dict(row) for row in rows]
    worse[0]["stalls"] += 5
    assert compare(worse, rows) == [
        f"token mixer, 3, 64, 80, H100 SXM: stalls grew from {rows[0]['stalls']} to {worse[0]['stalls']}"
    ]
    assert compare(rows[1:], rows) == ["token mixer, 3, 64, 80, H100 SXM: predicted in one table only"]


def test_the_table_has_a_row_a_case(tools, built_code, tmp_path):
    predictions, _ = predicted(tools, built_code)
    text = tools.resources.markdown({}, "0", predictions)
    assert text.count("| token mixer | 7×7 | 16² | 320 |") == 1
    path = tmp_path / "table.json"
    tools.resources.write_table(path, {}, "0", tools.predictions.table(predictions))
    assert len(json.loads(path.read_text())["predictions"]) == len(predictions)


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
