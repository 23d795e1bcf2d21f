"""The programs that watch steps of ``python -m benchmarks gpu``, scripts in their place; and the whole, rehearsed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from ffnet_kernels import native

CSV = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum"
"","","us","Mbyte"
"0","kernel, of two","12.5","42"
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a script in a tool's place."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(name, text):
        script = folder / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)

    return write


class NoWorkers:
    def restart(self):
        pass


def perform(step, seconds=100.0):
    return gpu._perform(step, seconds, NoWorkers(), gpu._parser().parse_args(["--small"]))


def step(section, text):
    return next(s for one in gpu.plan(small=True) if one.name == section for s in one.steps if text in s.name)


def test_the_sanitizer(tool, tmp_path):
    watched = step("rest", "racecheck ffnified")
    tool(
        "compute-sanitizer", f'echo "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING" > {tmp_path}/seen; echo \'{{"passed": true}}\''
    )
    assert perform(watched)["passed"]
    options = f"--error-exitcode 86 --kernel-name kns=ffnet --tool racecheck {sys.executable}"
    asked = f"-m benchmarks gpu --small --hang nothing --run {watched.name} 1"
    assert (tmp_path / "seen").read_text() == f"{options} {asked}\n"
    tool("compute-sanitizer", "echo '{\"passed\": true}'; echo RACECHECK SUMMARY: 1 hazard displayed; exit 86")
    row = perform(watched)
    assert not row["passed"]
    assert row["error"].endswith("RACECHECK SUMMARY: 1 hazard displayed")


def test_a_tool_is_stopped_in_time(tool, tmp_path):
    tool("compute-sanitizer", f"sleep 1000000 & echo $! >> {tmp_path}/children; wait")
    assert perform(step("rest", "memcheck"), 0.5) == {"passed": False, "error": "not finished after 0.5 s"}
    children = tmp_path / "children"
    for child in children.read_text().split() if children.exists() else []:  # none where the machine is that slow
        with contextlib.suppress(OSError):  # there is no such process any more
            assert Path(f"/proc/{child}/cmdline").read_bytes() == b"", "dead, but for its entry"


def test_a_tool_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "FOLDERS", (str(tmp_path / "*"),))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    row = perform(step("counters", "ncu"))
    assert row == {"passed": True, "skipped": "ncu is not there (looked on the path and in CUDA's folders)"}
    folder = tmp_path / "2025.3"
    folder.mkdir()
    (folder / "ncu").write_text("")
    (folder / "ncu").chmod(0o755)
    assert gpu._tool("ncu") == str(folder / "ncu")


def test_counters_of_a_launch(tool):
    tool("ncu", f"cat <<'END'\n{CSV}END\necho '{{\"passed\": true}}'")
    row = perform(step("counters", "ncu"))
    assert row["passed"]
    assert row["counters"]["gpu__time_duration.sum"] == "12.5 us"
    assert row["counters"]["Kernel Name"] == "kernel, of two"
    assert gpu.counters("==ERROR== no permission") == {}


@pytest.mark.long
def test_the_whole_rehearsed(tool, tmp_path):
    """Every section, on the processor: the steps of one shape, of which some hang."""
    if not native.cuda_host_library():
        pytest.skip("FFNET_KERNELS_CUDA_HOST is not set")
    run_what_follows = 'while [ "$1" != "$FFNET_PYTHON" ]; do shift; done; "$@"'
    tool("compute-sanitizer", run_what_follows)
    tool("ncu", f"{run_what_follows}\ncat <<'END'\n{CSV}END")
    command = [sys.executable, "-m", "benchmarks", "gpu", "--small", "--out", tmp_path / "out", "--again"]
    environment = {**os.environ, "FFNET_PYTHON": sys.executable, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parents[2]
    chosen = ["--filter", "16x16 k7 b3 bfloat16 forward", "--hang", "eager channels-last", "--budget", "1000"]
    done = subprocess.run([*command, *chosen], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / gpu.FILE).read_text().splitlines()[1:]]
    assert rows, done.stderr
    assert {row["section"] for row in rows} == {"device", "forward", "counters", "compile", "rest"}
    for row in rows:
        expected = "eager channels-last" not in row["step"]
        assert row["passed"] == expected, row
        assert expected or row["error"].startswith("not finished after")
    (counted,) = (row for row in rows if row["step"].startswith("ncu ffnified"))
    assert counted["counters"]["dram__bytes_read.sum"] == "42 Mbyte"
    assert len(list((tmp_path / "out").iterdir())) <= 8
