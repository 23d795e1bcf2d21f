"""``python -m benchmarks gpu`` without a GPU: its parts with planted steps, its checks and rows on the CPU."""

import json
import pickle
import time

import pytest
import torch

from benchmarks import gpu, report
from benchmarks.cases import OperatorCase
from benchmarks.contenders import COMPILED, COPY, EAGER, EAGER_NCHW
from benchmarks.results import Measurement, Result, Row
from ffnet_kernels import ops
from ffnet_kernels.backends import choice
from ffnet_kernels.backends.triton import INTERPRETED, configs, tune
from ffnet_kernels.backends.triton.launch import recording
from ffnet_kernels.ops._operator import Operator

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: there is a real GPU")

CPU = torch.device("cpu")
CANNED = "depthwise_conv2d 320x16x16 k7 b128 bfloat16 forward"
HEADER = {"device": "cpu", "source": "abc", "commit": "0123"}


def session(seconds=100.0, compiler=lambda jobs, deadline: []):
    return gpu.Session(CPU, time.monotonic() + seconds, compiler)


@pytest.fixture
def parts(monkeypatch):
    """Two parts of planted steps; what ran, in order."""
    ran, planted = [], {}

    def step(name):
        def run():
            ran.append(name)
            outcome = planted.get(name, {"passed": True})
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return gpu.Step(name, run, [name])

    monkeypatch.setattr(gpu, "PARTS", {name: lambda s, n=name: map(step, (f"{n} 1", f"{n} 2")) for name in ("a", "b")})
    return ran, planted


def test_a_part_is_done_once_for_the_same_sources_and_gpu(parts, tmp_path):
    ran, _ = parts
    path = tmp_path / "a.json"
    assert gpu.run_part("a", session(), path, HEADER) == []
    assert gpu.run_part("a", session(), path, HEADER) == []
    assert ran == ["a 1", "a 2"]
    assert json.loads(path.read_text()) == {
        **HEADER, "rows": {"a 1": {"passed": True}, "a 2": {"passed": True}}, "left": []
    }  # fmt: skip
    gpu.run_part("a", session(), path, {**HEADER, "commit": "4567"})
    assert len(ran) == 2
    gpu.run_part("a", session(), path, {**HEADER, "source": "changed"})
    gpu.run_part("a", session(), path, {**HEADER, "source": "changed", "device": "another"})
    assert len(ran) == 6


def test_a_step_that_fails_stops_nothing(parts, tmp_path):
    parts[1]["a 1"] = RuntimeError("no kernel image")
    assert gpu.run_part("a", session(), tmp_path / "a.json", HEADER) == []
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows == {"a 1": {"passed": False, "error": "RuntimeError: no kernel image"}, "a 2": {"passed": True}}


def test_time_is_up(parts, tmp_path):
    ran, planted = parts
    assert gpu.run_part("a", session(0), tmp_path / "a.json", HEADER) == ["a 1", "a 2"]
    assert ran == []
    planted["a 1"] = None  # cut short
    assert gpu.run_part("a", session(), tmp_path / "a.json", HEADER) == ["a 1"]
    assert json.loads((tmp_path / "a.json").read_text())["left"] == ["a 1"]
    planted.clear()
    assert gpu.run_part("a", session(), tmp_path / "a.json", HEADER) == []
    assert ran == ["a 1", "a 2", "a 1"]


def test_only_steps_with_the_text(parts, tmp_path):
    assert gpu.run_part("a", session(), tmp_path / "a.json", HEADER, "2") == []
    assert parts[0] == ["a 2"]
    assert json.loads((tmp_path / "a.json").read_text())["left"] == ["a 1"]


def test_a_lost_gpu_is_recorded_where_it_was_lost(parts, tmp_path, monkeypatch):
    def lost(device):
        raise tune.DeviceLostError("illegal address")

    monkeypatch.setattr(tune, "check_alive", lost)
    with pytest.raises(tune.DeviceLostError):
        gpu.run_part("a", session(), tmp_path / "a.json", HEADER)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["rows"] == {"a 1": {"passed": False, "error": "DeviceLostError: illegal address"}}
    assert record["left"] == ["a 2"]


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr() == ("", "benchmarks gpu: there is no GPU\n")


