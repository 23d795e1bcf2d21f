"""Importing is cheap and complete without kernels; the command line tells what is there and checks it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import native_build
import parity
import patience
import pytest
import torch

import ffnet_kernels as fk
from ffnet_kernels import native
from ffnet_kernels.backends import choice
from ffnet_kernels.ops._operator import Operator


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Without the kernels that only tests run on the processor."""
    unset = {"TRITON_INTERPRET": "0", "FFNET_KERNELS_CUDA_HOST": ""}
    return patience.run([sys.executable, *arguments], env={**os.environ, **unset, **environment})


@pytest.fixture
def without_kernels(tmp_path):
    return {"FFNET_KERNELS_LIBRARY_DIR": str(tmp_path)}


def test_kernels_are_there_where_a_compiler_is():
    """Nothing else here runs without: a build that fails silently would skip the tests of every kernel."""
    if native_build.has_compiler():
        assert native.cpu_library_error() is None
        assert parity.ISAS


def test_import_takes_nothing_but_torch():
    code = """
import sys
sys.modules.update(dict.fromkeys(("triton", "timm", "matplotlib", "PIL", "pybind11", "ninja")))
import torch
import subprocess
def refuse(*_, **__): raise AssertionError("import starts a process")
subprocess.Popen.__init__ = refuse
import ffnet_kernels
loaded = [m for m in ("ffnet", "benchmarks", "torch._inductor", "torch._dynamo", "setuptools") if m in sys.modules]
print(loaded, ffnet_kernels.available_backends()[-1])
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] reference"


def test_without_libraries_the_reference_runs(without_kernels):
    code = """
import torch, ffnet_kernels as fk
x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3)
assert torch.equal(fk.depthwise_conv2d(x, w), torch.nn.functional.conv2d(x, w, padding=1, groups=4))
raw = torch.ops.ffnet_kernels.depthwise_conv2d(x, w, None, [1, 1], [1, 1, 1, 1], "none")
assert torch.equal(raw, fk.depthwise_conv2d(x, w))
print(fk.available_backends(), fk.info()["backends"]["cpu"], fk.info()["libraries"], fk.selftest())
"""
    result = run("-c", code, **without_kernels)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("('reference',) unavailable: nothing was built into")
    assert result.stdout.strip().endswith("[] []")


def test_the_build_record_gives_the_reason(without_kernels, tmp_path):
    record = {"missing": {native.CPU_LIBRARY: "no working C++ compiler"}}
    (tmp_path / "build_record.json").write_text(json.dumps(record))
    result = run("-c", "import ffnet_kernels as fk; print(fk.info()['backends']['cpu'])", **without_kernels)
    assert result.stdout.strip() == "unavailable: no working C++ compiler"


@parity.needs_native
@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF"])
def test_a_broken_library_is_a_reason(without_kernels, tmp_path, content):
    (tmp_path / native.CPU_LIBRARY).write_bytes(content)
    code = "import torch, ffnet_kernels as fk; fk.depthwise_conv2d(torch.ones(1, 4, 8, 8), torch.ones(4, 1, 3, 3)); "
    result = run("-c", code + "print(fk.info()['backends']['cpu'])", **without_kernels)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"unavailable: {native.CPU_LIBRARY} does not load: ")


DAMAGES = {
    "cut short": lambda content: content[: len(content) // 2],
    "altered": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
}


@parity.needs_native
@pytest.mark.parametrize("record", ["whole", "cut short", "missing"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_not_loaded(without_kernels, tmp_path, damage, record):
    """Loading one that was cut short would end the process; so would the benchmarks' helper, which loads it too."""
    shutil.copytree(native.library_dir(), tmp_path, dirs_exist_ok=True)
    library, paper = tmp_path / native.CPU_LIBRARY, tmp_path / "build_record.json"
    whole = library.read_bytes()
    library.write_bytes(DAMAGES[damage](whole))
    paper.write_text({"whole": paper.read_text(), "cut short": paper.read_text()[:300], "missing": "[]"}[record])
    if damage == "altered" and record != "whole":
        return  # nobody can know
    code = "import torch, ffnet_kernels as fk; fk.depthwise_conv2d(torch.ones(1, 4, 8, 8), torch.ones(4, 1, 3, 3)); "
    code += "from ffnet_kernels import native; print(native.helper(), fk.info()['backends']['cpu'])"
    result = run("-c", code, **without_kernels)
    assert result.returncode == 0, result.stderr
    what = {
        "cut short": f"it has {len(whole) // 2} bytes instead of {len(whole)}",
        "altered": "its SHA-256 is not that of the build record",
    }[damage]
    assert result.stdout == f"None unavailable: {native.CPU_LIBRARY} is damaged: {what} (install the package again)\n"


