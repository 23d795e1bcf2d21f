"""``ffnet upscale`` and ``ffnet forecast``: results, kinds of pictures and series, one line for what is wrong."""

import csv
import math
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from ffnet_testing import randomise
from PIL import Image, ImageCms

import ffnet
from ffnet.__main__ import main
from ffnet.commands import forecast as command_forecast
from ffnet.commands import upscale as command
from ffnet.forecasting import ForecastFFNet
from ffnet.super_resolution import FFNetSR


@pytest.fixture
def sr(tmp_path):
    """A model and its checkpoint."""
    model = FFNetSR(scale=2, depth=1, dim=8).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "sr.pth")
    return model, tmp_path / "sr.pth"


def picture(path, mode="RGB", size=(13, 9), dtype=np.uint8, high=256, **options):
    bands = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,), "CMYK": (4,), "I;16": ()}[mode]
    pixels = np.random.default_rng(0).integers(0, high, (size[1], size[0], *bands)).astype(dtype)
    image = Image.fromarray(pixels) if mode == "I;16" else Image.frombytes(mode, size, pixels.tobytes())
    image.save(path, **options)
    return image


def upscale(image, checkpoint, out, *options) -> int:
    return main(["upscale", str(image), "--checkpoint", str(checkpoint), "--out", str(out), *map(str, options)])


def save_deep_rgb(path):
    """An RGB picture of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(6 * 5)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@torch.no_grad()
def expected_pixels(model, image) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]
    return (model(pixels)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("options", [(), ("--tile", 2), ("--tile", 0), ("--scale", 2)])
def test_a_picture_enlarged(tmp_path, sr, options, capsys):
    model, checkpoint = sr
    image = picture(tmp_path / "in.png")
    (tmp_path / "out.png").write_text("what was there")
    assert upscale(tmp_path / "in.png", checkpoint, tmp_path / "out.png", *options) == 0
    with Image.open(tmp_path / "out.png") as result:
        assert (result.mode, result.size) == ("RGB", (26, 18))
        assert np.abs(np.asarray(result) - expected_pixels(model, image)).max() < 0.51
    assert "26x18, 13x9 enlarged 2 times" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "out.png", "sr.pth"}


@pytest.mark.parametrize(("mode", "becomes"), [("L", "L"), ("RGBA", "RGBA"), ("LA", "LA")])
def test_modes_stay(tmp_path, sr, mode, becomes):
    image = picture(tmp_path / "in.png", mode)
    assert upscale(tmp_path / "in.png", sr[1], tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as result:
        assert (result.mode, result.size) == (becomes, (26, 18))
        if "A" in mode:
            alpha = image.getchannel("A").resize((26, 18), Image.Resampling.BICUBIC)
            assert result.getchannel("A").tobytes() == alpha.tobytes()
        colour = expected_pixels(sr[0], image)
        if mode == "RGBA":
            assert np.abs(np.asarray(result)[..., :3] - colour).max() < 0.51


def test_palettes_become_rgb(tmp_path, sr):
    palette = picture(tmp_path / "rgb.png").quantize(16)
    palette.save(tmp_path / "in.png")
    assert upscale(tmp_path / "in.png", sr[1], tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as result:
        assert result.mode == "RGB"
        assert np.abs(np.asarray(result) - expected_pixels(sr[0], palette)).max() < 0.51
    palette.save(tmp_path / "clear.png", transparency=3)
    assert command.picture_from(tmp_path / "clear.png").mode == "RGBA"
    palette.save(tmp_path / "in.gif")
    assert command.picture_from(tmp_path / "in.gif").mode == "RGB"


@pytest.mark.parametrize(("name", "atol"), [("out.tif", 0.51), ("out.bmp", 0.51), ("out.jpg", 40), ("out.WEBP", 40)])
def test_formats(tmp_path, sr, name, atol):
    image = picture(tmp_path / "in.png")
    assert upscale(tmp_path / "in.png", sr[1], tmp_path / name) == 0
    with Image.open(tmp_path / name) as result:
        assert result.size == (26, 18)
        assert np.abs(np.asarray(result.convert("RGB")) - expected_pixels(sr[0], image)).mean() < atol


@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.jpg", "out.webp"])
def test_the_colour_profile_stays(tmp_path, sr, name):
    """Without it colours of a wide gamut, those of most telephones, look pale."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(tmp_path / "in.png", icc_profile=profile)
    assert upscale(tmp_path / "in.png", sr[1], tmp_path / name) == 0
    with Image.open(tmp_path / name) as result:
        assert result.info["icc_profile"] == profile


