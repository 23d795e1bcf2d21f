"""The processes that ``python -m benchmarks gpu`` starts: with a build that only notes what it is asked, and a script
in the place of the sanitizer."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.cases import OPERATORS
from ffnet_kernels import native
from ffnet_kernels.backends import choice
from ffnet_kernels.selftest import cases

CPU = torch.device("cpu")


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """A build that only notes what it is asked for; what it writes, and what it was asked."""
    monkeypatch.delenv("FFNET_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("FFNET_KERNELS_LIBRARY_DIR", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(native, "library_dir", lambda: tmp_path)
    asked, outcome = [], {"code": 0, "missing": {}}

    def run(command, seconds, environment):
        asked.append(environment["FFNET_CUDA_ARCHS"])
        (tmp_path / "build_record.json").write_text(
            json.dumps({"missing": outcome["missing"], **outcome.get("cuda", {})})
        )
        return None if outcome["code"] is None else (outcome["code"], outcome.get("log", "the log"))

    monkeypatch.setattr(gpu, "finish", run)
    return outcome, asked


def test_the_library_is_built_for_this_gpu(builder, monkeypatch):
    outcome, asked = builder
    assert gpu.build_libraries(CPU, 10) == {"passed": True, "architectures": "89"}
    outcome["cuda"] = {"cuda": {"architectures": [75, 80]}}
    gpu.build_libraries(CPU, 10)
    gpu.build_libraries(CPU, 10)  # there is one for 8.0 now, which runs on 8.9
    outcome["cuda"] = {"cuda": {"architectures": [75, 90]}}
    gpu.build_libraries(CPU, 10)
    gpu.build_libraries(CPU, 10)
    monkeypatch.setenv("FFNET_CUDA_ARCHS", "90,100")
    gpu.build_libraries(CPU, 10)
    assert asked == ["89", "89", "75,80", "75,80", "89", "90,100"]


def test_why_there_is_no_library(builder, monkeypatch):
    outcome, asked = builder
    outcome["missing"] = {native.CUDA_LIBRARY: "no CUDA compiler (looked for nvcc)"}
    assert gpu.build_libraries(CPU, 10)["skipped"] == "no CUDA compiler (looked for nvcc)"
    outcome["missing"] = {native.CUDA_LIBRARY: "compilation failed: error"}
    row = gpu.build_libraries(CPU, 10)
    assert (row["passed"], row["error"]) == (False, "compilation failed: error\nthe log")
    outcome.update(code=1, log="ffnet-kernels: no native kernels")
    outcome["missing"] = {native.CUDA_LIBRARY: "no working C++ compiler"}
    assert gpu.build_libraries(CPU, 10)["skipped"] == "no working C++ compiler"
    outcome["log"] = "the log"
    assert gpu.build_libraries(CPU, 10) == {"passed": False, "architectures": "89", "error": "the log"}
    outcome["code"] = None
    assert gpu.build_libraries(CPU, 10) is None
    monkeypatch.setenv("FFNET_KERNELS_LIBRARY_DIR", "elsewhere")
    assert "FFNET_KERNELS_LIBRARY_DIR" in gpu.build_libraries(CPU, 10)["skipped"]
    assert len(asked) == 5


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """A command in the sanitizer's place: its script."""
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = tmp_path / gpu.SANITIZER

    def write(text):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)

    return write


def test_the_sanitizer(sanitizer, tmp_path):
    sanitizer(f'echo "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING" > {tmp_path}/seen')
    row = gpu.sanitize("racecheck", "k=3 ", 1000)
    assert row["passed"]
    options = f"--tool racecheck --error-exitcode 86 --kernel-name kns=ffnet {sys.executable}"
    seen = (tmp_path / "seen").read_text()
    assert seen == f"{options} -m ffnet_kernels selftest --backend cuda --filter k=3  1\n"
    sanitizer("echo RACECHECK SUMMARY: 1 hazard displayed; exit 86")
    row = gpu.sanitize("racecheck", "k=3 ", 1000)
    assert (row["passed"], row["error"]) == (False, "RACECHECK SUMMARY: 1 hazard displayed")


def test_the_sanitizer_is_stopped_in_time(sanitizer, tmp_path, monkeypatch):
    sanitizer(f"sleep 1000000 & echo $! >> {tmp_path}/children; wait")
    assert gpu.sanitize("memcheck", "k=3 ", 0.2) is None
    monkeypatch.setattr(gpu, "LONGEST", 2)
    assert gpu.sanitize("memcheck", "k=3 ", 1000)["error"] == "not finished after 2 s"
    children = tmp_path / "children"
    for child in children.read_text().split() if children.exists() else []:  # none where the machine is that slow
        with contextlib.suppress(OSError):  # there is no such process any more
            assert Path(f"/proc/{child}/cmdline").read_bytes() == b"", "dead, but for its entry"


def test_without_the_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.sanitize("memcheck", "k=3 ", 1000) == {
        "passed": True, "skipped": "compute-sanitizer is not there (looked on the path and in CUDA's folder)"
    }  # fmt: skip
    monkeypatch.setattr(choice, "why_unavailable", lambda name: f"no {name}")
    assert gpu.sanitize("memcheck", "k=3 ", 1000)["skipped"] == "no cuda"


def test_the_sanitizer_is_given_cases_of_every_kind():
    names = [case.name for case in cases()]
    for _, text in gpu.SANITIZED:
        assert {name.split()[0] for name in names if text in name} == set(OPERATORS)
