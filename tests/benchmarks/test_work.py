"""Work with gradients, and work for other runtimes."""

import sys

import pytest
import torch

from benchmarks import contenders
from benchmarks.cases import OPERATORS, OperatorCase, TrainingCase
from benchmarks.contenders import CONTENDERS, Eager, OnnxRuntime, OpenVino, TorchCompile
from benchmarks.results import OURS
from benchmarks.runner import Runner
from benchmarks.work import ModelWork, TrainingWork, Unsupported, build, too_large_for_onednn
from ffnet import create_model

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 5, "drop_path_rate": 0.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_passes_of_all_contenders_are_right(operator, dtype):
    case = OperatorCase(operator, 2, 8, 6, 3, dtype=dtype, direction="backward")
    work = build(case)
    tensors = [v for v in work.arguments.values() if isinstance(v, torch.Tensor)]
    assert len(work.expected()) == len(tensors)
    row = Runner([CONTENDERS[OURS], Eager("nchw", "nchw"), Eager("nhwc", "channels_last")], 1).run(case, work).row
    assert all(m.passed for m in row.measurements), row


def test_counts_of_backward_passes():
    forward = OperatorCase("ffnified_attention", 2, 8, 4, 3)
    case = OperatorCase("ffnified_attention", 2, 8, 4, 3, direction="backward")
    assert case.flops == 2 * forward.flops
    work = build(case)
    maps = sum(work.arguments[name].numel() for name in ("query", "residual")) + work.incoming.numel()
    weights = sum(v.numel() for n, v in work.arguments.items() if isinstance(v, torch.Tensor)) - 2 * maps // 3
    assert case.bytes == 4 * (maps + 2 * weights)
    assert case.name == f"{forward.name} backward"


@pytest.mark.parametrize("autocast", [False, True])
def test_training_step(autocast):
    model = create_model("ffnet_1", **SMALL).train()
    work = TrainingWork(model, torch.randn(4, 3, 64, 64), autocast=autocast)
    case = TrainingCase("ffnet_1", 4, 64, autocast=autocast)
    assert ("autocast" in case.name) == autocast
    assert work.plain("nchw").results()[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    row = Runner([CONTENDERS[OURS], Eager("nchw", "nchw"), Eager("nhwc", "channels_last")], 1).run(case, work).row
    assert all(m.passed for m in row.measurements), row
    logits, gradients = work.expected()
    assert logits.shape == (4, 5)
    assert gradients.numel() == sum(p.numel() for p in model.parameters())


def test_a_training_step_is_the_same_in_every_precision():
    """Else its limit, which is made of plain PyTorch's own error, would let anything pass."""
    work = build(TrainingCase("ffnet_1", 4, 64))
    for expected, single in zip(work.expected(), work.plain("nchw").results(), strict=True):
        assert (single - expected).abs().max() < 1e-3 * expected.abs().max()


def test_what_runs_no_backward_pass_says_so():
    work = build(OperatorCase("depthwise_conv2d", 1, 8, 6, 3, direction="backward"))
    with pytest.raises(Unsupported, match="forward passes"):
        TorchCompile().prepare(work)
    with pytest.raises(Unsupported, match="forward passes"):
        OpenVino().prepare(work)


def test_large_16_bit_filters_keep_clear_of_onednn(monkeypatch):
    case = OperatorCase("depthwise_conv2d", 1, 8, 6, 13, dtype="bfloat16")
    enabled = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda *a, **k: enabled.append(torch.backends.mkldnn.enabled) or convolve(*a, **k),
    )
    work = build(case)
    assert too_large_for_onednn(work.arguments)
    program = work.plain("channels_last")
    assert program.detail == "without oneDNN"
    program()
    build(OperatorCase("depthwise_conv2d", 1, 8, 6, 13)).plain("channels_last")()
    assert enabled == [False, torch.backends.mkldnn.enabled]


@pytest.mark.parametrize("operator", OPERATORS)
def test_exported_operators_have_maps_as_inputs(operator):
    work = build(OperatorCase(operator, 1, 8, 6, 3, dtype="bfloat16"))
    module, inputs = work.exportable()
    assert len(inputs[0]) == (1 if operator == "depthwise_conv2d" else 2)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in inputs[0])
    torch.testing.assert_close(module(*inputs[0]).double(), work.expected(), atol=1e-5, rtol=1e-5)


def test_exported_models():
    work = ModelWork(create_model("ffnet_1", **SMALL).eval(), [torch.randn(2, 3, 32, 32)])
    with torch.inference_mode():
        module, inputs = work.exportable()
        torch.testing.assert_close(module(*inputs[0]).double(), work.expected(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("contender", [OnnxRuntime(), OpenVino()], ids=lambda c: c.name)
def test_runtimes_that_are_missing_say_so(contender, monkeypatch):
    for name in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    contenders._why_missing.cache_clear()
    try:
        assert contender.unavailable().startswith("not installed (pip install o")
    finally:
        contenders._why_missing.cache_clear()


def test_onnx_runtime_says_why_it_runs_float32_only():
    with pytest.raises(Unsupported, match="16-bit"):
        OnnxRuntime().prepare(build(OperatorCase("depthwise_conv2d", 1, 8, 6, 3, dtype="bfloat16")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contender", [OnnxRuntime(), OpenVino()], ids=lambda c: c.name)
def test_runtimes_compute_the_same(contender, dtype):
    if reason := contender.unavailable():
        pytest.skip(reason)
    if dtype == "bfloat16" and contender.name == "onnxruntime":
        pytest.skip("float32 only")
    case = OperatorCase("ffnified_attention", 2, 8, 6, 3, dtype=dtype)
    row = Runner([CONTENDERS[OURS], contender], 1).run(case, build(case)).row
    assert all(m.passed for m in row.measurements), row
