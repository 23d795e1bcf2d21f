"""The commands of ffnet: what they print and write, and one line for what the user can put right."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

import ffnet
from ffnet.__main__ import main
from ffnet.commands.common import CommandError, new_file
from ffnet.preprocess import load_image, preprocess

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path)
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("palette.png", Image.fromarray(PIXELS).quantize(256), None),
        ("grey.png", Image.fromarray(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, 2)),
        ("grey 16.png", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256 + 77), np.repeat(PIXELS[..., :1], 3, 2)),
        ("alpha.png", Image.merge("RGBA", [*Image.fromarray(PIXELS).split(), Image.new("L", (72, 48), 0)]), 255),
        ("opaque.png", Image.fromarray(PIXELS).convert("RGBA"), PIXELS),
        ("cmyk.tif", Image.fromarray(255 - PIXELS).convert("CMYK"), 255 - PIXELS),
        ("bits.png", Image.fromarray(PIXELS[..., 0] > 99), np.repeat(255 * (PIXELS[..., :1] > 99), 3, 2)),
    ],
)
def test_every_kind_of_picture_becomes_rgb(name, image, expected, tmp_path):
    image.save(tmp_path / name)
    loaded = load_image(tmp_path / name)
    assert loaded.mode == "RGB"
    expected = np.asarray(image.convert("RGB")) if expected is None else expected
    assert (np.asarray(loaded) == expected).all()


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    image = Image.fromarray(np.arange(48 * 72, dtype=np.uint8).reshape(48, 72) % 4).convert("P")
    image.putpalette([0, 0, 0, 9, 9, 9, 50, 60, 70, 200, 0, 0])
    image.save(tmp_path / "transparent.png", transparency=2)
    pixels = np.asarray(load_image(tmp_path / "transparent.png"))
    assert pixels[0, :4].tolist() == [[0, 0, 0], [9, 9, 9], [255, 255, 255], [200, 0, 0]]


def test_a_turned_picture_is_read_as_viewers_show_it(tmp_path):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert (np.asarray(load_image(tmp_path / "turned.png")) == np.rot90(PIXELS, -1)).all()


def test_pictures_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(OSError, match="floating point"):
        load_image(tmp_path / "float.tif")
    with pytest.raises(OSError, match="from 70000 to 70000"):
        load_image(tmp_path / "wide.tif")


def test_classify(tmp_path, picture, capsys):
    torch.manual_seed(1)
    model = ffnet.create_model("ffnet_1", num_classes=7).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ffnet_1.pth")
    (tmp_path / "labels.txt").write_text("".join(f"name {i}\n" for i in range(7)))
    options = ["--model", "ffnet_1", "--checkpoint", tmp_path / "ffnet_1.pth", "--classes", 7, "--size", 64]
    with torch.inference_mode():
        expected = model(preprocess(load_image(picture), model.config, 64)[None])[0].softmax(0)
    for more, name in (([], "class"), (["--labels", tmp_path / "labels.txt"], "name")):
        assert run("classify", picture, *options, *more) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1:] for line in lines] == [[name, str(i)] for i in expected.topk(5).indices.tolist()]
        assert float(lines[0].split()[0].rstrip("%")) == pytest.approx(100 * expected.max().item(), abs=0.02)


@pytest.fixture
def broken(tmp_path, picture):
    """A folder of things that are not what they should be."""
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save(ffnet.create_model("ffnet_1", num_classes=3).state_dict(), tmp_path / "three.pth")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    return tmp_path


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("none.png", [], "No such file"),
        ("text.jpg", [], "cannot identify"),
        ("cut.png", [], "cannot read"),
        ("picture.png", ["--model", "ffnet_9"], "ffnet_9"),
        ("picture.png", ["--checkpoint", "{}/none.pth"], "none.pth"),
        ("picture.png", ["--checkpoint", "{}/text.pth"], "not a readable checkpoint"),
        ("picture.png", ["--classes", "4"], "head.weight: expected [4, 640], got [3, 640]"),
        ("picture.png", ["--classes", "0"], "--classes of 1 or more, got 0"),
        ("picture.png", ["--labels", "{}/none.txt"], "none.txt"),
        ("picture.png", ["--labels", "{}/labels.txt"], "expected 3 lines, one a class, got 2"),
        ("picture.png", ["--size", "8"], "--size of 32 or more, got 8"),
    ],
)
def test_one_line_for_what_the_user_can_put_right(image, options, message, broken, capsys):
    defaults = ["--model", "ffnet_1", "--checkpoint", broken / "three.pth", "--classes", 3]
    assert run("classify", broken / image, *defaults, *(o.format(broken) for o in options)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("ffnet classify: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "result.txt"
    with new_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with contextlib.suppress(KeyboardInterrupt), new_file(path) as file:
        file.write(b"sec")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first"
    with new_file(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CommandError, match="cannot write"), new_file(tmp_path / "none" / "result.txt"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError, match="cannot write"), new_file(tmp_path / "folder") as file:
        file.write(b"x")
    assert {p.name for p in tmp_path.iterdir()} == {"result.txt", "folder"}
