"""The commands of ffnet: what they print and write, and one line for what the user can put right."""

import contextlib
import json
import os
import stat
import threading

import numpy as np
import pytest
import torch
from ffnet_testing import randomise
from PIL import Image

import ffnet
from ffnet import create_model, registry
from ffnet.__main__ import main
from ffnet.commands import classify
from ffnet.commands.common import CommandError, new_file, require_place
from ffnet.commands.segment import palette
from ffnet.preprocess import load_image, normalised, preprocess
from ffnet.registry import ModelEntry, model_entry

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)


TRUNK = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}


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
    Image.fromarray(np.full((4, 4), 70, np.int32)).save(tmp_path / "wide.tif")  # the upper bits would be black
    with pytest.raises(OSError, match="floating point"):
        load_image(tmp_path / "float.tif")
    with pytest.raises(OSError, match="8 or 16 bits a channel, got 32"):
        load_image(tmp_path / "wide.tif")
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([77, 200, 99, 1]))
    assert np.asarray(load_image(tmp_path / "deep.pgm"))[0, :, 0].tolist() == [77, 99]


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
    torch.save(ffnet.create_model("ffnet_1", num_classes=3, **TRUNK).state_dict(), tmp_path / "three.pth")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    return tmp_path


@pytest.mark.parametrize("extra_folds", [False, True])
def test_a_folded_checkpoint(extra_folds, tmp_path, picture, capsys):
    torch.manual_seed(1)
    model = randomise(ffnet.create_model("ffnet_1", num_classes=7, layer_scale_init=1.0, **TRUNK)).eval()
    folded = ffnet.reparameterize(model, extra_folds=extra_folds)
    said = []
    for form in (model, folded):
        torch.save(form.state_dict(), tmp_path / "weights.pth")
        options = ["--model", "ffnet_1", "--checkpoint", tmp_path / "weights.pth", "--classes", 7, "--size", 64]
        options += ["--model-arguments", json.dumps({**TRUNK, "layer_scale_init": 1.0})]
        assert run("classify", picture, *options) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_only_the_middle_of_a_strip_is_resized(tmp_path, monkeypatch):
    """Else a strip one pixel wide would become a map of gigabytes."""
    config = ffnet.create_model("ffnet_1", device="meta").config
    wave = 128 + 100 * np.sin(np.arange(2400) / 25)
    image = Image.fromarray(np.repeat(wave[None, :, None], 20, 0).repeat(3, 2).astype(np.uint8))
    found = preprocess(image, config, 32)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how: sizes.append(size) or resize(self, size, *how))
    assert preprocess(image.resize((1, 50_000)), config, 32).shape == found.shape == (3, 32, 32)
    assert max(sizes[1]) <= 16 * 36
    monkeypatch.setattr("ffnet.preprocess.LONGEST", 10**9)
    torch.testing.assert_close(found, preprocess(image, config, 32), atol=0.1, rtol=0)


def test_not_enough_memory(picture, monkeypatch, capsys):
    for error, is_ours in (
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("another"), False),
    ):

        def fail(options, error=error):
            raise error

        monkeypatch.setattr(classify, "picture_from", fail)
        call = ("classify", picture, "--model", "ffnet_1", "--checkpoint", "none.pth")
        if is_ours:
            assert run(*call) == 2
            assert capsys.readouterr().err == "ffnet classify: not enough memory; a smaller --size needs less\n"
        else:
            with pytest.raises(RuntimeError, match="another"):
                run(*call)


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
        (["--size", "7000"], "pixels at most, got one of 72x48"),
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


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    real, link = tmp_path / "elsewhere" / "result.txt", tmp_path / "link.txt"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with new_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (real.read_text(), stat.S_IMODE(real.stat().st_mode)) == ("new", 0o640)
    assert [path.name for path in real.parent.iterdir()] == ["result.txt"]


def test_pipes_are_written_to_and_not_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    with new_file(pipe) as file:
        file.write(b"through")
    reader.join()
    assert read == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_name_as_long_as_file_systems_have_them(tmp_path):
    path = tmp_path / ("ä" * 125 + ".txt")
    with new_file(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_a_place_is_checked_before_the_work(tmp_path, picture, monkeypatch, capsys):
    monkeypatch.setattr("ffnet.commands.segment.picture_from", lambda path: pytest.fail("it began to work"))
    options = ["--model", "ffnet_seg_ade20k", "--checkpoint", "seg.pth", "--out", tmp_path / "mask.png"]
    assert run("segment", picture, *options, "--overlay", tmp_path / "none" / "overlay.png") == 2
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # as for any user but the superuser
    with pytest.raises(CommandError, match="its folder is not writable"):
        require_place(tmp_path / "mask.png")
