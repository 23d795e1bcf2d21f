"""``python -m benchmarks gpu`` without a GPU: its plan, and planted steps in processes that only a script runs in."""

import json
import sys
import time
import types

import pytest
import torch

from benchmarks import gpu, report
from benchmarks.contenders import COMPILED, COPY, EAGER, EAGER_NCHW
from benchmarks.gpu import Section, Step
from benchmarks.results import Measurement, Result, Row
from ffnet_kernels import native

CANNED = "depthwise_conv2d 320x16x16 k7 b128 bfloat16 forward"

#: Does what a step's name says, and says what it did.
SCRIPT = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    name = line.strip()
    print(name, os.getpid(), file=sys.stderr, flush=True)
    if "hangs" in name:
        time.sleep(1e6)
    if "dies" in name:
        os._exit(7)
    row = {"passed": "wrong" not in name, "process": os.getpid()}
    if name == "library":
        row["machine"] = {"device": "Fake 9000", "name": "fake", "commit": "abc"}
    if "timed" in name:
        who = name.partition(": ")[2]
        row |= {"case": "case", "flops": 8, "bytes": 6, "measurement": {"contender": who, "samples_ms": [2.0, 4.0]}}
        row["measurement"] |= {"passed": True, "repeats": 1}
    print(json.dumps(row), flush=True)
