"""The runner, its results and its reports, on toy work with a fake clock."""

import dataclasses
import hashlib
import json
import math
import mmap
import threading
import types
from dataclasses import dataclass, field

import pytest
import torch

from benchmarks import contenders, runner
from benchmarks.cases import OperatorCase
from benchmarks.contenders import AsTrained, Eager, TorchCompile
from benchmarks.report import FASTER_BASELINE, SLOWER, WRONG, overview, report, table
from benchmarks.results import OURS, Measurement, Result, Roofs, Row, machine, read, replacing, shared_words, write_json
from benchmarks.runner import Runner, run_cases
from benchmarks.work import Program, build
from ffnet_kernels import native

CASE = OperatorCase("depthwise_conv2d", 1, 8, 6, 3)
ROOFS = Roofs({}, ((1, 1.0),))


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
    return Runner(toys, samples, timer=clock).run(CASE, build(CASE)).row


@pytest.fixture
def clock():
    return Clock()


def test_ratio_samples_and_repeats(clock):
    row = run(clock, Toy(OURS, clock, 1e-3), Toy("baseline", clock, 2.5e-3))
    ours = row.measurement(OURS)
    assert ours.median_ms == pytest.approx(1.0)
    assert ours.quartiles_ms == pytest.approx((1.0, 1.0))
    assert len(ours.samples_ms) == 5
    assert ours.repeats * 1e-3 >= runner.MIN_SAMPLE_SECONDS * 0.999
    assert row.ratio("baseline", OURS) == pytest.approx(2.5)
    assert row.gflops(ours) == pytest.approx(CASE.flops / 1e-3 / 1e9)


def test_contenders_alternate_and_take_turns_in_going_first(clock):
    seconds = 4 * runner.MIN_SAMPLE_SECONDS  # so that a sample is one call
    run(clock, Toy("a", clock, seconds), Toy("b", clock, seconds), samples=4)
    # Each sample is an untimed call and a timed one.
    assert clock.running[-16:] == [name for turn in ("ab", "ba", "ab", "ba") for name in turn for _ in range(2)]


def test_a_sample_begins_quiet_and_warm(clock, monkeypatch):
    monkeypatch.setattr(runner, "wait_until_quiet", lambda: clock.running.append("quiet"))
    row = run(clock, Toy("long", clock, 2 * runner.LONG_SECONDS), Toy("short", clock, 3e-4), samples=1)
    short = row.measurement("short")
    untimed = math.ceil(runner.UNTIMED_SECONDS / 3e-4)
    assert clock.running[-3 - untimed - short.repeats :] == [
        "quiet", "long", "quiet", *["short"] * (untimed + short.repeats)
    ]  # fmt: skip
    assert short.median_ms == pytest.approx(0.3)


def test_a_long_case_ends_early_but_not_at_once(clock):
    toy = Toy(OURS, clock, 1.0)
    row = Runner([toy], 50, 1.5, timer=clock).run(CASE, build(CASE)).row
    assert len(row.measurements[0].samples_ms) == runner.LEAST_SAMPLES


@pytest.mark.parametrize("answers", [[False, False], [True, False, True, False, False], [None]])
def test_threads_that_still_spin_are_waited_for(monkeypatch, answers):
    looks = iter(answers)
    monkeypatch.setattr(runner, "_other_threads_running", lambda: next(looks))
    monkeypatch.setattr(runner, "LONGEST_WAIT", math.inf)
    assert runner.wait_until_quiet()
    assert list(looks) == []


def test_threads_that_never_rest_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(runner, "_other_threads_running", lambda: True)
    monkeypatch.setattr(runner, "LONGEST_WAIT", 0.01)
    assert not runner.wait_until_quiet()


def test_a_running_thread_is_seen():
    """Also while others take its core: it runs as long as it waits for nothing else."""
    work = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 1_000_000))  # without Python's lock
    work.start()
    seen = False
    while work.is_alive() and not seen:
        seen = runner._other_threads_running() is not False
    work.join()
    assert seen


