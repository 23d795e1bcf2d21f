"""The example that serves a model in C++: it prints what Python computes, and says what is wrong."""

import importlib.util
import json
import os
import shlex
import shutil

import pytest
import torch
from PIL import Image

from ffnet.commands.common import CommandError
from ffnet.examples import serve_image
from ffnet_kernels import native

needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None, reason="there is no C++ compiler"
)
needs_native = pytest.mark.skipif(bool(native.cpu_library_error()), reason="no native library was built")


@pytest.mark.long
@needs_compiler
@needs_native
def test_the_program_computes_what_python_does(tmp_path):
    """And says what is wrong with a file."""
    torch.manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (50, 60, 3), dtype=torch.uint8).numpy())
    picture.save(tmp_path / "any.png")
    trunk = json.dumps({"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64], "num_classes": 7})
    options = ["--model-arguments", trunk, "--size", "40", "--runs", "2", "--image", str(tmp_path / "any.png")]
    rows = list(serve_image.rows(serve_image.parser().parse_args(options), tmp_path))
    assert [row.name for row in rows] == [
        "Python, plain PyTorch", "Python, ffnet_kernels.optimize",
        "Python, AOTInductor, plain", "C++, AOTInductor, plain",
        "Python, AOTInductor, our operators", "C++, AOTInductor, our operators",
        *["Python, ONNX Runtime"] * all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    ]  # fmt: skip
    for row in rows:
        assert row.difference < 1e-5
        assert 0 < row.median <= row.p90

    library, program, folder = native.library_dir() / native.CPU_LIBRARY, tmp_path / "classify", tmp_path
    for arguments, message in (
        ({"library": None}, "ffnet_kernels"),  # whose operators nobody has defined
        ({"library": tmp_path / "none.so"}, "none.so: cannot open"),
        ({"model": tmp_path / "none.pt2"}, "cannot read .*none.pt2"),
        ({"picture": tmp_path / "none.ppm"}, "expected a binary PPM"),
        ({"picture": folder / "our_operators.pt2"}, "expected a binary PPM"),
        ({"runs": 0}, "--runs: expected a number above 0, got 0"),
    ):
        call = {"model": folder / "our_operators.pt2", "picture": folder / "picture.ppm", "library": library, "runs": 1}
        with pytest.raises(CommandError, match=message):
            serve_image.classify(program, **{**call, **arguments}, threads=1)
    Image.new("RGB", (41, 40)).save(tmp_path / "wide.ppm")
    (tmp_path / "cut.ppm").write_bytes((folder / "picture.ppm").read_bytes()[:-1])
    for name, message in (("wide.ppm", "expected 40x40 pixels, got 41x40"), ("cut.ppm", "ends too early")):
        with pytest.raises(CommandError, match=message):
            serve_image.classify(
                program, folder / "our_operators.pt2", tmp_path / name, library=library, threads=1, runs=1
            )


def test_a_row_of_the_table():
    assert str(serve_image.Row("C++", 1.25, 2.5, 3e-7)).split() == ["C++", "1.250", "2.500", "3.00e-07"]
    assert len(str(serve_image.Row("C++", 1.25, 2.5, 3e-7))) == len(serve_image.HEAD)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no_such_compiler -O2")
    with pytest.raises(CommandError, match="no C\\+\\+ compiler: no_such_compiler is not on the path"):
        serve_image.compile_program(tmp_path / "classify")


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CommandError, match="does not compile"):
        serve_image.compile_program(tmp_path / "classify")


def test_bad_options(capsys):
    assert serve_image.main(["--runs", "0"]) == 2
    assert "1 or more" in capsys.readouterr().err
    assert serve_image.main(["--model", "resnet"]) == 2
    assert "resnet" in capsys.readouterr().err
