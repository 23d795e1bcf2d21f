"""What a GPU is to check and time, on the CPU: steps of ``python -m benchmarks gpu``, and contenders of operators."""

import contextlib
import functools
import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import contenders, gpu_steps
from benchmarks.cases import OperatorCase
from benchmarks.contenders import COMPILED, COPY, CUDNN_NCHW, EAGER, EAGER_NCHW, Cudnn, SubquadraticOps, TorchCompile
from benchmarks.gpu_steps import ADD, Bench, Step
from benchmarks.work import build
from ffnet_kernels import ops
from ffnet_kernels.backends import choice, reference
from ffnet_kernels.backends.triton import tune
from ffnet_kernels.ops._operator import Operator
from ffnet_kernels.selftest import cases

CPU = torch.device("cpu")
CASE = OperatorCase("depthwise_conv2d", 2, 4, 6, 3, dtype="bfloat16")


def perform(run, *arguments, bench=None):
    bench = bench or Bench(CPU, small=True)
    row = bench.perform(Step("step", 9, functools.partial(run, *arguments)))
    return json.loads(json.dumps(row, allow_nan=False))


@pytest.fixture
def cuda_in_place(monkeypatch):
    """Plain PyTorch in the place of the CUDA kernels."""
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setitem(choice.BACKENDS, "cuda", reference)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("contender", ["cuda nchw", "cuda channels-last", EAGER, EAGER_NCHW, COPY, ADD])
def test_a_step_of_a_contender(contender, direction, cuda_in_place):
    row = perform(gpu_steps.time_operator, replace(CASE, direction=direction), contender)
    assert row["passed"]
    assert row["case"] == f"depthwise_conv2d 4x6x6 k3 b2 bfloat16 {direction}"
    measurement = row["measurement"]
    assert measurement["contender"] == contender
    assert len(measurement["samples_ms"]) == 2
    assert (measurement["error"] == 0) == (contender in (COPY, ADD))
    one_map, parameters = 2 * 4 * 36, 4 * 9 + 4
    assert row["bytes"] == 2 * ((3 * one_map + 2 * parameters) if direction == "backward" else 2 * one_map + parameters)


def test_a_contender_that_is_wrong(cuda_in_place, monkeypatch):
    monkeypatch.setattr(Operator, "on", lambda self, backend, *args: self.reference(*args) + 1)
    row = perform(gpu_steps.time_operator, CASE, "cuda nchw")
    assert (row["passed"], row["error"]) == (False, "its numbers are wrong")
    assert row["measurement"]["samples_ms"]


def test_contenders_that_do_not_take_part(monkeypatch):
    monkeypatch.setattr(choice, "why_unavailable", lambda name: f"no {name}")
    assert perform(gpu_steps.time_operator, CASE, "triton nchw") == {"passed": True, "skipped": "no triton"}
    assert "does not take part" in perform(gpu_steps.time_operator, CASE, CUDNN_NCHW)["skipped"]


def test_a_step_that_fails_is_a_row(monkeypatch):
    def fails(bench):
        raise RuntimeError("no kernel image")

    assert perform(fails) == {"passed": False, "error": "RuntimeError: no kernel image"}

    def lost(device):
        raise tune.DeviceLostError("illegal address")

    monkeypatch.setattr(tune, "check_alive", lost)
    assert perform(fails) == {"passed": False, "error": "RuntimeError: no kernel image"}
    row = perform(lambda bench: {"passed": True})
    assert row == {"passed": False, "error": "DeviceLostError: illegal address", "lost": True}


def test_sets_of_maps_differ_and_the_first_is_always_the_same():
    first, second = gpu_steps.operator_works(replace(CASE, direction="backward"), CPU, 2)
    (again,) = gpu_steps.operator_works(replace(CASE, direction="backward", layout="nchw"), CPU, 1)
    assert first.arguments["x"].shape == CASE.shape
    assert first.arguments["x"].dtype == torch.bfloat16
    assert torch.equal(first.arguments["x"], again.arguments["x"])
    assert torch.equal(first.arguments["weight"], second.arguments["weight"])
    assert not torch.equal(first.arguments["x"], second.arguments["x"])
    assert not torch.equal(first.incoming, second.incoming)


def test_what_steps_share_is_made_once_and_given_up_for_another_kind():
    bench, made = Bench(CPU), []

    def keep(*key):
        return bench.keep(key, lambda: made.append(key))

    for key in (("a", 1), ("a", 2), ("a", 1), ("b", 1), ("a", 1)):
        keep(*key)
    assert made == [("a", 1), ("a", 2), ("b", 1), ("a", 1)]