def test_page_faults_are_counted():
    before = runner.Disturbances.now()
    with mmap.mmap(-1, 2**22) as fresh:  # what a C library gives may have been used before
        fresh.write(bytes(2**22))
    assert runner.Disturbances.now().page_faults > before.page_faults
    measurement = Measurement("x", samples_ms=(1.0, 1.0, 1.0), repeats=2, page_faults=(4, 8, 600))
    assert measurement.faults_per_call == 4


def test_all_results_are_judged():
    expected = [torch.ones(3).double(), 100 * torch.ones(2).double()]
    near, far = [torch.ones(3), 100 * torch.ones(2) + 1e-3], [1.01 * torch.ones(3), 100 * torch.ones(2)]
    assert runner._judge(near, expected, [1e-6, 1e-2]) == (pytest.approx(1e-5, rel=0.1), True)
    assert runner._judge(far, expected, [1e-6, 1e-2]) == (pytest.approx(1e-2, rel=0.1), False)
    assert runner._judge([near[0], torch.tensor([math.nan, 0.0])], expected, [1e-6, 1e-2]) == (None, False)
    assert runner._judge(near[:1], expected, [1e-6, 1e-2]) == (None, False)


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
    text = report(Result(machine(), [row]))
    assert "absent: no compiler" in text
    assert "as trained: it has no training-time form" in text


def test_torch_compile_says_why_it_is_absent(monkeypatch):
    def fails(*_arguments, **_options):
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler found\ndetails")

    monkeypatch.setattr(torch, "compile", fails)
    contenders._why_compile_fails.cache_clear()
    try:
        row = Runner([Eager(OURS, "nchw"), TorchCompile()], 1).run(CASE, build(CASE)).row
    finally:
        contenders._why_compile_fails.cache_clear()
    reason = row.measurements[1].reason
    assert reason == "does not compile on this machine: InvalidCxxCompiler: no C++ compiler found"


def test_faster_baselines_are_marked_and_kept(clock):
    lines = table(run(clock, Toy(OURS, clock, 2e-3), Toy("fast", clock, 1e-3), Toy("slow", clock, 3e-3))).splitlines()
    assert [FASTER_BASELINE in line for line in lines[2:]] == [False, True, False]
    assert "0.50x" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_the_overview_marks_slower_and_wrong(clock):
    fast, wrong = Toy("fast", clock, 1e-3), Toy("wrong", clock, 3e-3, planted=1.0)
    row = run(clock, Toy(OURS, clock, 2e-3), fast, wrong)
    line = overview([row]).splitlines()[-1]
    assert f"{SLOWER} 0.50x" in line
    assert f"{WRONG} 1.50x" in line


def test_the_overview_says_once_what_all_names_end_in():
    rows = [Row(f"{name} b1 float32", 1, 1, (Measurement(OURS, samples_ms=(1.0,)),)) for name in ("a", "b c")]
    header, _, first, second = overview(rows).splitlines()
    assert "case (b1 float32)" in header
    assert first.startswith("| a  ")
    assert second.startswith("| b c ")
    assert shared_words(rows[:1]) == ""


def test_ctrl_c_keeps_finished_rows(clock, monkeypatch):
    finished = run(clock, Toy(OURS, clock))
    outcomes = iter([finished])

    def run_one(self, case, work):
        row = next(outcomes, None)
        if row is None:
            raise KeyboardInterrupt
        return runner.Outcome(row, torch.empty(0), {})

    monkeypatch.setattr(Runner, "run", run_one)
    monkeypatch.setattr(runner, "measure_roofs", lambda: ROOFS)
    saved = []
    cases = [CASE, OperatorCase("depthwise_conv2d", 2, 8, 6, 3)]
    result = run_cases(cases, lambda case: Runner([], 1), save=lambda result: saved.append(len(result.rows)))
    assert result.rows == [finished]
    assert saved == [1, 1]
    assert result.interrupted
    assert "interrupted" in report(result)