@pytest.mark.parametrize("options", [["--only", "nothing"], ["--budget", "soon"], ["--fast"]])
def test_wrong_options(options):
    with pytest.raises(SystemExit) as exit_:
        gpu.main(options)
    assert exit_.value.code == 2


def test_default_options():
    options = gpu._parser().parse_args([])
    assert (options.only, options.filter, options.again, options.budget) == ([], "", False, 480)
    assert options.work.parts[-2:] == ("build", "gpu")
    assert options.out.parts[-2:] == ("benchmarks", "results")


@pytest.fixture
def fake_gpu(parts, tmp_path, monkeypatch):
    """The whole command on a machine that seems to have a GPU; what it is started with again, if it is."""
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune, "check_alive", lambda device: None)
    monkeypatch.setattr(tune, "device_line", lambda device: "Fake 9000, 3 multiprocessors")
    monkeypatch.setattr(configs, "device_name", lambda device: "fake_9000")
    monkeypatch.setattr(configs, "_TUNED", tmp_path)
    monkeypatch.setattr(gpu.os, "execv", lambda program, arguments: started.append(arguments[2:]))
    bench = {"passed": True, "row": json.loads(Result({}, [canned_row()]).to_json())["rows"][0]}
    parts[1]["bench 1"] = bench
    gpu.PARTS["bench"] = lambda s: iter([gpu.Step("bench 1", lambda: bench)])
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return lambda *options: gpu.main([*folders, *options]), tmp_path, started


def canned_row():
    def measured(name, ms, **options):
        return Measurement(name, samples_ms=(ms, ms, 2 * ms), repeats=1, **{"error": 1e-3, "passed": True, **options})

    measurements = [
        measured("cuda nchw", 1.0), measured("triton channels-last", 1.5), measured(EAGER_NCHW, 4.0),
        measured(EAGER, 2.0, error=None, passed=False), Measurement(COMPILED, reason="RuntimeError: no compiler\nmore"),
        measured(COPY, 0.8),
    ]  # fmt: skip
    return Row(CANNED, 10**9, 3 * 10**9, tuple(measurements))


def test_the_command_writes_one_file_and_prints_the_table_last(fake_gpu, parts, capsys):
    run, folder, _ = fake_gpu
    assert run() == 0
    text = capsys.readouterr().out
    assert text.rstrip().splitlines()[-1].startswith(f"| {CANNED} | copy ")
    assert "a: 2 of 2 passed\nb: 2 of 2 passed\nbench: 1 of 1 passed\n" in text
    assert "torch.compile channels-last: RuntimeError: no compiler more" in text
    result = Result.from_json((folder / "out" / "gpu-fake_9000.json").read_text())
    assert result.machine["device"] == "Fake 9000, 3 multiprocessors"
    assert {"commit", "torch", "triton", "cuda", "source"} <= result.machine.keys()
    assert result.rows[0].case == CANNED
    assert result.extra["parts"]["a"]["rows"].keys() == {"a 1", "a 2"}
    assert not result.interrupted
    assert run() == 0
    assert parts[0] == ["a 1", "a 2", "b 1", "b 2"]
    assert run("--again", "--only", "b") == 0
    assert parts[0] == ["a 1", "a 2", "b 1", "b 2", "b 1", "b 2"]


def test_the_command_says_what_failed_and_what_is_left(fake_gpu, parts, capsys):
    run, folder, _ = fake_gpu
    parts[1]["a 2"] = {"passed": False, "errors": {"output": [0.5, 0.25], "x": [None, 0.25], "bias": [0.1, 0.2]}}
    assert run("--only", "a") == 1
    assert "a: 1 of 2 passed\n  a 2: output 5.0e-01 > 2.5e-01, x nan > 2.5e-01\n" in capsys.readouterr().out
    assert run("--budget", "0", "--only", "b") == 1
    assert "b: 0 of 0 passed, 2 left: run again to go on" in capsys.readouterr().out
    assert Result.from_json((folder / "out" / "gpu-fake_9000.json").read_text()).interrupted