def test_pictures_are_in_floating_point_by_tiles_only(tmp_path, sr):
    model, seen = sr[0], []
    model.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    image = picture(tmp_path / "in.png", size=(50, 40))
    result = command.enlarged(model, image, tile=8)
    assert len(seen) > 10
    assert max(max(size) for size in seen) <= 8 + 2 * model.receptive_radius
    assert np.abs(np.asarray(result) - expected_pixels(model, image)).max() < 0.51


def test_a_folded_checkpoint_of_super_resolution(tmp_path, capsys):
    model = randomise(FFNetSR(depth=1, dim=8, norm="batch")).eval()
    picture(tmp_path / "in.png")
    written = []
    for form in (model, ffnet.reparameterize(model)):
        torch.save(form.state_dict(), tmp_path / "sr.pth")
        assert upscale(tmp_path / "in.png", tmp_path / "sr.pth", tmp_path / "out.png") == 0
        written.append((tmp_path / "out.png").read_bytes())
    assert written[0] == written[1]


def test_exif_turns_the_picture(tmp_path, sr):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(tmp_path / "in.jpg", exif=exif)
    assert command.picture_from(tmp_path / "in.jpg").size == (9, 13)


@pytest.fixture
def broken(tmp_path, sr):
    picture(tmp_path / "good.png")
    picture(tmp_path / "clear.png", "RGBA")
    picture(tmp_path / "deep.png", "I;16", dtype=np.uint16, high=65536)
    save_deep_rgb(tmp_path / "deep_rgb.png")
    picture(tmp_path / "ink.jpg", "CMYK")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:90])
    torch.save(ForecastFFNet(dim=4).state_dict(), tmp_path / "series.pth")
    torch.save(FFNetSR(in_chans=1, depth=1, dim=4).state_dict(), tmp_path / "grey.pth")
    incomplete = FFNetSR(depth=1, dim=4).state_dict()
    del incomplete["conv_bef_up.bias"]
    torch.save(incomplete, tmp_path / "incomplete.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "none.png"}, "none.png: No such file"),
        ({"image": "."}, "Is a directory"),
        ({"image": "text.png"}, "text.png: cannot identify"),
        ({"image": "cut.png"}, "cut.png"),
        ({"image": "deep.png"}, "8 bits a channel, got 16 bits a channel; convert it first"),
        ({"image": "deep_rgb.png"}, "8 bits a channel, got 16 bits a channel; convert it first"),
        ({"image": "ink.jpg"}, "8 bits a channel, got mode CMYK"),
        ({"image": "float.tif"}, "8 bits a channel, got mode F"),
        ({"--scale": "5"}, "expected --scale 2, 3 or 4, got 5"),
        ({"--scale": "3"}, "enlarges 2 times, got --scale 3"),
        ({"--checkpoint": "none.pth"}, "no checkpoint file"),
        ({"--checkpoint": "text.pth"}, "not a readable checkpoint"),
        ({"--checkpoint": "series.pth"}, "no weights of FFNet-SR"),
        ({"--checkpoint": "grey.pth"}, "a model of 3 channels, got 1"),
        ({"--checkpoint": "incomplete.pth"}, "1 missing: conv_bef_up.bias"),
        ({"--tile": "-1"}, "expected --tile of 0 or more, got -1"),
        ({"--overlap": "-1"}, "expected --overlap of 0 or more, got -1"),
        ({"--out": "out.txt"}, "expected --out to end in .png, .tif"),
        ({"--out": "out.gif"}, "expected --out to end in .png, .tif"),  # it would reduce colours
        ({"--out": "out.ico"}, "expected --out to end in .png, .tif"),  # and this the size
        ({"--out": "folder/out.png"}, "cannot write"),
        ({"image": "clear.png", "--out": "out.jpg"}, "JPEG holds no transparency"),
        ({"image": "clear.png", "--out": "out.bmp"}, "BMP holds no transparency"),
    ],
)
def test_upscale_says_what_is_wrong(broken, changes, message, capsys):
    options = {"image": "good.png", "--checkpoint": "sr.pth", "--out": "out.png", **changes}
    before = sorted(broken.iterdir())
    files = {"image", "--checkpoint", "--out"}
    argv = [f"{broken / value}" if name in files else value for name, value in options.items()]
    pairs = zip([name for name in options if name != "image"], argv[1:], strict=True)
    assert main(["upscale", argv[0], *(part for pair in pairs for part in pair)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("ffnet upscale: ")
    assert captured.err.count("\n") == 1
    assert sorted(broken.iterdir()) == before


def test_a_failed_write_leaves_the_old_picture(tmp_path, sr, monkeypatch, capsys):
    picture(tmp_path / "in.png")
    (tmp_path / "out.png").write_text("what was there")

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert upscale(tmp_path / "in.png", sr[1], tmp_path / "out.png") == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out.png").read_text() == "what was there"
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "out.png", "sr.pth"}


@pytest.fixture
def series(tmp_path):
    """A model of two variables, its checkpoint, and a series of dates."""
    model = ForecastFFNet(2, 8, 5, 4, kernel_size=3, small_kernel=1).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ts.pth")
    values = np.random.default_rng(0).normal(10, 3, (20, 2))
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "a", "b"])
        writer.writerows([f"2001-01-{i + 1:02}", *row] for i, row in enumerate(values.tolist()))
    return model, torch.from_numpy(values).float()