def test_kept_rows_are_not_run_again(clock, monkeypatch):
    monkeypatch.setattr(runner, "measure_roofs", lambda: ROOFS)
    kept, other, ran = run(clock, Toy(OURS, clock)), OperatorCase("depthwise_conv2d", 2, 8, 6, 3), []
    unasked, real = dataclasses.replace(kept, case="another suite's"), Runner.run

    def resumed(*contenders, kept=kept):
        ran.clear()
        toys = [Toy(name, clock) for name in contenders]
        monkeypatch.setattr(Runner, "run", lambda self, case, work: ran.append(case) or real(self, case, work))
        result = run_cases([CASE, other], lambda case: Runner(toys, 1, timer=clock), kept=Result({}, [unasked, kept]))
        assert [row.case for row in result.rows] == ["another suite's", CASE.name, other.name]

    resumed(OURS)
    assert ran == [other]
    resumed(OURS, "baseline")  # which the kept row lacks
    assert ran == [CASE, other]


def test_a_contender_that_fails_late_is_taken_out(clock):
    @dataclass
    class Failing(Toy):
        last: int = 0
        calls: int = 0

        def prepare(self, work):
            program = super().prepare(work)

            def function(*arguments):
                self.calls += 1
                if self.calls > self.last:
                    raise RuntimeError("out of memory")
                return program.function(*arguments)

            return dataclasses.replace(program, function=function)

    for last in (2, 5):  # it fails in calibration, in a sample
        row = run(clock, Toy(OURS, clock), Failing("failing", clock, 2 * runner.LONG_SECONDS, last=last))
        assert row.measurements[1].reason == "failed: out of memory"
        assert len(row.measurement(OURS).samples_ms) == 5
    other = dataclasses.replace(row, measurements=(row.measurements[0], Measurement("failing", samples_ms=(1.0,))))
    assert "failing (1 of 2 cases): failed: out of memory" in report(Result(machine(), [row, other]))


def test_passes_are_put_together(clock, monkeypatch):
    monkeypatch.setattr(runner, "measure_roofs", lambda: ROOFS)
    other, order, real = OperatorCase("depthwise_conv2d", 2, 8, 6, 3), [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, case, work: order.append(case) or real(self, case, work))

    def runner_of(case):
        return Runner([Toy(OURS, clock, 1e-3 * (1 + len(order))), Toy("baseline", clock)], 2, timer=clock)

    result = run_cases([CASE, other], runner_of, passes=2)
    assert order == [CASE, other, CASE, other]
    assert [row.passes for row in result.rows] == [2, 2]
    assert result.rows[0].measurement(OURS).samples_ms == pytest.approx((1.0, 1.0, 3.0, 3.0))
    assert len(result.rows[0].measurement(OURS).page_faults) == 4
    half = dataclasses.replace(result.rows[1], passes=1)
    order.clear()
    assert run_cases([CASE, other], runner_of, 2, Result({}, [result.rows[0], half])).rows[1].passes == 2
    assert order == [other]


def test_joined_measurements_keep_the_worse():
    ok, bad = Measurement("a", samples_ms=(1.0,), repeats=4, error=1e-7, passed=True, page_faults=(8,)), None
    bad = dataclasses.replace(ok, repeats=2, error=1e-3, passed=False, page_faults=(2,))
    joined = ok.joined(bad)
    assert (joined.error, joined.passed, joined.page_faults) == (1e-3, False, (8, 4))
    assert ok.joined(dataclasses.replace(bad, error=None)).error is None
    absent = Measurement("a", reason="no compiler")
    assert ok.joined(absent) == absent.joined(ok) == absent  # half its rounds have no counterpart


