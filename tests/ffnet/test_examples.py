"""The examples, on synthetic pictures: what they train on is what they say, and each runs to its files."""

import json

import pytest
import torch
from PIL import Image

from ffnet.examples import detect_coins, photographs, segment_textures


def test_a_mosaic_shows_each_pixels_class():
    pieces = [torch.full((1, 150, 140), float(i)) for i in range(5)]
    images, masks = segment_textures.mosaics(pieces, 6, torch.Generator().manual_seed(0))
    assert images.shape == (6, 1, 128, 128)
    assert torch.equal(images[:, 0], masks.float())
    assert len(masks.unique()) > 2
    assert segment_textures.by_brightness(pieces, images, masks) == 1


def test_halves_do_not_overlap(monkeypatch):
    picture = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90)
    monkeypatch.setattr(segment_textures, "photograph", lambda *where: picture)
    left, right = segment_textures.halves()
    assert left[0].shape == right[0].shape == (1, 256, 128)
    assert left[0].max() < right[0].min() or right[0].max() < left[0].min()


def test_pieces_cut_no_coin():
    image = torch.zeros(3, 303, 384)
    areas = (*detect_coins.TRAINED_ON, *detect_coins.HELD_OUT)
    boxes = [detect_coins.piece(image, area) for area in areas]
    assert [len(b) for _, b in boxes] == [3] * 8
    for part, found in boxes:
        assert (found[:, :2] >= 0).all()
        assert (found[:, 2] <= part.shape[2]).all()
        assert (found[:, 3] <= part.shape[1]).all()
        assert (found[:, 2:] - found[:, :2] > 30).all()
    assert all(a[3] <= detect_coins.HELD_OUT[0][1] for a in detect_coins.TRAINED_ON)


def noise(*_where):
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(256, (303, 384), generator=generator, dtype=torch.uint8).numpy()).convert(
        "RGB"
    )


@pytest.mark.long
def test_segmentation_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(segment_textures, "photograph", noise)
    monkeypatch.setattr(segment_textures, "TESTS", 5)
    result = segment_textures.main(["--steps", "2", "--out", str(tmp_path)])
    assert set(result) >= {"held-out halves", "halves trained on"}
    assert json.loads((tmp_path / "result.json").read_text()) == result
    state = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]
    assert next(iter(state.values())).isfinite().all()
    with Image.open(tmp_path / "picture.png") as sheet:
        assert sheet.size == (5 * 132 - 4, 3 * 132 - 4)
    assert "step    1" in capsys.readouterr().out


@pytest.mark.long
def test_detection_runs(monkeypatch, tmp_path):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(detect_coins, "photograph", noise)
    detect_coins.main(["--steps", "2", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text())["held out"]["coins"] == 6
    assert (tmp_path / "picture.png").exists()


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"ffnet-kernels\[examples\]"):
        photographs.photograph("scikit-image", "coins.png")