def test_maps_rotate_through_more_than_the_cache():
    bench, large = Bench(CPU), OperatorCase("ffnified_attention", 128, 320, 16, 7, dtype="bfloat16")
    sets = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_steps, "operator_works", lambda case, device, number: sets.append(number))
        bench.works(large)
        bench.works(replace(large, batch=4096))
        bench.works(replace(large, batch=1))
    assert sets == [5, 2, gpu_steps.MOST_SETS]
    assert sets[0] * large.bytes >= gpu_steps.ROTATED


class Graphs:
    """In the place of torch.cuda: what was captured, and a clock on which a launch takes 2 ms and a graph 1 more."""

    def __init__(self):
        self.now, self.inside, self.captured = 0.0, None, []
        outer = self

        class Graph:
            def replay(self):
                outer.now += 1 + 2 * len(self.calls)

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self, stream):
                self.at = outer.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        self.CUDAGraph, self.Event = Graph, Event
        self.Stream = lambda device: types.SimpleNamespace(synchronize=lambda: None)
        self.device = self.stream = lambda which: contextlib.nullcontext()

    def graph(self, graph, stream):
        @contextlib.contextmanager
        def capturing():
            graph.calls = self.inside = []
            try:
                yield
                self.captured.append(graph.calls)
            finally:
                self.inside = None

        return capturing()


@pytest.fixture
def graphs(monkeypatch):
    found = Graphs()
    for name in ("CUDAGraph", "Event", "Stream", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: None)
    return found


def test_a_graph_holds_many_launches_on_buffers_in_turn(graphs):
    clock = gpu_steps.GraphClock(torch.device("cuda:0"))
    assert clock.empty_ms == 1.0
    programs = [lambda i=i: graphs.inside.append(i) if graphs.inside is not None else None for i in range(4)]
    samples, detail = clock(programs, 5)
    assert graphs.captured == [[], [0, 1, 2, 3] * 3]
    assert samples == [2.0] * 5, "without what the graph itself takes"
    assert detail == "12 launches a graph, 4 sets of buffers"


def test_what_cannot_be_captured_is_timed_call_by_call(graphs, monkeypatch):
    clock = gpu_steps.GraphClock(torch.device("cuda:0"))
    monkeypatch.setattr(tune, "check_alive", lambda device: None)
    monkeypatch.setattr(tune, "ColdClock", lambda device: lambda run: 7.0)

    def synchronises():
        if graphs.inside is not None:
            raise RuntimeError("not permitted")

    assert clock([synchronises] * 2, 3) == ([7.0] * 3, "without a CUDA graph: RuntimeError: not permitted")
    assert clock([synchronises], 2) == ([7.0] * 2, "cold caches, one launch a sample")


@pytest.mark.long
def test_models_and_training_steps():
    bench = Bench(CPU, small=True)
    for run, contender in (
        (gpu_steps.time_model, "ours nchw"), (gpu_steps.time_model, "eager channels-last graph"),
        (gpu_steps.time_training, "ours channels-last"),
    ):  # fmt: skip
        row = perform(run, contender, bench=bench)
        assert row["passed"], row
        assert row["measurement"]["contender"] == contender
    kernels = perform(gpu_steps.time_model, "ours nchw profile", bench=bench)["kernels"]
    assert kernels == sorted(kernels, key=lambda row: -row[2])
    assert len(kernels) > 5


def test_what_the_device_is(cuda_in_place, monkeypatch):
    monkeypatch.setattr(gpu_steps.cuda, "_device_error", lambda index: None)
    row = perform(gpu_steps.library)
    assert row["passed"]
    assert {"device", "name", "commit", "torch"} <= row["machine"].keys()
    assert perform(gpu_steps.bandwidth, 64)["GB/s"].keys() == {COPY, ADD}
    assert perform(gpu_steps.products)["TFLOP/s"] > 0
    monkeypatch.setattr(choice, "why_unavailable", lambda name: "it does not load")
    row = perform(gpu_steps.library)
    assert (row["passed"], row["error"]) == (False, "it does not load")


RESULTS = {"depthwise_conv2d": 4, "ffnified_attention": 7, "channel_mixer": 9}


@pytest.mark.parametrize(("operator", "results"), RESULTS.items())
def test_parity(operator, results, cuda_in_place):
    row = perform(gpu_steps.parity, "cuda", OperatorCase(operator, 1, 4, 4, 3, "nchw", "bfloat16"))
    assert row["passed"], row
    assert {"output", "weight" if operator != "ffnified_attention" else "key"} <= row["errors"].keys()
    row = perform(gpu_steps.on_cpu_reference, "cuda", OperatorCase(operator, 1, 4, 4, 3, direction="backward"))
    assert row == {"passed": True, "checked": results}


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
    case = OperatorCase("depthwise_conv2d", 1, 4, 4, 3)
    assert not perform(gpu_steps.parity, "triton", case)["passed"]
    if fault != "not written":  # memory is not poisoned there: the sanitizer looks for that
        assert not perform(gpu_steps.on_cpu_reference, "triton", replace(case, direction="backward"))["passed"]


