"""The runner, its results and its reports, on toy work with a fake clock."""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch

from benchmarks import peers, runner
from benchmarks.peers import OURS, AsTrained, Eager, TorchCompile
from benchmarks.report import FASTER_PEER, report, table
from benchmarks.results import Measurement, Result, Row, replacing, write_json
from benchmarks.runner import Runner, run_cases
from benchmarks.specs import OperatorCase
from benchmarks.work import Program, build

CASE = OperatorCase("depthwise_conv2d", 1, 8, 6, 3)


@dataclass
class Clock:
    """Stands still but for what the toys add."""

    now: float = 0.0
    running: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now


@dataclass
class Toy:
    """Plain PyTorch plus a planted error, in a time of its own choosing."""

    name: str
    clock: Clock
    seconds: float = 1e-3
    planted: float = 0.0
    reason: str | None = None

    def unavailable(self):
        return self.reason

    def prepare(self, work):
        plain = work.plain("nchw")

        def function(*arguments):
            self.clock.now += self.seconds
            self.clock.running.append(self.name)
            return plain.function(*arguments) + self.planted

        return Program(function, plain.inputs, "nchw")


def run(clock, *toys, samples=5):
    return Runner(toys, samples, clock).run(CASE, build(CASE)).row


@pytest.fixture
def clock():
    return Clock()


def test_ratio_samples_and_repeats(clock):
    row = run(clock, Toy(OURS, clock, 1e-3), Toy("peer", clock, 2.5e-3))
    ours = row.measurement(OURS)
    assert ours.median_ms == pytest.approx(1.0)
    assert ours.quartiles_ms == pytest.approx((1.0, 1.0))
    assert len(ours.samples_ms) == 5
    assert ours.repeats * 1e-3 >= runner.MIN_SAMPLE_SECONDS * 0.999
    assert row.ratio("peer", OURS) == pytest.approx(2.5)
    assert row.gflops(ours) == pytest.approx(CASE.flops / 1e-3 / 1e9)


def test_contenders_alternate_and_take_turns_in_going_first(clock):
    seconds = 2 * runner.MIN_SAMPLE_SECONDS  # so that a sample is one call
    run(clock, Toy("a", clock, seconds), Toy("b", clock, seconds), samples=4)
    assert clock.running[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_wrong_contender_is_found(clock):
    row = run(clock, Toy(OURS, clock), Toy("wrong", clock, planted=1e-3), Toy("nan", clock, planted=math.nan))
    ours, wrong, nan = row.measurements
    assert ours.passed
    assert ours.error < 1e-5
    assert not wrong.passed
    assert wrong.error > 1e-5
    assert not nan.passed
    assert nan.error is None
    text = table(row)
    assert text.count("WRONG") == 2
    assert "nan" in text


def test_a_wrong_shape_is_found():
    @dataclass
    class Cropped(Toy):
        def prepare(self, work):
            plain = work.plain("nchw")
            return Program(lambda *arguments: plain.function(*arguments)[..., :1], plain.inputs, "nchw")

    row = Runner([Cropped(OURS, Clock())], 1).run(CASE, build(CASE)).row
    assert not row.measurements[0].passed


def test_an_absent_contender_keeps_its_reason(clock):
    row = run(clock, Toy(OURS, clock), Toy("absent", clock, reason="no compiler"), AsTrained())
    assert row.measurement("absent") is None
    assert row.ratio("absent", OURS) is None
    text = report(Result(runner.machine(), [row]))
    assert "absent: no compiler" in text
    assert "as trained: failed: an operator has no training-time form" in text


def test_torch_compile_says_why_it_is_absent(monkeypatch):
    def fails(*_arguments, **_options):
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler found\ndetails")

    monkeypatch.setattr(torch, "compile", fails)
    peers._why_compile_fails.cache_clear()
    try:
        row = Runner([Eager(OURS, "nchw"), TorchCompile()], 1).run(CASE, build(CASE)).row
    finally:
        peers._why_compile_fails.cache_clear()
    reason = row.measurements[1].reason
    assert reason == "does not compile on this machine: InvalidCxxCompiler: no C++ compiler found"


def test_faster_peers_are_marked_and_kept(clock):
    lines = table(run(clock, Toy(OURS, clock, 2e-3), Toy("fast", clock, 1e-3), Toy("slow", clock, 3e-3))).splitlines()
    assert [FASTER_PEER in line for line in lines[2:]] == [False, True, False]
    assert "0.50x" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_ctrl_c_keeps_finished_rows(clock, monkeypatch):
    finished = run(clock, Toy(OURS, clock))
    outcomes = iter([finished])

    def run_one(self, case, work):
        row = next(outcomes, None)
        if row is None:
            raise KeyboardInterrupt
        return runner.Outcome(row, torch.empty(0), {})

    monkeypatch.setattr(Runner, "run", run_one)
    result = run_cases([CASE] * 3, Runner([], 1))
    assert result.rows == [finished]
    assert result.interrupted
    assert "interrupted" in report(result)


def test_json_round_trip(clock, tmp_path):
    row = run(clock, Toy(OURS, clock), Toy("nan", clock, planted=math.nan), Toy("absent", clock, reason="no compiler"))
    result = Result(runner.machine(), [row], extra={"note": "kept"})
    path = tmp_path / "new" / "results.json"
    write_json(result, path)
    plain = json.loads(path.read_text())
    assert plain["rows"][0]["measurements"][0]["median_ms"] == pytest.approx(1.0)
    assert Result.from_json(path.read_text()) == result
    with pytest.raises(ValueError, match="format"):
        Result.from_json('{"format": 0}')


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_quartiles():
    measurement = Measurement("x", samples_ms=(5.0, 1.0, 2.0, 4.0, 3.0))
    assert (measurement.median_ms, measurement.quartiles_ms) == (3.0, (2.0, 4.0))
    assert Row("case", 3_000_000, 6_000_000, (measurement,)).gflops(measurement) == 1.0
    assert Row("case", 3_000_000, 6_000_000, (measurement,)).gbytes(measurement) == 2.0
