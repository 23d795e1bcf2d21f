"""The command line of ffnet: the demo from picture to files, and one line for what the user can put right."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.demo import closing
from benchmarks.results import Measurement, Row
from ffnet import create_model, list_models
from ffnet.__main__ import main
from ffnet.preprocess import load_image, preprocess

CONFIG = create_model("ffnet_1", device="meta").config


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(autouse=True)
def threads():
    """The demo sets them for the process; one, since busy cores make small maps on several very slow."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def demo(tmp_path, *options):
    fast = ("--size", "64", "--samples", "1", "--threads", "1", "--no-compile", "--output", tmp_path / "out")
    return main(["demo", *map(str, fast), *map(str, options)])


def test_demo_on_its_own_photographs(tmp_path, capsys):
    assert demo(tmp_path) == 0
    text = capsys.readouterr().out
    for part in ("as trained", "china.jpg", "flower.jpg", "5/5", "weights are random", "mean nothing"):
        assert part in text
    assert text.splitlines()[-1].endswith("Next: `make bench` measures every operator beside baselines, in minutes.")
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    measurements = result["rows"][0]["measurements"]
    assert [m["contender"] for m in measurements] == ["ours", "eager nchw", "eager channels-last", "as trained"]
    assert all(m["passed"] for m in measurements)
    assert all(len(p["top"]) == 5 and p["agreement"]["ours"] == 5 for p in result["extra"]["predictions"])
    assert (tmp_path / "out" / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ours", "passed", "expected"),
    [
        ((1.0, 2.0), True, "is 1.50 times as fast as the best of the others, b, with the same numbers"),
        ((3.0, 6.0), True, "takes 2.00 times as long as the best of the others, b, with the same numbers"),
        ((1.0, 2.0), False, "b, but with WRONG numbers"),
        ((), True, "Ours did not run: no luck"),
    ],
)
def test_the_last_sentence_says_what_the_table_says(monkeypatch, ours, passed, expected):
    """Ratios are medians of the rounds', as in the table."""
    monkeypatch.setattr("ffnet_kernels.native.cpu_library_error", lambda: None)
    measurements = (
        Measurement("ours", samples_ms=ours, passed=passed, reason=None if ours else "no luck"),
        Measurement("a", samples_ms=(4.0, 4.0), passed=True),
        Measurement("b", samples_ms=(1.5, 3.0), passed=True),
    )
    assert expected in closing(Row("case", 1, 1, measurements))
    monkeypatch.setattr("ffnet_kernels.native.cpu_library_error", lambda: "no compiler")
    assert closing(Row("case", 1, 1, measurements)).startswith("There are no kernels here")


def test_demo_with_a_checkpoint(tmp_path, picture, capsys):
    torch.manual_seed(1)
    model = create_model("ffnet_1").eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ffnet_1.pth")
    assert demo(tmp_path, "--image", picture, "--checkpoint", tmp_path / "ffnet_1.pth") == 0
    (prediction,) = json.loads((tmp_path / "out" / "demo.json").read_text())["extra"]["predictions"]
    with torch.inference_mode():
        probabilities = model(preprocess(load_image(picture), CONFIG, 64)[None])[0].softmax(0)
    best = prediction["top"][0]
    assert best["class"] == probabilities.argmax().item()
    assert best["probability"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    text = capsys.readouterr().out
    assert f"class {best['class']}\n" in text
    assert "mean nothing" not in text


def test_without_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo(tmp_path) == 2
    assert "--image" in capsys.readouterr().err


def test_without_pillow(tmp_path, monkeypatch, capsys):
    for module in ("benchmarks.demo", "ffnet.preprocess"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("benchmarks.demo", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert demo(tmp_path) == 2
    assert "ffnet-kernels[demo]" in capsys.readouterr().err


def test_bfloat16(tmp_path, picture):
    assert demo(tmp_path, "--image", picture, "--dtype", "bfloat16") == 0


@pytest.fixture
def broken(tmp_path, picture):
    """A folder of things that are not what they should be."""
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--image", "{}/none.jpg", "none.jpg"),
        ("--image", "{}", "Is a directory"),
        ("--image", "{}/text.jpg", "text.jpg"),
        ("--image", "{}/cut.png", "cut.png"),
        ("--model", "ffnet_9", "ffnet_9"),
        ("--checkpoint", "{}/none.pth", "none.pth"),
        ("--checkpoint", "{}/text.pth", "text.pth"),
        ("--checkpoint", "{}/other.pth", "head.weight"),
        ("--output", "{}/file/out", "file"),
    ],
)
def test_one_line_for_what_the_user_can_put_right(option, value, message, broken, capsys):
    assert demo(broken, option, value.format(broken)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ffnet demo: ")
    assert captured.out == ""


@pytest.mark.parametrize("options", [["--threads", "0"], ["--samples", "x"], ["--size", "16"], ["--dtype", "int8"]])
def test_wrong_options(options):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *options])
    assert exit_.value.code == 2


def test_list(capsys):
    assert main(["list", "--task", "classification"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list_models("classification")
    first = lines[1].split()
    assert first[:4] == ["ffnet_1", "classification", "13,660,152", "13,775,656"]
    assert first[5:8] == ["2.985", "G", "81.3"]


@pytest.mark.parametrize(("width", "height"), [(100, 100), (640, 427), (50, 300)])
def test_preprocess_takes_the_normalised_centre(width, height):
    red = np.zeros((height, width, 3), dtype=np.uint8)
    red[..., 0] = 255
    tensor = preprocess(Image.fromarray(red), CONFIG, 64)
    assert tensor.shape == (3, 64, 64)
    assert tensor.dtype == torch.float32
    for value, mean, std, channel in zip((1, 0, 0), CONFIG["mean"], CONFIG["std"], tensor, strict=True):
        torch.testing.assert_close(channel, torch.full((64, 64), (value - mean) / std))


def test_preprocess_crops_what_crop_pct_says():
    # 284 = floor(256 / 0.9): no resizing, so the 256 pixels in the middle come back as they are.
    pixels = np.random.default_rng(0).integers(0, 256, (284, 284, 3), dtype=np.uint8)
    tensor = preprocess(Image.fromarray(pixels), CONFIG)
    back = tensor.permute(1, 2, 0) * torch.tensor(CONFIG["std"]) + torch.tensor(CONFIG["mean"])
    torch.testing.assert_close(back, torch.from_numpy(pixels[14:270, 14:270] / np.float32(255)))


def test_grey_and_transparent_pictures_are_read_as_rgb(tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (8, 8)).save(tmp_path / "picture.png")
        assert load_image(tmp_path / "picture.png").mode == "RGB"
