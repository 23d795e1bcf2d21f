"""``benchmarks timm``, on models and results that are made here: timm is not installed where tests run."""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import timm_models
from benchmarks.__main__ import main
from benchmarks.results import Measurement, Result, Row
from benchmarks.timm_models import OPTIMIZED, PLAIN

MACHINE = dict.fromkeys(("processor", "threads", "isa", "torch", "python", "ffnet_kernels", "commit"), "x")


def row(model, eager, optimized, threads=1, errors=(1e-7, 1e-7)):
    """Times are of NCHW and channels-last; None for one that failed."""

    def measurements(names, times, error):
        for name, ms in zip(names, times, strict=True):
            if ms is None:
                yield Measurement(name, reason="failed: broken")
            else:
                yield Measurement(name, samples_ms=(ms, 1.1 * ms), repeats=1, error=error, passed=error < 1e-6)

    both = [*measurements(PLAIN, eager, errors[0]), *measurements(OPTIMIZED, optimized, errors[1])]
    return Row(f"{model} case", 1, 1, tuple(both), {"model": model, "size": 224, "threads": threads})


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_better_layouts_are_compared_and_the_greatest_gain_comes_first():
    rows = [row("slower", (8.0, 9.0), (10.0, 12.0)), row("faster", (8.0, 6.0), (4.0, 3.0), errors=(1e-7, 1.5e-7))]
    first, second = timm_models.table(rows).splitlines()[2:]
    expected = ["faster", "224²", "8.40", "6.30", "4.20", "3.15", "2.00", "2.00", "2.00×", "2.00–2.00", "1.50", ""]
    assert cells(first) == expected
    assert cells(second)[0] == "slower"
    assert cells(second)[6:9] == ["0.80", "0.75", "🔴 0.80×"]
    text = timm_models.summary(rows)
    assert "2 models, geometric mean 1.26× best against best, 1.26× in NCHW, 1.22× in channels-last" in text
    assert "below 0.97: 1 (slower); outputs that disagree: 0" in text


def test_what_failed_or_is_wrong_is_listed():
    rows = [
        row("half", (8.0, 6.0), (4.0, None)),
        row("none", (8.0, 6.0), (None, None)),
        row("wrong", (8.0, 6.0), (4.0, 3.0), threads=2, errors=(1e-7, 1e-3)),
    ]
    text = timm_models.report(Result(MACHINE, rows, extra={"timm": "1", "failed": {"gone": "exit code -11: "}}))
    one, two = text.split("## Threads: 2")
    assert "1 models" in one.split("## Threads: 1")[1]
    assert "❌" in two
    assert "disagree: 1 (wrong)" in two
    assert "- gone: exit code -11" in two
    assert "- half case: optimize channels-last: failed: broken" in two
    lines = {cells(line)[0]: cells(line) for line in one.splitlines() if line.startswith("|")}
    assert lines["half"][5:9] == ["-", "2.00", "-", "1.50×"]
    assert lines["none"][4:11] == ["-"] * 7


def test_backends_of_torch_compile_have_a_table_of_their_own():
    plain = row("small", (8.0, 6.0), (4.0, 3.0))
    times = zip(timm_models.COMPILED, (6.0, 4.0), strict=True)
    compiled = [Measurement(name, samples_ms=(ms, ms), repeats=1, error=1e-7, passed=True) for name, ms in times]
    both = Row(plain.case, 1, 1, (*plain.measurements, *compiled), plain.parameters)
    assert timm_models.compiled_table([plain]) == ""
    assert cells(timm_models.compiled_table([plain, both]).splitlines()[-1]) == ["small", "6.00", "4.00", "1.50×", ""]


def test_outputs_that_are_not_finite_have_no_error_ratio():
    broken = row("nan", (8.0, 6.0), (4.0, 3.0))
    nan = Measurement(OPTIMIZED[0], samples_ms=(1.0,), repeats=1)
    broken = Row(broken.case, 1, 1, (*broken.measurements[:2], nan), broken.parameters)
    assert cells(timm_models.table([broken]).splitlines()[2])[-2:] == ["-", "❌"]


class Scaled(nn.Module):
    """As fresh models are: its block hardly counts."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))

    def forward(self, x):
        return x + self.gamma * torch.relu(self.norm(self.depthwise(x)))


@pytest.fixture
def timm(monkeypatch):
    """One that makes a tiny model of any name."""

    def create_model(name, pretrained):
        assert not pretrained
        model = nn.Sequential(nn.Conv2d(3, 8, 3), Scaled(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        model.pretrained_cfg = {"input_size": (3, 16, 16)}
        return model

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "timm" else version(name))


def test_what_a_norm_folds_counts_in_the_output(timm):
    work = timm_models.build("any")
    again = timm_models.build("any")
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in work.model.state_dict().items())
    with torch.inference_mode():
        expected = work.expected()
        limit = work.error_limit(expected, work.plain("nchw").outputs())
        for name in ("running_mean", "running_var", "weight", "bias"):
            wrong = timm_models.build("any")
            getattr(wrong.model[1].norm, name).mul_(0.99)
            assert (wrong.expected() - expected).abs().max() > limit, name
    assert not any(module.training for module in work.model.modules())
    assert not work.model[1].norm._forward_pre_hooks


def test_a_model_is_measured_on_each_number_of_threads(timm, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # the tests keep theirs
    monkeypatch.setattr(timm_models, "SAMPLE_SECONDS", 1e-4)
    assert main(["timm", "--one", "any", "--threads", "1,2", "--samples", "1"]) == 0
    result = Result.from_plain(json.loads(capsys.readouterr().out))
    assert [measured.case for measured in result.rows] == ["any 16x16 b1 1 thread", "any 16x16 b1 2 threads"]
    assert all([m.contender for m in measured.measurements] == [*PLAIN, *OPTIMIZED] for measured in result.rows)
    assert all(m.passed and m.samples_ms for measured in result.rows for m in measured.measurements)


def test_a_model_that_fails_does_not_end_the_run(timm, capsys, monkeypatch, tmp_path):
    outcomes = {"good": Result({}, [row("good", (8.0, 6.0), (4.0, 3.0))]), "bad": "exit code 1: no such model"}
    monkeypatch.setattr(timm_models, "in_fresh_process", lambda name, options: outcomes[name])
    path = tmp_path / "timm.json"
    assert main(["timm", "--models", "bad,good", "--out", str(path)]) == 1
    assert "- bad: exit code 1: no such model" in capsys.readouterr().out
    kept = Result.from_json(path.read_text())
    assert kept.machine["threads"] == "1 and 2"
    assert [measured.case for measured in kept.rows] == ["good case"]
    assert main(["timm", "--models", "good"]) == 0


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    options = SimpleNamespace(threads=(1,), samples=1, compiled=False)
    assert timm_models.in_fresh_process("any", options) == "exit code 1: "


def test_without_timm(capsys, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["timm"]) == 2
    assert "make timm" in capsys.readouterr().err
