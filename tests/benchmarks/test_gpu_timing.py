"""What a GPU is to time, on the CPU: contenders of an operator, and rows of operators and models."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import contenders, gpu
from benchmarks.cases import ModelCase, OperatorCase, TrainingCase
from benchmarks.contenders import (
    COMPILED,
    COPY,
    CUDNN_NCHW,
    EAGER,
    EAGER_NCHW,
    OURS,
    Cudnn,
    Eager,
    SubquadraticOps,
    TorchCompile,
    is_ours,
)  # fmt: skip
from benchmarks.gpu import GpuClock
from benchmarks.runner import Runner
from benchmarks.work import ModelWork, TrainingWork, build
from ffnet import create_model
from ffnet_kernels.backends import choice, reference
from ffnet_kernels.backends.triton import INTERPRETED

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: there is a real GPU")

CPU = torch.device("cpu")


def clock(function):
    function()
    clock.now += 1.0
    return clock.now


clock.now = 0.0


class NoCompiler(TorchCompile):
    def unavailable(self):
        return None

    def prepare(self, work):
        raise RuntimeError("no compiler")


def timed(case, work, *peers, samples=1):
    return Runner(peers, samples, clock=GpuClock(clock, CPU)).run(case, work).row


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_of_an_operator(direction, monkeypatch):
    monkeypatch.setattr(contenders, "TorchCompile", NoCompiler)
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setitem(choice.BACKENDS, "cuda", reference)  # in its place; that of Triton runs interpreted
    case = OperatorCase("depthwise_conv2d", 1, 4, 4, 3, dtype="bfloat16", direction=direction)
    row = gpu.operator_row(case, CPU, clock, samples=2)
    assert row.case == f"depthwise_conv2d 4x4x4 k3 b1 bfloat16 {direction}"
    by_name = {m.contender: m for m in row.measurements}
    ours = [f"{backend} {layout}" for backend in ("cuda", "triton") for layout in ("nchw", "channels-last")]
    assert list(by_name) == [*ours, EAGER_NCHW, EAGER, COMPILED, COPY]
    assert by_name.pop(COMPILED).reason == "RuntimeError: no compiler"
    assert all(m.passed and len(m.samples_ms) == 2 for m in by_name.values())
    assert [name for name in by_name if is_ours(name)] == ours
    assert 0 < by_name["triton nchw"].error < 0.02
    assert by_name["cuda nchw"].detail == "plain PyTorch operators"
    one_map, parameters = 4 * 16, 4 * 9 + 4
    assert row.bytes == 2 * ((3 * one_map + 2 * parameters) if direction == "backward" else (2 * one_map + parameters))


@interpreted
def test_a_backend_that_is_not_there_is_not_timed(monkeypatch):
    monkeypatch.setattr(contenders, "TorchCompile", NoCompiler)
    monkeypatch.setattr(choice, "why_unavailable", lambda name: "no" if name == "cuda" else None)
    row = gpu.operator_row(OperatorCase("depthwise_conv2d", 1, 2, 4, 3), CPU, clock, samples=1)
    assert [m.contender for m in row.measurements][:3] == ["triton nchw", "triton channels-last", EAGER_NCHW]


@pytest.mark.parametrize("operator", ["depthwise_conv2d", "ffnified_attention"])
def test_cudnn_computes_the_same(operator, monkeypatch):
    asked = []

    def convolve(x, weight, padding, stride, dilation, groups, **options):
        asked.append(options)
        return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)

    monkeypatch.setattr(torch, "cudnn_convolution", convolve)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    work = gpu.operator_work(OperatorCase(operator, 1, 4, 4, 3), CPU)
    peer = Cudnn(CUDNN_NCHW, "nchw")
    assert peer.differs(work), "a CPU's convolution is another one"
    torch.testing.assert_close(peer.prepare(work)(), work.plain("nchw")())
    assert len(asked) == (1 if operator == "depthwise_conv2d" else 2)
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *args: torch._C._ConvBackend.Cudnn)
    assert not peer.differs(work)


def test_a_graph_is_replayed(monkeypatch):
    happened = []

    class Graph:
        def replay(self):
            happened.append("replay")

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            happened.append("capture")

        def __exit__(self, *exception):
            happened.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run, text = gpu.captured(lambda: happened.append("run"), CPU)
    run()
    assert (happened, text) == (["capture", "run", "captured", "replay", "replay"], "")

    def synchronises():
        raise RuntimeError("not permitted")

    assert gpu.captured(synchronises, CPU) == (
        synchronises, "; without a CUDA graph: RuntimeError: not permitted"
    )  # fmt: skip


def test_compiled_peers_run_their_backward_pass_many_times(monkeypatch):
    """The cheap stand-in for a compiler still goes through AOTAutograd, which may free what a second pass needs."""
    monkeypatch.setattr(contenders, "_why_compile_fails", lambda device: None)
    case = OperatorCase("depthwise_conv2d", 1, 4, 4, 3, direction="backward")
    compiled = TorchCompile(COMPILED, arguments={"backend": "aot_eager"}, gradients=True)
    row = timed(case, gpu.operator_work(case, CPU), Eager(EAGER, "channels_last"), compiled, samples=3)
    assert [(m.passed, m.reason, len(m.samples_ms)) for m in row.measurements] == [(True, None, 3)] * 2


@pytest.mark.parametrize("training", [False, True])
def test_a_row_of_a_model(training, monkeypatch):
    torch.manual_seed(0)
    model = create_model("ffnet_1", depths=(1, 1), dims=(8, 8), token_kernels=(3, 3), num_classes=5).eval()
    batch = torch.randn(4, 3, 32, 32)
    work = TrainingWork(model.train(), batch, autocast=True) if training else ModelWork(model, [batch])
    monkeypatch.setattr(gpu, "build", lambda case: work)
    monkeypatch.setattr(contenders, "TorchCompile", NoCompiler)
    case = TrainingCase("ffnet_1", 4, 32, autocast=True) if training else ModelCase("ffnet_1", 4, 32)
    row = (gpu.training_row if training else gpu.model_row)(case, CPU, clock, samples=1)
    ours, *others = row.measurements
    assert (ours.contender, ours.passed, ours.reason) == (OURS, True, None)
    assert [m.reason for m in others if m.contender == COMPILED] == ["RuntimeError: no compiler"]
    assert all(m.passed for m in others if m.contender != COMPILED)
    assert all(p.grad is None for p in model.parameters())


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
    row = timed(case, build(case), contender)
    assert "not installed" in row.measurements[0].reason