def test_the_share_of_the_roof():
    roofs_ = Roofs({"float32": 100.0}, ((1000, 10.0), (100_000, 1.0)))
    assert roofs_.least_ms(10**8, 1000, "float32") == pytest.approx(1.0)  # by its arithmetic
    assert roofs_.least_ms(0, 10**6, "float32") == pytest.approx(1.0)  # by its bytes, as of the largest copy
    assert roofs_.copy_rate(10_000) == pytest.approx(5.5)  # between, by the logarithm of the size
    assert roofs_.least_ms(1, 1, "float16") is None
    assert Roofs.of({"roofs": json.loads(json.dumps(dataclasses.asdict(roofs_)))}) == roofs_
    row = Row("case", 10**8, 1000, (Measurement(OURS, samples_ms=(2.0,)),), {"dtype": "float32"})
    assert " 50 % " in table(row, roofs_)
    assert roofs_.raised(Roofs({"float32": 90.0}, ((1000, 11.0), (100_000, 0.5)))) == Roofs(
        {"float32": 100.0}, ((1000, 11.0), (100_000, 1.0))
    )


def test_a_roof_is_no_lower_where_its_first_call_waited_for_a_core(monkeypatch, clock):
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(runner, "wait_until_quiet", lambda: None)
    waits = iter([1.0])

    def run(rounds):
        clock.now += next(waits, 0.0) + 1e-4 + 1e-6 * rounds
        return rounds

    assert runner._best_rate(run, 1e-2) == pytest.approx(1e6, rel=0.03)


def test_roofs_of_this_machine(monkeypatch):
    monkeypatch.setattr(runner, "COPIES", (2**16, 2**20))
    monkeypatch.setattr(runner, "TRIALS", 1)
    found = runner.measure_roofs()
    assert all(rate > 0 for _, rate in found.copies)
    if native.helper():
        assert found.gflops["float32"] > 0


def test_json_round_trip(clock, tmp_path):
    row = run(clock, Toy(OURS, clock), Toy("nan", clock, planted=math.nan), Toy("absent", clock, reason="no compiler"))
    result = Result(machine(), [row], extra={"note": "kept"})
    path = tmp_path / "new" / "results.json"
    write_json(result, path)
    plain = json.loads(path.read_text())
    assert plain["rows"][0]["measurements"][0]["median_ms"] == pytest.approx(1.0)
    assert Result.from_json(path.read_text()) == result
    square = {name: value for name, value in dataclasses.asdict(CASE).items() if name != "width"}
    assert row.parameters == {"kind": "operator", **square}
    older = {**plain, "format": 1}
    for plain_row in older["rows"]:
        del plain_row["parameters"]
    assert Result.from_json(json.dumps(older)).rows[0].parameters == {}
    with pytest.raises(ValueError, match="format"):
        Result.from_json('{"format": 0}')
    for text in (
        "[]",
        '{"format": 2}',
        '{"format": 2, "machine": {}, "rows": [{}], "interrupted": false, "extra": {}}',
    ):
        with pytest.raises(ValueError, match="benchmark results"):
            Result.from_json(text)


def test_several_files_make_one_result(tmp_path):
    rows = [Row(case, 1, 1, (Measurement(OURS, samples_ms=(float(ms),)),)) for ms, case in enumerate("aba", 1)]
    machine = {"processor": "p", "threads": 2, "isa": "avx512", "torch": "2", "commit": "c"}
    first, second, other = [tmp_path / name for name in ("1.json", "2.json", "other.json")]
    write_json(Result(machine, rows[:2]), first)
    write_json(Result(machine, rows[2:], interrupted=True), second)
    merged = read([first, second])
    assert [(row.case, row.measurements[0].median_ms) for row in merged.rows] == [("a", 3.0), ("b", 2.0)]
    assert merged.interrupted
    write_json(Result({**machine, "threads": 1}), other)
    with pytest.raises(ValueError, match="threads is 2 and 1"):
        read([first, other])


def test_a_ratio_is_of_rounds():
    drifting, twice = (1.0, 2.0, 4.0, 8.0), (2.0, 4.0, 160.0, 16.0)
    row = Row("case", 1, 1, (Measurement("a", samples_ms=drifting), Measurement("b", samples_ms=twice)))
    assert row.ratio("b", "a") == 2.0
    assert row.ratio_quartiles("a", "a") == (1.0, 1.0)
    assert row.ratio("a", "absent") is row.ratio_quartiles("a", "absent") is None


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
