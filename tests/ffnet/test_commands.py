"""The commands of ffnet: what they print and write, and one line for what the user can put right."""

import contextlib
import json

import numpy as np
import pytest
import torch
from ffnet_testing import randomise
from PIL import Image

import ffnet
from ffnet import create_model, registry
from ffnet.__main__ import main
from ffnet.commands.common import CommandError, new_file
from ffnet.commands.segment import palette
from ffnet.preprocess import load_image, normalised, preprocess
from ffnet.registry import ModelEntry, model_entry

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


TRUNK = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}


@pytest.fixture
def broken(tmp_path, picture):
    """A folder of things that are not what they should be."""
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save(ffnet.create_model("ffnet_1", num_classes=3, **TRUNK).state_dict(), tmp_path / "three.pth")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    return tmp_path


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("none.png", [], "No such file"),
        ("text.jpg", [], "cannot identify"),
        ("cut.png", [], "cannot read"),
        ("picture.png", ["--model", "ffnet_9"], "ffnet_9"),
        ("picture.png", ["--model", "ffnet_1_features"], "expected a model for classification"),
        ("picture.png", ["--checkpoint", "{}/none.pth"], "none.pth"),
        ("picture.png", ["--checkpoint", "{}/text.pth"], "not a readable checkpoint"),
        ("picture.png", ["--classes", "4"], "head.weight: expected [4, 64], got [3, 64]"),
        ("picture.png", ["--classes", "0"], "--classes of 1 or more, got 0"),
        ("picture.png", ["--labels", "{}/none.txt"], "none.txt"),
        ("picture.png", ["--labels", "{}/labels.txt"], "expected 3 lines, one a class, got 2"),
        ("picture.png", ["--model-arguments", "{{"], "no JSON"),
        ("picture.png", ["--model-arguments", "[1]"], "expected an object"),
        ("picture.png", ["--model-arguments", '{{"window": 7}}'], "window"),
        ("picture.png", ["--model-arguments", '{{"norm": "layer"}}'], "stages.0.1"),
        ("picture.png", ["--size", "8"], "--size of 32 or more, got 8"),
    ],
)
def test_one_line_for_what_the_user_can_put_right(image, options, message, broken, capsys):
    defaults = ["--model", "ffnet_1", "--checkpoint", broken / "three.pth", "--classes", 3]
    defaults += ["--model-arguments", json.dumps(TRUNK)]
    assert run("classify", broken / image, *defaults, *(o.format(broken) for o in options)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("ffnet classify: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


SEGMENTER = {
    "depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "stem_width": 8, "num_classes": 5,
    "head": {"width": 16, "align_width": 24, "blocks": 1},
}  # fmt: skip


@pytest.fixture
def segmenter(tmp_path, monkeypatch):
    """A small one, by the name of a published one, and the options that name its checkpoint."""
    torch.manual_seed(0)
    build = model_entry("ffnet_seg_ade20k").build
    entry = ModelEntry(lambda **options: build(**{**SEGMENTER, **options}), "segmentation", "")
    monkeypatch.setitem(registry._ENTRIES, "ffnet_seg_ade20k", entry)
    model = randomise(create_model("ffnet_seg_ade20k"))
    torch.save(model.state_dict(), tmp_path / "seg.pth")
    return model.eval(), ["--model", "ffnet_seg_ade20k", "--checkpoint", tmp_path / "seg.pth"]


@pytest.mark.parametrize("size", [None, 40])
def test_segment(size, tmp_path, picture, segmenter, capsys):
    model, options = segmenter
    out, overlay = tmp_path / "mask.png", tmp_path / "overlay.PNG"
    out.write_text("what was there")
    more = [] if size is None else ["--size", size]
    assert run("segment", picture, *options, "--out", out, "--overlay", overlay, *more) == 0
    image = load_image(picture)
    seen = image if size is None else image.resize((60, 40), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        expected = model.predict(normalised(seen, model.config)[None], (48, 72))[0].numpy()
    with Image.open(out) as mask:
        assert mask.mode == "P"
        assert (np.asarray(mask) == expected).mean() > 0.999  # of near ties
        colours = np.asarray(mask.convert("RGB"), dtype=int)
    assert np.abs(np.asarray(load_image(overlay), dtype=int) - (colours + PIXELS) / 2).max() <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {out} and {overlay}"
    shares = {int(line.split()[-1]): float(line.split("%")[0]) for line in lines[:-1]}
    assert set(shares) == set(np.unique(expected))
    assert sum(shares.values()) == pytest.approx(100, abs=0.05)


def test_colours_differ():
    colours = np.array(palette()).reshape(256, 3)
    assert len(np.unique(colours, axis=0)) == 256
    assert colours[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{}/mask.jpg"], "ends in .png"),
        (["--out", "{}/none/mask.png"], "no folder"),
        (["--overlay", "{}/overlay.jpg"], "ends in .png"),
        (["--out", "{}/folder.png"], "Is a directory"),
        (["--size", "16"], "--size of 32 or more, got 16"),
        (["--checkpoint", "{}/grey.pth", "--model-arguments", '{{"in_chans": 1}}'], "of 3 channels"),
        (["--classes", "300"], "decode_head.conv_seg.weight: expected [300, 24, 1, 1], got [5, 24, 1, 1]"),
        (["--model", "ffnet_1"], "expected a model for segmentation"),
    ],
)
def test_segment_refuses(options, message, tmp_path, picture, segmenter, capsys):
    (tmp_path / "folder.png").mkdir()
    torch.save(create_model("ffnet_seg_ade20k", in_chans=1).state_dict(), tmp_path / "grey.pth")
    defaults = [*segmenter[1], "--out", tmp_path / "mask.png"]
    assert run("segment", picture, *defaults, *(o.format(tmp_path) for o in options)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert not (tmp_path / "mask.png").exists()


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