def forecast(folder, *options, name="in.csv") -> int:
    return main(["forecast", f"{folder / name}", "--checkpoint", f"{folder / 'ts.pth'}", *map(str, options)])


def test_a_forecast(tmp_path, series, capsys):
    model, values = series
    assert forecast(tmp_path, "--horizon", 3) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["step", "a", "b"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3"]
    got = torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]])
    torch.testing.assert_close(got, model.forecast(values)[:3], rtol=1e-4, atol=1e-4)
    assert forecast(tmp_path, "--out", tmp_path / "out.csv") == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 6


def test_a_series_without_dates_and_with_old_gaps(tmp_path, series, capsys):
    _, values = series
    lines = ["a,b", *(f"{a},{b}" for a, b in values.tolist())]
    lines[3] = f"{values[2, 0]},"  # a gap that is not looked back at
    (tmp_path / "plain.csv").write_text("\n".join(lines) + "\n\n")
    assert forecast(tmp_path, name="plain.csv") == 0
    plain = capsys.readouterr().out
    assert forecast(tmp_path) == 0
    assert capsys.readouterr().out == plain


def lines_of(series, separator=",", point=".", dates=True):
    """The lines of a series, as programs write them."""
    rows = [[f"2001-01-{i + 1:02}"] * dates + [f"{v:.9f}".replace(".", point) for v in row]
            for i, row in enumerate(series.tolist())]  # fmt: skip
    return [separator.join(row) for row in [["date"] * dates + ["a", "b"], *rows]]


@pytest.mark.parametrize("dates", [False, True])
@pytest.mark.parametrize(("separator", "point"), [(";", "."), (";", ","), ("\t", ".")])
def test_other_separators(tmp_path, series, separator, point, dates, capsys):
    assert forecast(tmp_path) == 0
    expected = list(csv.reader(capsys.readouterr().out.splitlines()))
    (tmp_path / "other.csv").write_text("\ufeff" + "\r\n".join(lines_of(series[1], separator, point, dates)) + "\r\n")
    assert forecast(tmp_path, name="other.csv") == 0
    found = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert found[0] == expected[0] == ["step", "a", "b"]
    values = [[[float(cell) for cell in row] for row in table[1:]] for table in (found, expected)]
    np.testing.assert_allclose(*values, atol=1e-3)


