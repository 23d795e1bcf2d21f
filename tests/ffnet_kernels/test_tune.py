"""Tuning: what is asked for, measured, kept and found again. On a fake clock; tensors without data where possible."""

import contextlib
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

from ffnet_kernels import __main__ as command
from ffnet_kernels.backends.triton import configs
from ffnet_kernels.backends.triton.launch import INTERPRETED, launch, recording

pytest.importorskip("triton")
from ffnet_kernels.backends.triton import tune

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: there is a real GPU")

CPU = torch.device("cpu")
CALL = tune.Call("depthwise_conv2d", 1, 16, 8, 3, torch.float32, True, False)
OTHER = CALL._replace(dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of winners, empty, on a machine whose GPU is called "fake"."""
    monkeypatch.setattr(configs, "_TUNED", tmp_path)
    monkeypatch.setattr(configs, "device_name", lambda device: "fake")
    configs.winners.cache_clear()
    yield tmp_path
    configs.winners.cache_clear()


def tiles_of(call):
    (choice,) = tune.choices([call]).values()
    return choice.tiles


class Clock:
    """Tells the time by the tile that is launched: the later a candidate, the faster, but for what is planted."""

    def __init__(self, call=CALL, planted=None):
        self.tiles, self.planted, self.calls = tiles_of(call), planted or {}, 0

    def __call__(self, function):
        self.calls += 1
        with recording() as launches:
            function()
        started = launches[0]
        numbers = (*(started.arguments[name] for name in ("BLOCK_W", "BLOCK_C", "ROWS")), started.warps)
        place = self.tiles.index(numbers)
        outcome = self.planted.get(place, 1.0 - 0.1 * place)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def run(clock, asking=(CALL,), **options):
    return tune.tune(CPU, None, asking, clock, report=lambda line: None, **options)


def table(folder):
    return json.loads((folder / "fake.json").read_text())


def test_the_fastest_tile_is_kept_and_chosen(folder):
    (key,), tiles = tune.choices([CALL]), tiles_of(CALL)
    assert run(Clock()) == 0
    found = table(folder)
    assert found["winners"] == {key: list(tiles[-1])}
    assert found["medians"][key] == {
        " ".join(map(str, tile)): pytest.approx(1.0 - 0.1 * place) for place, tile in enumerate(tiles)
    }
    assert {"device", "torch", "cuda", "triton", "date"} <= found.keys()
    shape = configs.Shape("depthwise", torch.float32, True, 1, 16, 8, 8, 3)
    assert shape.key() == key
    assert configs.choose(shape, torch.device("cuda", 0)) == tiles[-1] != tiles[0]
    assert configs.choose(shape, CPU) == tiles[0]
    assert configs.choose(shape._replace(dtype=torch.float16), torch.device("cuda", 0)) == tiles[0]


def test_a_second_run_goes_on_where_the_first_ended(folder):
    run(Clock())
    clock = Clock()
    assert run(clock, [CALL, OTHER]) == 0
    assert clock.calls == len(clock.tiles) * (tune.WARM_UP + tune.SAMPLES)
    assert len(table(folder)["winners"]) == 2
    idle = Clock()
    run(idle, [CALL, OTHER])
    assert idle.calls == 0
    run(Clock(planted={0: 0.01}), again=True)
    assert table(folder)["winners"][next(iter(tune.choices([CALL])))] == list(tiles_of(CALL)[0])


def test_an_interruption_loses_the_key_at_work_only(folder):
    clock = Clock()

    def interrupted(function):
        if clock.calls > len(clock.tiles) * (tune.WARM_UP + tune.SAMPLES):
            raise KeyboardInterrupt
        return clock(function)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, [CALL, OTHER])
    assert list(table(folder)["winners"]) == list(tune.choices([CALL]))
    assert [path.name for path in folder.iterdir()] == ["fake.json"]
    assert run(Clock(), [CALL, OTHER]) == 0
    assert len(table(folder)["winners"]) == 2


def test_a_tile_that_does_not_run_is_passed_by(folder):
    (key,), tiles = tune.choices([CALL]), tiles_of(CALL)
    last = len(tiles) - 1
    run(Clock(planted={last: RuntimeError("out of shared memory")}))
    found = table(folder)
    assert found["winners"][key] == list(tiles[last - 1])
    assert found["medians"][key][" ".join(map(str, tiles[last]))] == "RuntimeError: out of shared memory"


def test_a_choice_none_of_whose_tiles_runs_is_not_measured_again(folder):
    (key,), tiles = tune.choices([CALL]), tiles_of(CALL)
    run(Clock(planted={place: RuntimeError("no") for place in range(len(tiles))}))
    assert table(folder)["winners"] == {}
    assert set(table(folder)["medians"][key].values()) == {"RuntimeError: no"}
    idle = Clock()
    run(idle)
    assert idle.calls == 0


def test_a_lost_device_ends_the_run_and_is_remembered(folder, monkeypatch):
    def lost(device):
        raise tune.DeviceLostError("illegal address")

    monkeypatch.setattr(tune, "check_alive", lost)
    with pytest.raises(tune.DeviceLostError):
        run(Clock(planted={0: RuntimeError("illegal address")}))
    (key,) = tune.choices([CALL])
    assert list(table(folder)["medians"][key].values()) == ["RuntimeError: illegal address"]


def test_no_key_is_begun_after_the_deadline(folder):
    clock = Clock()
    assert run(clock, [CALL, OTHER], deadline=time.monotonic() - 1) == 2
    assert clock.calls == 0
    assert not list(folder.iterdir())


def test_other_keys_keep_their_winners_meanwhile():
    (key,), tiles = tune.choices([CALL]), tiles_of(CALL)
    for wanted, expected in (({}, tiles[0]), ({key: list(tiles[-1])}, tiles[-1]), ({key: [1, 2, 3, 4]}, tiles[0])):
        with recording() as launches:
            tune.with_tiles(wanted, CALL.start)
        assert expected.blocks().items() <= launches[0].arguments.items()


def test_measures_real_kernels(folder, monkeypatch):
    """Interpreted, on data."""

    def clock(function):
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    tiny = CALL._replace(channels=4, size=3)
    monkeypatch.setattr(tune, "WARM_UP", 0)
    monkeypatch.setattr(tune, "SAMPLES", 1)
    assert run(clock, [tiny]) == 0
    (medians,) = table(folder)["medians"].values()
    assert len(medians) == len(tiles_of(tiny))
    assert all(isinstance(ms, float) for ms in medians.values())


def test_what_is_tuned():
    quick, whole = tune.calls(quick=True), tune.calls()
    assert set(quick) < set(whole)
    assert {call.operator for call in quick} == {"depthwise_conv2d", "ffnified_attention", "channel_mixer"}
    assert {call.dtype for call in whole} == {torch.bfloat16, torch.float16, torch.float32}
    assert {call.batch for call in whole} == {1, 8, 128}
    keys = tune.choices(quick)
    assert len(keys) > 10
    assert all(len(choice.tiles) > 1 for choice in keys.values())
    assert {"depthwise", "pointwise"} <= {key.split("/")[0] for key in keys}


def test_backward_passes_start_every_gradient():
    for operator, gradients in (("depthwise_conv2d", 1), ("ffnified_attention", 2), ("channel_mixer", 2)):
        with recording() as launches:
            CALL._replace(operator=operator, backward=True).start()
        names = [found.kernel.__name__ for found in launches]
        assert any("backward" in name for name in names)
        assert names.count("filter_gradients_kernel") >= gradients - (operator == "channel_mixer")


class Kernel:
    __name__ = "fake_kernel"

    def __init__(self, error=None):
        self.error, self.compiled = error, []

    def warmup(self, **options):
        if self.error:
            raise self.error
        self.compiled.append(options)


def test_a_job_is_compiled_but_not_run():
    kernel = Kernel()
    x = torch.empty(8, device="meta")
    assert tune._compile(lambda: launch(kernel, 5, x.device, warps=2, stages=3, x=x, BLOCK=4)) == []
    (options,) = kernel.compiled
    assert options.pop("x") is x
    assert options.items() >= {"grid": (5,), "num_warps": 2, "num_stages": 3, "BLOCK": 4}.items()


def test_what_does_not_compile_is_said():
    kernel = Kernel(ValueError("bad tile"))
    (error,) = tune._compile(lambda: launch(kernel, 5, CPU, warps=2, BLOCK=4))
    assert re.fullmatch(r"fake_kernel \(BLOCK=4, 2 warps\): ValueError: bad tile", error)


def test_nothing_is_compiled_where_kernels_are_interpreted():
    with tune.Compiler() as compiler:
        assert compiler([pytest.fail]) == []


class Pool:
    """Stands in for the processes."""

    def __init__(self):
        self.pending, self.closed = [], False

    def submit(self, function, job):
        future = tune.concurrent.futures.Future()
        if job is None:
            self.pending.append(future)
        else:
            try:
                future.set_result(function(job))
            except Exception as error:
                future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        self.closed = cancel_futures


def test_jobs_that_are_late_are_given_up_and_errors_collected():
    compiler = tune.Compiler()
    compiler._pool = pool = Pool()
    broken = Kernel(ValueError("bad tile"))

    def fails():
        raise RuntimeError("no such shape")

    jobs = [lambda: launch(broken, 1, CPU, warps=1), fails, fails, None]
    with compiler:
        errors = compiler(jobs, time.monotonic() + 0.01)
    assert errors == ["RuntimeError: no such shape", "fake_kernel (, 1 warps): ValueError: bad tile"]
    assert pool.pending[0].cancelled()
    assert pool.closed


def test_a_dead_process_stops_nothing():
    compiler = tune.Compiler()
    compiler._pool = pool = Pool()

    def broken(*job):
        raise tune.concurrent.futures.BrokenExecutor("a process was killed")

    pool.submit = broken
    with compiler:
        assert compiler([CALL.start]) == ["BrokenExecutor: a process was killed"]


def test_the_clock_waits_until_the_host_has_queued_everything(monkeypatch):
    slept, host = [], SimpleNamespace(now=0.0)

    def queue(seconds):
        host.now += seconds

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.25)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles / tune.ColdClock.CYCLES_A_SECOND))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: host.now)
    monkeypatch.setattr(tune.ColdClock, "BYTES", 64)
    clock = tune.ColdClock(CPU)
    assert clock(lambda: queue(1e-5)) == 0.25
    assert len(slept) == 1
    assert clock(lambda: queue(5e-3)) == 0.25
    assert len(slept) == 3
    assert slept[2] >= 5e-3 > slept[1]
    clock(lambda: queue(9.0))
    assert max(slept) == pytest.approx(clock.LONGEST)
    for _ in range(50):
        clock(lambda: queue(1e-5))
    assert slept[-1] < 1e-4


def test_long_errors_keep_both_ends():
    text = tune.describe(RuntimeError("begin" + "x" * 5000 + "end"))
    assert text.startswith("RuntimeError: begin")
    assert text.endswith("end")
    assert len(text) < 1300


def test_the_command_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune"]) == 2
    assert capsys.readouterr().err == "tune: there is no GPU\n"


@pytest.mark.parametrize(
    ("outcome", "code"), [(0, 0), (KeyboardInterrupt(), 130), (tune.DeviceLostError("x"), 1), (OSError("read-only"), 1)]
)
def test_the_command(outcome, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "ColdClock", lambda device: "clock")
    asked = []

    def fake(device, folder, asking, clock, **options):
        asked.append((device, folder, asking, clock, options))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(tune, "tune", fake)
    assert command.main(["tune", "--quick", "--out", str(tmp_path)]) == code
    assert asked == [(torch.device("cuda", 0), tmp_path, tune.calls(True), "clock", {"again": False})]
    assert capsys.readouterr().err.count("\n") == (code != 0)