def test_the_command_after_ctrl_c(fake_gpu, parts, capsys):
    run, folder, _ = fake_gpu
    parts[1]["a 2"] = KeyboardInterrupt()
    assert run() == 130
    assert "a: 1 of 1 passed\n" in capsys.readouterr().out
    assert Result.from_json((folder / "out" / "gpu-fake_9000.json").read_text()).interrupted


def test_the_command_goes_on_in_a_new_process_after_a_lost_gpu(fake_gpu, monkeypatch, capsys):
    run, folder, started = fake_gpu

    def lost(device):
        raise tune.DeviceLostError("illegal address")

    monkeypatch.setattr(tune, "check_alive", lost)
    run("--again", "--only", "a", "--only", "b", "--filter", "1")
    ((command, budget, *rest),) = [(a[:2], a[2:4], *a[4:]) for a in started]
    assert command == ["benchmarks", "gpu"]
    assert budget[0] == "--budget"
    assert 400 < float(budget[1]) <= 480
    expected = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--filter", "1"]
    assert rest == [*expected, "--only", "a", "--only", "b"]
    assert "starting again after illegal address" in capsys.readouterr().out


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
    assert {f"{operator} {size}x{size} k7" for operator in gpu.HEADLINE_OPERATORS for size in (8, 16)} <= found.keys()
    assert all(1 <= ratio < 10 for ratio in found.values())


def test_steps_have_names_of_their_own(monkeypatch):
    monkeypatch.setattr(configs, "device_name", lambda device: "fake")
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    steps = {name: [step.name for step in part(session())] for name, part in gpu.PARTS.items()}
    for names in (*steps.values(), steps["headline"] + steps["bench"]):
        assert len(names) == len(set(names)) > 0
    assert len(steps["parity-triton"]) == 5 * 3 * 2 * 3 * 2
    assert len(steps["parity-cuda"]) == 4 * 3 * 2 * 2 * 2
    assert steps["headline"] == [
        f"{operator} {stage} k7 b128 bfloat16 forward"
        for stage in ("320x16x16", "640x8x8")
        for operator in ("ffnified_attention", "depthwise_conv2d")
    ]
    assert len(steps["headline"] + steps["bench"]) == 5 * 3 * 2 + 2
    cases = {case.name: len(case.layouts) for case in gpu.selftest_cases()}
    narrow = [layouts for name, layouts in cases.items() if " k=7 " in name]
    assert len(gpu.selftest_work("cuda")) == len(steps["selftest-cuda"]) == 3 * sum(cases.values())
    assert len(gpu.selftest_work("triton")) == sum(cases.values()) + 2 * sum(narrow) > 80


def test_a_backend_that_is_not_there_is_one_skipped_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "why_unavailable", lambda name: f"no {name} here")
    for part in ("selftest-cuda", "parity-cuda", "selftest-triton", "parity-triton"):
        name = part.split("-")[1]
        gpu.run_part(part, session(), tmp_path / f"{part}.json", HEADER)
        row = {"passed": True, "skipped": f"no {name} here"}
        assert json.loads((tmp_path / f"{part}.json").read_text())["rows"] == {f"all of {name}": row}
    assert f"skip all of {name}" in capsys.readouterr().out


def test_what_was_skipped_is_tried_again_and_not_counted(fake_gpu, parts, capsys):
    run, _, _ = fake_gpu
    parts[1]["a 1"] = {"passed": True, "skipped": "no tool"}
    run("--only", "a")
    assert "a: 1 of 1 passed\n  skipped: no tool\n" in capsys.readouterr().out
    del parts[1]["a 1"]
    run("--only", "a")
    assert parts[0] == ["a 1", "a 2", "a 1"]
    assert "a: 2 of 2 passed\n" in capsys.readouterr().out


def test_a_new_library_is_loaded_by_a_new_process(fake_gpu, monkeypatch, capsys):
    run, _, started = fake_gpu
    monkeypatch.setattr(gpu, "build_libraries", lambda device, seconds: {"passed": True})
    monkeypatch.setattr(gpu, "library_state", lambda: (1, 2))
    gpu.PARTS["build"] = gpu.build_steps
    assert run("--only", "build") == 130
    assert len(started) == 1
    assert "starting again after the CUDA library was built" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "_LOADED", (1, 2))  # as in that process
    assert run("--only", "build") == 0
    assert len(started) == 1
    assert "build: 2 of 2 passed" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("operator", ["depthwise_conv2d", "ffnified_attention", "channel_mixer"])