def test_a_gap_at_the_top_of_the_first_column_makes_it_no_column_of_dates(tmp_path, series, capsys):
    lines = lines_of(series[1], dates=False)
    lines[1] = lines[1].partition(",")[1] + lines[1].partition(",")[2]
    (tmp_path / "gap.csv").write_text("\n".join(lines))
    assert forecast(tmp_path, name="gap.csv") == 0
    found = capsys.readouterr().out
    assert forecast(tmp_path) == 0
    assert found == capsys.readouterr().out


def test_chosen_columns(tmp_path, series, capsys):
    """The series with dates that are numbers, as that of statsmodels has them, and with one of words."""
    lines = (tmp_path / "in.csv").read_text().splitlines()
    mixed = ["day,b,note,a"]
    for i, line in enumerate(lines[1:]):
        _, a, b = line.split(",")
        mixed.append(f"200101{i + 1:02},{b},calm,{a}")
    (tmp_path / "mixed.csv").write_text("\n".join(mixed))
    assert forecast(tmp_path) == 0
    expected = capsys.readouterr().out
    assert forecast(tmp_path, "--columns", "a, b", name="mixed.csv") == 0
    assert capsys.readouterr().out == expected
    for columns in ("a,c", ""):
        assert forecast(tmp_path, "--columns", columns, name="mixed.csv") == 2
        assert f"expected --columns of day, b, note, a; got {columns}" in capsys.readouterr().err


def test_names_that_are_numbers_behind_an_index(tmp_path, series, capsys):
    lines = (tmp_path / "in.csv").read_text().splitlines()
    (tmp_path / "pandas.csv").write_text("\n".join([",0,1", *lines[1:]]))
    assert forecast(tmp_path, name="pandas.csv") == 0
    assert capsys.readouterr().out.startswith("step,0,1\n")


def test_a_series_far_from_zero_and_one_near_to_it(tmp_path, capsys):
    """The model is float32, in which 10⁹ + 1 is 10⁹."""
    model = ForecastFFNet(1, 8, 5, 4, kernel_size=3, small_kernel=1).eval()
    torch.save(model.state_dict(), tmp_path / "ts.pth")
    wave = [round(math.sin(i), 6) for i in range(8)]
    near = model.double().forecast(torch.tensor(wave, dtype=torch.float64)[:, None])[:, 0]
    for shift in (0, 10**9):
        (tmp_path / "in.csv").write_text("a\n" + "".join(f"{shift + value!r}\n" for value in wave))
        assert forecast(tmp_path) == 0
        values = [row[1] for row in list(csv.reader(capsys.readouterr().out.splitlines()))[1:]]
        torch.testing.assert_close(torch.tensor([float(v) - shift for v in values]).double(), near, rtol=0, atol=1e-5)
    (tmp_path / "in.csv").write_text("a\n" + "".join(f"{1e39 * value!r}\n" for value in wave))
    assert forecast(tmp_path) == 2
    assert "expected finite values of torch.float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "decimals"),
    [([1, 3], 5), ([1e9, 1e9 + 2], 5), ([0, 1e-9], 14), ([0, 1e7], 0), ([5, 5], 6), ([0, 1e-30], 15)],
)
def test_as_many_decimals_as_the_range_of_a_series_asks_for(values, decimals):
    assert command_forecast.decimals_of(values) == decimals


