"""``ffnet export`` and ``ffnet profile``: files that compute what the model does, and one line for bad input."""

import json
import re

import pytest
import torch

import ffnet
from ffnet.__main__ import main
from ffnet_kernels import native

TRUNK = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
OPTIONS = ["--model", "ffnet_1", "--model-arguments", json.dumps(TRUNK), "--classes", "7", "--size", "32"]
needs_native = pytest.mark.skipif(bool(native.cpu_library_error()), reason="no native library was built")


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    model = ffnet.create_model("ffnet_1", num_classes=7, **TRUNK).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model, tmp_path / "weights.pth"


@pytest.mark.parametrize("options", [["--plain"], ["--plain", "--batch", 2], pytest.param([], marks=needs_native)])
def test_export(options, trained, tmp_path, capsys):
    model, weights = trained
    out = tmp_path / "model.pt2"
    out.write_text("an older file")
    assert run("export", out, *OPTIONS, "--checkpoint", weights, *options) == 0
    images = "2" if "--batch" in options else "any number of"
    assert re.search(rf"wrote .*model.pt2: pt2, [\d.]+ MB, for {images} images of 3x32x32", capsys.readouterr().out)
    extra = {"config.json": ""}
    program = torch.export.load(out, extra_files=extra)
    assert json.loads(extra["config.json"])["input_size"] == [3, 32, 32]
    kept = [node for node in program.graph.nodes if str(node.target).startswith("ffnet_kernels")]
    assert bool(kept) != ("--plain" in options)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_of_series(tmp_path, capsys):
    options = ["--model", "ffnet_ts", "--model-arguments", json.dumps({"dim": 8, "variables": 2, "horizon": 5})]
    out = tmp_path / "series.pt2"
    assert run("export", out, *options, "--plain") == 0
    assert "for any number of series of 96x2" in capsys.readouterr().out
    assert torch.export.load(out).module()(torch.randn(3, 96, 2)).shape == (3, 5, 2)
    assert run("profile", *options, "--runs", 1) == 0
    assert "ffnet_ts, 1 x 96x2" in capsys.readouterr().out
    for command in (("export", tmp_path / "other.pt2"), ("profile",)):
        assert run(*command, *options, "--size", 64) == 2
        assert "expected no --size, as the model takes series" in capsys.readouterr().err


@pytest.mark.long
def test_export_as_onnx(trained, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, weights = trained
    out = tmp_path / "model.onnx"
    assert run("export", out, *OPTIONS, "--checkpoint", weights, "--format", "onnx") == 0
    session = onnxruntime.InferenceSession(out)
    for images in (1, 3):
        x = torch.randn(images, 3, 32, 32)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("model.onnx", [], "expected a file name that ends in .pt2"),
        ("model.pt2", ["--format", "onnx"], "expected a file name that ends in .onnx"),
        ("none/model.pt2", [], "there is no folder"),
        ("model.pt2", ["--batch", "0"], "expected --batch of 1 or more, got 0"),
        ("model.pt2", ["--size", "-3"], "expected --size of 1 or more, got -3"),
        ("model.pt2", ["--model", "resnet"], "unknown model"),
        ("model.pt2", ["--checkpoint", "none.pth"], "none.pth"),
        ("model.pt2", ["--model-arguments", "["], "no JSON"),
    ],
)
def test_what_export_refuses(out, options, message, tmp_path, capsys):
    assert run("export", tmp_path / out, *OPTIONS, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_onnx_needs_its_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ffnet.commands.export.ONNX", ("onnx_that_is_not_there",))
    assert run("export", tmp_path / "model.onnx", *OPTIONS, "--format", "onnx") == 2
    assert "--format onnx needs onnx_that_is_not_there (pip install" in capsys.readouterr().err


def test_profile(tmp_path, capsys):
    assert run("profile", *OPTIONS, "--runs", 2, "--batch", 2, "--trace", tmp_path / "trace.json") == 0
    out = capsys.readouterr().out
    assert re.search(r"ffnet_1, 2 x 3x32x32, \d+ threads: [\d,]+ parameters, 0.\d+ G multiply-adds", out)
    for name in ("plain PyTorch", "on the operators"):
        assert re.search(rf"{name} +median +[\d.]+ ms, best +[\d.]+ ms", out)
    assert native.cpu_library_error() or "ffnet_kernels::channel_mixer" in out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "0"], "expected --runs of 1 or more"),
        (["--threads", "-1"], "expected --threads of 1 or more"),
        (["--trace", "none/trace.json", "--runs", "1"], "cannot write"),
        (["--model", "resnet"], "unknown model"),
    ],
)
def test_what_profile_refuses(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("profile", *OPTIONS, *options) == 2
    assert message in capsys.readouterr().err