def test_the_selftests(cuda_in_place, monkeypatch):
    by_name = {case.name: len(case.layouts) for case in cases()}
    assert len(gpu_steps.selftest_work("cuda")) == 3 * sum(by_name.values())
    narrow = [layouts for name, layouts in by_name.items() if " k=7 " in name]
    assert len(gpu_steps.selftest_work("triton")) == sum(narrow)
    assert perform(gpu_steps.selftest, "cuda", "depthwise_conv2d", "float16") == {"passed": True, "checked": 1}
    monkeypatch.setattr(gpu_steps, "check", lambda *args: {"passed": False, "errors": {"output": [1, 0.5]}})
    row = perform(gpu_steps.selftest, "cuda", "depthwise_conv2d", "float16")
    assert not row["passed"]
    assert row["error"].startswith("1 of 1 are wrong: {'depthwise_conv2d k=1")


def test_compiled_peers_run_their_backward_pass_many_times(monkeypatch):
    """The cheap stand-in for a compiler still goes through AOTAutograd, which may free what a second pass needs."""
    monkeypatch.setattr(contenders, "_why_compile_fails", lambda device: None)
    compiled = TorchCompile(COMPILED, arguments={"backend": "aot_eager"}, gradients=True)
    monkeypatch.setattr(gpu_steps, "on_gpu", lambda work, device: [compiled])
    row = perform(gpu_steps.time_operator, replace(CASE, direction="backward"), COMPILED)
    assert row["passed"], row
    assert len(row["measurement"]["samples_ms"]) == 2


@pytest.mark.parametrize("operator", ["depthwise_conv2d", "ffnified_attention"])
def test_cudnn_computes_the_same(operator, monkeypatch):
    asked = []

    def convolve(x, weight, padding, stride, dilation, groups, **options):
        asked.append(options)
        return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)

    monkeypatch.setattr(torch, "cudnn_convolution", convolve)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    work = build(OperatorCase(operator, 1, 4, 4, 3))
    peer = Cudnn(CUDNN_NCHW, "nchw")
    assert peer.differs(work), "a CPU's convolution is another one"
    torch.testing.assert_close(peer.prepare(work)(), work.plain("nchw")())
    assert len(asked) == (1 if operator == "depthwise_conv2d" else 2)
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *args: torch._C._ConvBackend.Cudnn)
    assert not peer.differs(work)


@pytest.fixture(autouse=True)
def packages_are_looked_for_anew():
    yield
    contenders._why_missing.cache_clear()


def fft_conv2d(x, kernel):
    """As subquadratic-ops documents its own, in plain PyTorch."""
    height, width = x.shape[2:]
    both = torch.fft.rfft2(x, s=(2 * height, 2 * width)) * torch.fft.rfft2(kernel, s=(2 * height, 2 * width))
    whole = torch.fft.irfft2(both, s=(2 * height, 2 * width))
    return whole[..., height // 2 : height // 2 + height, width // 2 : width // 2 + width]


@pytest.mark.parametrize(("size", "kernel"), [(16, 7), (15, 7), (9, 3), (8, 7)])
def test_a_convolution_by_fourier_transform(size, kernel, monkeypatch):
    package = types.ModuleType("subquadratic_ops_torch.fft_conv2d")
    package.fft_conv2d = fft_conv2d
    monkeypatch.setitem(sys.modules, "subquadratic_ops_torch", types.ModuleType("subquadratic_ops_torch"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    case = OperatorCase("depthwise_conv2d", 2, 4, size, kernel)
    work, contender = build(case), SubquadraticOps()
    assert contender.takes(work)
    assert contender.unavailable() is None
    torch.testing.assert_close(contender.prepare(work)().double(), work.expected(), atol=1e-5, rtol=1e-5)


def test_what_a_fourier_transform_does_not_take(monkeypatch):
    case, contender = OperatorCase("depthwise_conv2d", 2, 4, 16, 7), SubquadraticOps()
    others = (
        replace(case, dtype="bfloat16"), replace(case, kernel=31), replace(case, operator="channel_mixer")
    )  # fmt: skip
    assert not any(contender.takes(build(other)) for other in others)
    monkeypatch.setitem(sys.modules, "subquadratic_ops_torch", None)
    assert "not installed" in contender.unavailable()