"""


def sections(*steps, seconds=30.0, first="library"):
    named = [one if isinstance(one, Step) else Step(one, seconds, None) for one in steps]
    return [Section("device", 30, (Step(first, 30, None),)), Section("a", 30, tuple(named))]


@pytest.fixture
def command(tmp_path):
    """Runs planted sections; returns the exit code, and what the steps printed into the log."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(planted, *arguments, seconds=None):
        total = sum(section.seconds for section in planted) if seconds is None else seconds
        given = ["--small", "--out", str(tmp_path / "out"), "--budget", str(total), *arguments]
        code = gpu.run(gpu._parser().parse_args(given), [sys.executable, "-S", script], planted)
        log = [line.split() for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
        return code, [" ".join(words) for *words, _ in log]

    run.out = tmp_path / "out"
    return run


def rows_of(folder):
    _, *rows = map(json.loads, (folder / gpu.FILE).read_text().splitlines())
    return {row["step"]: row for row in rows}


def test_every_row_is_on_disk_and_done_once(command):
    assert command(sections("one", "two")) == (0, ["library", "one", "two"])
    assert sorted(path.name for path in command.out.iterdir()) == ["gpu-fake.json", "log.txt", gpu.FILE, "summary.md"]
    rows = rows_of(command.out)
    assert [(row["section"], row["passed"]) for row in rows.values()] == [("device", True), ("a", True), ("a", True)]
    assert command(sections("one", "two", "three"))[1] == ["library", "one", "two", "library", "three"]
    assert command(sections("one"), "--again")[1][-2:] == ["library", "one"]
    assert Result.from_json((command.out / "gpu-fake.json").read_text()).machine["device"] == "Fake 9000"


def test_what_failed_is_tried_again_and_a_line_that_was_cut_off_is_not_read(command):
    assert command(sections("wrong", "right"))[0] == 1
    with (command.out / gpu.FILE).open("a") as file:
        file.write('{"section": "a", "step": "cut o')
    assert command(sections("wrong", "right"))[1][3:] == ["library", "wrong"]


def test_rows_of_other_sources_are_forgotten(command, monkeypatch):
    command(sections("one"))
    monkeypatch.setattr(gpu, "digest", lambda: "changed")
    assert command(sections("one"))[1] == ["library", "one"] * 2


def test_a_step_that_hangs_or_dies_stops_nothing(command, capsys):
    planted = sections(Step("hangs", 0.3, None), "dies", "one", Step("hangs too", 0.3, None), "two")
    begun = time.monotonic()
    assert command(planted)[0] == 1
    assert time.monotonic() - begun < 20
    rows = rows_of(command.out)
    assert rows["hangs"]["error"] == "not finished after 0.3 s"
    assert rows["dies"]["error"] == "its process ended (7)"
    assert rows["one"]["passed"]
    assert rows["two"]["passed"]
    processes = [rows[name].get("process") for name in ("library", "one", "two")]
    assert len(set(processes)) == 3
    assert "a: FAIL hangs (0." in capsys.readouterr().out


def test_time_is_up(command, capsys):
    planted = [*sections("one"), Section("b", 0, (Step("late", 9, None),))]
    assert command(planted, seconds=0.0)[0] == 1
    assert rows_of(command.out) == {}
    assert "b: 0 of 0 passed, 1 left: run again to go on" in capsys.readouterr().out


def test_deadlines_scale_with_the_budget(command):
    """Of a step's, and of a section's, which ends what it is at."""
    planted = [
        *sections(Step("hangs", 30, None)),
        Section("b", 30, (Step("hangs too", 90, None), Step("left", 9, None))),
    ]
    command(planted, seconds=1.5)
    errors = {name: row.get("error", "") for name, row in rows_of(command.out).items()}
    assert errors["hangs"] == "not finished after 0.5 s"
    assert errors["hangs too"].startswith("not finished after ")
    assert "left" not in errors


def test_only_what_is_asked_for(command):
    planted = [*sections("one", "two"), Section("b", 30, (Step("one more", 9, None),))]
    assert command(planted, "--only", "a", "--filter", "o")[1] == ["library", "one", "two"]
    assert command(planted, "--filter", "one")[1][3:] == ["library", "one more"]


def test_contenders_of_a_case_become_a_row(command, capsys):
    assert command(sections("timed: cuda nchw", "timed: copy"))[0] == 0
    (row,) = Result.from_json((command.out / "gpu-fake.json").read_text()).rows
    assert [(m.contender, m.median_ms) for m in row.measurements] == [("cuda nchw", 3.0), ("copy", 3.0)]
    assert "|  1.00x |" in (command.out / "summary.md").read_text()
    assert "device: 1 of 1 passed\na: 2 of 2 passed\n" in capsys.readouterr().out


def test_ctrl_c(command, monkeypatch):
    def interrupted(*_):  # as Ctrl-C does where it is not ignored, as in background jobs of shells
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_section", interrupted)
    assert command(sections("one"))[0] == 130


@pytest.fixture
def broken_library(command, monkeypatch):
    """A library that does not load until it was built; the builds."""
    builds, outcome = [], {"code": 0}
    perform = gpu.Workers.perform

    def performed(self, name, seconds):
        row = perform(self, name, seconds)
        return row if name != "library" or builds else {"passed": False, "error": "not loaded", "architecture": "89"}

    def finish(command, seconds, environment):
        builds.append(environment)
        return None if outcome["code"] is None else (outcome["code"], "the log")

    monkeypatch.delenv("FFNET_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("FFNET_KERNELS_LIBRARY_DIR", raising=False)
    monkeypatch.setattr(native, "library_dir", lambda: command.out)
    monkeypatch.setattr(gpu.Workers, "perform", performed)
    monkeypatch.setattr(gpu, "finish", finish)
    return builds, outcome


def test_a_library_that_does_not_load_is_built(command, broken_library):
    builds, _ = broken_library
    assert command(sections("one"))[0] == 0
    assert builds == [{"FFNET_CUDA_ARCHS": "89"}]
    row = rows_of(command.out)["library"]
    assert (row["passed"], row["built"], row["was"]) == (True, "89", "not loaded")


@pytest.mark.parametrize(("code", "error"), [(1, "the log"), (None, "the build was not finished after 240 s")])
def test_a_library_that_cannot_be_built(command, broken_library, code, error):
    broken_library[1]["code"] = code
    assert command(sections("one"))[0] == 1
    rows = rows_of(command.out)
    assert rows["library"]["error"] == error
    assert rows["one"]["passed"], "what needs no library"


def test_a_library_that_the_user_named_is_not_built(command, broken_library, monkeypatch):
    monkeypatch.setenv("FFNET_KERNELS_LIBRARY_DIR", str(command.out))
    assert command(sections("one"))[0] == 1
    assert broken_library[0] == []


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr() == ("", "benchmarks gpu: there is no GPU\n")


@pytest.mark.parametrize("options", [["--budget", "soon"], ["--fast"]])
def test_wrong_options(options):
    with pytest.raises(SystemExit) as exit_:
        gpu.main(options)
    assert exit_.value.code == 2


def test_the_plan():
    large, small = gpu.plan(), gpu.plan(small=True)
    assert sum(section.seconds for section in large) == gpu.BUDGET < 540
    names = [step.name for section in large for step in section.steps]
    assert len(names) == len(set(names))
    assert [len(section.steps) for section in large] == [len(section.steps) for section in small]
    small_names = [step.name for section in small for step in section.steps]
    assert len(small_names) == len(set(small_names))
    assert all(step.seconds <= section.seconds for section in large for step in section.steps)
    by_name = {section.name: [step.name for step in section.steps] for section in large}
    assert by_name["device"][0] == "library"
    for direction in ("forward", "backward"):
        assert by_name[direction][0].endswith(f"{direction}: cuda nchw")
        for contender in ("copy", "add", "cuda channels-last", EAGER, EAGER_NCHW):
            assert any(name.endswith(f": {contender}") for name in by_name[direction])
    assert any(" b512 " in name for name in by_name["forward"])
    assert [section.steps[0].under[:1] for section in large if section.name in ("counters", "rest")] == [
        ("ncu",), ("compute-sanitizer",)
    ]  # fmt: skip


def canned_row():
    def measured(name, ms, **options):
        return Measurement(name, samples_ms=(ms, ms, 2 * ms), repeats=1, **{"error": 1e-3, "passed": True, **options})

    measurements = [
        measured("cuda nchw", 1.0), measured("triton channels-last", 1.5), measured(EAGER_NCHW, 4.0),
        measured(EAGER, 2.0, error=None, passed=False), Measurement(COMPILED, reason="RuntimeError: no compiler\nmore"),
        measured(COPY, 0.8),
    ]  # fmt: skip
    return Row(CANNED, 10**9, 3 * 10**9, tuple(measurements))


def test_the_table(monkeypatch, tmp_path):
    document = tmp_path / "cuda-resources.json"
    row = {"operator": "depthwise, GELU", "filter": 7, "map": 16, "gpu": "H200", "ratio_128": 1.3, "ratio_512": 1.1}
    document.write_text(json.dumps({"predictions": [row, {**row, "gpu": "H100 SXM", "ratio_128": 1.4}]}))
    monkeypatch.setattr(report, "PREDICTIONS", document)
    result = Result({"device": "NVIDIA H200, 3 multiprocessors", "commit": "abc"}, [canned_row()])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.gpu_table(result).splitlines()[-8:]]
    assert lines[0] == list(report.GPU_HEADERS)
    assert {line[0] for line in lines[2:]} == {CANNED}
    assert [line[1:] for line in lines[2:]] == [
        ["cuda nchw", "1.0000", "1.0000..1.5000", "3000", "1.25x", "1.30x", "1.0e-03", "ok"],
        ["triton channels-last", "1.5000", "1.5000..2.2500", "2000", "1.88x", "-", "1.0e-03", "ok"],
        [EAGER_NCHW, "4.0000", "4.0000..6.0000", "750", "5.00x", "-", "1.0e-03", "ok"],
        [EAGER, "2.0000", "2.0000..3.0000", "1500", "2.50x", "-", "nan", "WRONG"],
        [COMPILED, "-", "-", "-", "-", "-", "-", "did not run"],
        [COPY, "0.8000", "0.8000..1.2000", "3750", "1.00x", "-", "1.0e-03", "ok"],
    ]
    other = Result({"device": "Fake", "commit": "abc"}, [canned_row()])
    assert "1.30x" not in report.gpu_table(other)
    monkeypatch.setattr(report, "PREDICTIONS", tmp_path / "missing.json")
    assert "1.30x" not in report.gpu_table(result)


def test_the_predictions_of_the_repository_are_found():
    """The file is written by another program: were its table to change, predictions would silently be gone."""
    found = report.predictions(report.PREDICTIONS, "NVIDIA H200")
    assert {f"{operator} {size}x{size} k7" for operator in gpu.SHAPES for size in (8, 16)} <= found.keys()
    assert all(1 <= ratio < 10 for ratio in found.values())


def test_the_summary_says_what_failed():
    wrong = {"passed": False, "errors": {"output": [0.5, 0.25], "x": [None, 0.25], "bias": [0.1, 0.2]}}
    parts = {"a": {"rows": {"a 1": {"passed": True}, "a 2": wrong, "a 3": {"passed": True, "skipped": "no tool"}}}}
    result = types.SimpleNamespace(machine={"device": "Fake", "commit": "abc"}, rows=[], extra={"parts": parts})
    text, failed = report.gpu_summary(result, {})
    assert failed
    assert "a: 1 of 2 passed\n  skipped: no tool\n  a 2: output 5.0e-01 > 2.5e-01, x nan > 2.5e-01" in text