def test_patches_that_do_not_overlap_by_half(tmp_path, capsys):
    """Weights do not tell: without --lookback another model would be made of them, of another look-back."""
    model = randomise(ForecastFFNet(2, 8, 5, 4, patch=4, stride=4, kernel_size=3, small_kernel=1)).eval()
    for form in (model, ffnet.reparameterize(model)):
        torch.save(form.state_dict(), tmp_path / "ts.pth")
        values = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        (tmp_path / "in.csv").write_text("\n".join(lines_of(values)))
        assert forecast(tmp_path, "--lookback", 8) == 0
        rows = list(csv.reader(capsys.readouterr().out.splitlines()))[1:]
        found = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
        torch.testing.assert_close(found, model.forecast(values), rtol=1e-3, atol=1e-4)
        assert forecast(tmp_path, "--lookback", 7) == 2
        assert "a look-back of 2 patches of 4 steps, 1 to 4 steps apart, got 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda lines: lines[:8], (), "expected 8 steps or more to look back at, got 7"),
        (lambda lines: lines[:1], (), "a line for each step, got 1 lines"),
        (lambda lines: [], (), "a line for each step, got 0 lines"),
        (lambda lines: [f"{line},7" for line in lines], (), "expected 2 variables, as .* has, got 3: a, b, 7"),
        (lambda lines: [line.rpartition(",")[0] for line in lines], (), "expected 2 variables, .* got 1: a"),
        (lambda lines: [line.partition(",")[0] for line in lines], (), "expected columns of numbers, got none"),
        (lambda lines: [*lines[:-1], "x,1,"], (), "step 20 of 20, column b: .* number, got none; fill gaps"),
        (lambda lines: [*lines[:-1], "x,nan,1"], (), "step 20 of 20, column a: .* number, got none"),
        (lambda lines: [*lines[:-2], "x,1,inf", lines[-1]], (), "step 19 of 20, column b: .* number, got inf"),
        (lambda lines: [*lines[:4], "x,1,2,3", *lines[5:]], (), "line 5: expected 3 columns, got 4"),
        (lambda lines: [*lines[:4], "x,1,two", *lines[5:]], (), "line 5, column b: expected a number, got 'two'"),
        (lambda lines: ["1,2,3", *lines[1:]], (), "a first line of names, got numbers"),
        (lambda lines: lines[1:], (), "a first line of names, got numbers"),
        (
            lambda lines: [*lines[:4], "5,1,2", *lines[5:]],
            (),
            "line 2, column date: expected a number, got '2001-01-01'",
        ),
        (lambda lines: [*lines[:4], "x,1;2", *lines[5:]], (), "line 5: expected 3 columns, got 2"),
        (lambda lines: lines, ("--lookback", 0), "expected --lookback of 1 or more, got 0"),
        (lambda lines: lines, ("--horizon", 6), "forecasts 5 steps, got --horizon 6"),
        (lambda lines: lines, ("--horizon", 0), "expected --horizon of 1 or more, got 0"),
    ],
)
def test_forecast_says_what_is_wrong(tmp_path, series, change, options, message, capsys):
    lines = (tmp_path / "in.csv").read_text().splitlines()
    (tmp_path / "in.csv").write_text("\n".join(change(lines)))
    assert forecast(tmp_path, *options, "--out", tmp_path / "out.csv") == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.startswith("ffnet forecast: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def test_files_that_cannot_be_read(tmp_path, series, capsys):
    (tmp_path / "bytes.csv").write_bytes(bytes(range(128, 256)))
    torch.save(FFNetSR(depth=1, dim=4).state_dict(), tmp_path / "other.pth")
    for name, checkpoint, message in (
        ("none.csv", "ts.pth", "No such file"),
        ("bytes.csv", "ts.pth", "bytes.csv"),
        ("in.csv", "none.pth", "no checkpoint file"),
        ("in.csv", "other.pth", "no weights of FFNet for time series"),
    ):
        assert main(["forecast", f"{tmp_path / name}", "--checkpoint", f"{tmp_path / checkpoint}"]) == 2
        assert message in capsys.readouterr().err


def test_values_of_a_series_keep_their_scale(tmp_path, series, capsys):
    assert forecast(tmp_path) == 0
    values = [float(row[1]) for row in list(csv.reader(capsys.readouterr().out.splitlines()))[1:]]
    assert all(math.isfinite(value) and -30 < value < 50 for value in values)