def test_parity(operator):
    row = gpu.check_parity("triton", OperatorCase(operator, 1, 4, 4, 3, "nchw", "bfloat16"), CPU)
    assert row["passed"], row
    assert {"output", "weight" if operator != "ffnified_attention" else "key"} <= row["errors"].keys()
    json.dumps(row, allow_nan=False)


@interpreted
@pytest.mark.parametrize("fault", ["output", "gradient", "not written"])
def test_parity_finds_a_fault(fault, monkeypatch):
    def faulty(self, backend, x, weight, bias, *rest):
        out = ops.depthwise_conv2d.reference(x, weight, bias, *rest)
        if fault == "output":
            return out + 0.01
        return (
            torch.empty_like(out) + 0 * out
            if fault == "not written"
            else out + 0.01 * (bias - bias.detach()).view(-1, 1, 1)
        )

    monkeypatch.setattr(Operator, "on", faulty)
    assert not gpu.check_parity("triton", OperatorCase("depthwise_conv2d", 1, 4, 4, 3), CPU)["passed"]


@interpreted
def test_the_selftest_runs_the_kernels_it_has_compiled():
    name = next(name for name in gpu.selftest_work("triton") if "k=3 s=2 m=2" in name)
    with recording() as launches:
        gpu.start_selftest_case(name)
    assert {"depthwise_conv2d_forward_kernel", "filter_gradients_kernel"} <= {
        found.kernel.__name__ for found in launches
    }
    operator, args = gpu.selftest_work("triton")[name]
    x, weight, bias, *rest = args
    assert gpu._check_on("triton", CPU, operator, (x[:1, :2], weight[:4], bias[:4], *rest))["passed"]


def test_kernels_of_the_next_steps_are_compiled_first(parts, tmp_path, monkeypatch):
    ran, _ = parts
    monkeypatch.setattr(gpu, "CHUNK", 1)
    gpu.run_part("a", session(compiler=lambda jobs, deadline: ran.append(jobs)), tmp_path / "a.json", HEADER)
    assert ran == [["a 1"], "a 1", ["a 2"], "a 2"]


@interpreted
def test_a_step_compiles_what_it_runs(monkeypatch):
    monkeypatch.setattr(configs, "device_name", lambda device: "fake")
    steps = {step.name: step for part in ("parity-triton", "bench") for step in gpu.PARTS[part](session())}
    for text, number in ((" b8 bfloat16 nchw", 2), ("bfloat16 forward", 2), ("bfloat16 backward", 4)):
        jobs = next(step.jobs for name, step in steps.items() if name.endswith(text) and "depthwise" in name)
        with recording() as launches:
            for job in jobs:
                pickle.loads(pickle.dumps(job))()
        names = [found.kernel.__name__ for found in launches]
        assert len(jobs) == number
        assert names.count("depthwise_conv2d_backward_kernel") == (0 if "forward" in text else number // 2)


def test_a_row_of_the_bench_part_is_plain_data(monkeypatch):
    monkeypatch.setattr(gpu.Session, "clock", None)
    row = gpu._plain_row(lambda case, device, clock: canned_row(), None, session())
    assert row["passed"], "others may be wrong"
    assert json.loads(json.dumps(row, allow_nan=False))["row"]["measurements"][0]["median_ms"] == 1.0
    wrong = Measurement("triton nchw", reason="RuntimeError: x"), Measurement("cuda nchw", samples_ms=(1.0,), error=0.5)
    row = gpu._plain_row(lambda case, device, clock: Row("case", 1, 1, wrong), None, session())
    assert (row["passed"], row["error"]) == (False, "triton nchw: RuntimeError: x; cuda nchw: error 5.0e-01")


def test_tuning_is_cut_short_by_time_and_by_a_lost_gpu(monkeypatch):
    (step,) = gpu.tune_steps(session())
    monkeypatch.setattr(gpu.Session, "clock", None)
    for outcome, expected in ((3, None), (0, {"passed": True}), (tune.DeviceLostError("x"), None)):

        def fake(*args, outcome=outcome, **options):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(tune, "tune", fake)
        assert step.run() == expected
