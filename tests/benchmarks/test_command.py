"""``python -m benchmarks``: its commands, and the charts they draw."""

import json
import sys

import pytest

from benchmarks import charts, memory, runner
from benchmarks.__main__ import COMMANDS, main
from benchmarks.cases import OperatorCase, parameters, suite
from benchmarks.results import Measurement, Result, Roofs, Row

PNG = b"\x89PNG\r\n"
ROOFS = Roofs({"float32": 100.0}, ((2**16, 50.0), (2**28, 10.0)))
ONE_CASE = ["--suite", "ops", "--quick", "--filter", "depthwise_conv2d 640x8x8 k7 b1", "--samples", "2"]


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch):
    monkeypatch.setattr(runner, "measure_roofs", lambda: ROOFS)


def row(case, **milliseconds):
    measurements = tuple(Measurement(n.replace("_", " "), samples_ms=(ms,)) for n, ms in milliseconds.items())
    if isinstance(case, str):
        return Row(case, 10**6, 10**6, measurements)
    return Row(case.name, case.flops, case.bytes, measurements, parameters(case))


def test_a_run_keeps_its_results_report_and_charts(tmp_path, capsys):
    assert main(["run", *ONE_CASE, "--baselines", "eager nchw", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| eager nchw " in text
    assert "torch.compile" not in text.split("## ", 1)[1]
    (case,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert case["parameters"]["channels"] == 640
    report = (tmp_path / "report.md").read_text()
    for picture in ("speedup-operator.png", "roofline.png"):
        assert f"({picture})" in report
        assert (tmp_path / picture).read_bytes().startswith(PNG)


def test_a_run_is_resumed(tmp_path, capsys):
    command = ["run", *ONE_CASE, "--baselines", "eager nchw", "--out", str(tmp_path), "--resume"]
    assert main(command) == 0
    results = tmp_path / "results.json"
    plain = json.loads(results.read_text())
    plain["rows"][0]["flops"] = 7  # to know it again
    results.write_text(json.dumps(plain))
    assert main(command) == 0
    assert json.loads(results.read_text())["rows"][0]["flops"] == 7
    results.write_text(json.dumps({**plain, "machine": {**plain["machine"], "threads": 99}}))
    assert main(command) == 2
    assert "threads is 99" in capsys.readouterr().err


def test_several_results_make_one_report(tmp_path, capsys):
    machine = dict.fromkeys(("processor", "threads", "isa", "torch", "python", "ffnet_kernels", "commit"), "x")
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(Result(machine, [row(f"{path.name} b1", ours=1.0, baseline=2.0)]).to_json())
    assert main(["report", *map(str, paths)]) == 0
    text = capsys.readouterr().out
    assert "## Cases" in text
    assert "case (b1)" in text
    assert "| a   " in text
    assert "| b   " in text
    assert main(["report", str(tmp_path / "none.json")]) == 2


def test_list(capsys):
    assert main(["run", "--suite", "models,train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"ffnet_4 256x256 b8 float32", "ffnet_1 256x256 b4 float32 training step"} <= set(lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "--filter", "nothing"], "nothing"),
        (["run", *ONE_CASE, "--out", "/proc/none"], "/proc/none"),
        (["run", *ONE_CASE, "--base", "no-such-commit"], "no-such-commit"),
        (["run", *ONE_CASE, "--base", "HEAD", "--resume", "--passes", "2"], "with --passes and --resume"),
        (["walk"], "usage: python -m benchmarks COMMAND"),
        ([], "usage: python -m benchmarks COMMAND"),
    ],
)
def test_options_that_make_no_sense(options, message, capsys):
    assert main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--samples 0", "--baselines nobody", "--suite none", "--suite ,"])
def test_wrong_options(options):
    with pytest.raises(SystemExit) as exit_:
        main(["run", *options.split()])
    assert exit_.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    program = "ffnet" if command == "demo" else "python -m benchmarks"
    assert f"usage: {program} {command}" in capsys.readouterr().out


def test_usage_and_errors_name_the_program_that_was_called(capsys):
    assert main(["walk"], "ffnet-kernels bench") == 2
    assert "usage: ffnet-kernels bench COMMAND" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "--samples", "0"], "ffnet-kernels bench")
    assert "ffnet-kernels bench run: error:" in capsys.readouterr().err


def test_charts(tmp_path):
    rows = [row("first b1 float32", ours=1.0, baseline=2.0), row("second b1 float32", ours=1.0, baseline=0.5)]
    charts.latency_chart(rows[0], tmp_path / "latency.png", "title")
    charts.speedup_chart(rows, tmp_path / "speedup.png", "title")
    grown = [row(case, ours=1.0 * case.flops, eager_nchw=2.0 * case.flops) for case in suite("growth", quick=True)]
    charts.roofline_chart(grown, ROOFS, tmp_path / "roofline.png", "title")
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


def test_charts_say_what_is_missing(tmp_path, monkeypatch):
    path, case = tmp_path / "a.png", OperatorCase("depthwise_conv2d", 1, 8, 6, 3)
    with pytest.raises(charts.ChartError, match="nothing was measured"):
        charts.latency_chart(Row("case", 1, 1, (Measurement("ours", reason="absent"),)), path, "title")
    with pytest.raises(charts.ChartError, match="no baseline"):
        charts.speedup_chart([row(case, ours=1.0)], path, "title")
    with pytest.raises(charts.ChartError, match="no roof"):
        charts.roofline_chart([row(case, ours=1.0)], None, path, "title")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(charts.ChartError, match="matplotlib"):
        charts.speedup_chart([row(case, ours=1.0, baseline=2.0)], path, "title")
    assert not path.exists()


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("2.36", "", memory.JOINED_AT_ONCE),
        ("2.36", "glibc.malloc.check=1", f"glibc.malloc.check=1:{memory.JOINED_AT_ONCE}"),
        ("2.36", "glibc.malloc.tcache_count=7", None),
        ("2.38", "", None),
        ("", "", None),
    ],
)
def test_old_c_libraries_are_told_how_to_keep_the_heap(version, given, expected, monkeypatch):
    started = []
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc" if version else "", version))
    monkeypatch.setattr(memory.os, "execv", lambda program, arguments: started.append((program, arguments)))
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    memory.restart_with_plain_heap()
    assert started == ([] if expected is None else [(sys.executable, sys.orig_argv)])
    assert memory.os.environ["GLIBC_TUNABLES"] == (expected or given)