@pytest.mark.long
@parity.needs_native
@pytest.mark.parametrize("content", [b"", b"not a library", None])
def test_the_helper_is_optional(without_kernels, tmp_path, content):
    """Without it, or with a broken one, everything but the benchmarks' questions to the processor works."""
    shutil.copy(native.library_dir() / native.CPU_LIBRARY, tmp_path)
    if content is not None:
        name = next(native.library_dir().glob("_native*")).name
        (tmp_path / name).write_bytes(content)
    code = """
import torch, ffnet_kernels as fk
from ffnet_kernels import native
print(fk.available_backends(), fk.info()["usable_isas"], fk.info()["isa"], native.helper())
print({check.variant for check in fk.selftest(text="depthwise_conv2d k=7 s=1") if check.passed})
print(fk.explain("depthwise_conv2d", torch.ones(1, 16, 8, 8), torch.ones(16, 1, 7, 7)).variant)
"""
    result = run("-c", code, **without_kernels)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"('cpu', 'reference') {parity.ISAS} {parity.ISAS[-1]} None"
    assert ast.literal_eval(lines[1]) == set(parity.ISAS)
    assert re.match(rf"{parity.ISAS[-1]}, \d+ channels a vector; unrolled rows, ", lines[2])


def test_info():
    result = run("-m", "ffnet_kernels", "info")
    assert result.returncode == 0
    for name in fk.info():
        assert f"{name}:" in result.stdout


def test_info_as_json():
    result = run("-m", "ffnet_kernels", "info", "--json", FFNET_KERNELS_BACKEND="reference")
    assert result.returncode == 0
    answer = json.loads(result.stdout)
    assert answer.keys() == fk.info().keys()
    assert answer["torch"] == torch.__version__
    assert answer["usable_isas"] == parity.ISAS
    assert answer["environment"]["FFNET_KERNELS_BACKEND"] == "reference"


@pytest.mark.long
@parity.needs_native
def test_selftest_passes():
    result = run("-m", "ffnet_kernels", "selftest", "--verbose")
    assert result.returncode == 0, result.stdout
    assert result.stdout.strip().endswith("passed, 0 failed")
    assert all(f"ok   cpu/{isa}: " in result.stdout for isa in parity.ISAS)


def test_selftest_without_kernels(without_kernels):
    result = run("-m", "ffnet_kernels", "selftest", **without_kernels)
    assert result.returncode == 0
    assert "no kernel (reference only)" in result.stdout


@pytest.mark.parametrize("arguments", [(), ("speed",), ("info", "--xml")])
def test_wrong_arguments(arguments):
    result = run("-m", "ffnet_kernels", *arguments)
    assert result.returncode == 2
    assert "usage: ffnet-kernels" in result.stderr


def off_by_a_little(out):
    out.view(-1)[out.numel() // 2] += (1e-4 if out.dtype == torch.float32 else 0.1) * out.abs().max()


def unwritten(out):
    out.view(-1)[-1] = float("nan")


@parity.needs_native
@pytest.mark.parametrize("fault", [off_by_a_little, unwritten])
@pytest.mark.parametrize("operator", ["depthwise_conv2d", "ffnified_attention"])
def test_selftest_finds_a_fault(monkeypatch, operator, fault):
    """One wrong element fails every check of the operator, and no other."""
    correct = Operator.on

    def wrong(self, backend, *args):
        out = correct(self, backend, *args)
        if (self.name, backend) == (operator, "cpu"):
            out = out.contiguous()
            fault(out)
        return out

    monkeypatch.setattr(Operator, "on", wrong)
    monkeypatch.setattr(choice, "available_backends", lambda: ("cpu", "reference"))
    checks = fk.selftest()
    assert {check.case.startswith(operator) for check in checks if not check.passed} == {True}
    assert not [check for check in checks if check.passed and check.case.startswith(operator)]
    assert [check for check in checks if check.passed]
