"""The examples, shortened: they write what they say, and learn. What the whole ones reach is in docs/signals.md."""

import json

import pytest
import torch

from ffnet.__main__ import main as command

pytestmark = pytest.mark.usefixtures("one_thread")


def written(folder) -> dict:
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "result.json").read_text())


@pytest.mark.long
def test_super_resolution(tmp_path, capsys):
    """Better than the nearest neighbour, which an untrained network is near to, on every photograph held out."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from ffnet.examples import super_resolution

    result = super_resolution.main(["--steps", "150", "--depth", "3", "--dim", "24", "--out", str(tmp_path)])
    assert written(tmp_path)["psnr"] == result["psnr"]
    assert not set(result["psnr"]) & set(result["trained_on"])
    assert all(score["FFNet-SR"] > score["nearest"] + 0.2 for score in result["psnr"].values())

    capsys.readouterr()
    small, checkpoint, out = tmp_path / "small.png", tmp_path / "model.pth", tmp_path / "out.png"
    _, held_out = super_resolution.photographs()
    name = list(held_out)[-1]
    assert command(["upscale", str(small), "--scale", "2", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    from ffnet.preprocess import load_image

    truth = super_resolution.tensor(super_resolution.pair(held_out[name], 2)[1])
    score = super_resolution.psnr(super_resolution.tensor(load_image(out)), truth, 2)
    assert score == pytest.approx(result["psnr"][name]["FFNet-SR"], abs=0.02)


@pytest.mark.long
def test_forecasting(tmp_path, capsys):
    """Better than both naive forecasts after a few epochs."""
    pytest.importorskip("statsmodels")
    pytest.importorskip("matplotlib")
    from ffnet.examples import forecasting

    result = forecasting.main(["--epochs", "4", "--dim", "16", "--out", str(tmp_path)])
    assert written(tmp_path) == result
    capsys.readouterr()
    assert command(["forecast", str(tmp_path / "series.csv"), "--checkpoint", str(tmp_path / "model.pth")]) == 0
    assert [line[:4] for line in capsys.readouterr().out.splitlines()[:2]] == ["step", "1,37"]  # what follows 371.5
    for metric in ("mse", "mae"):
        ours = result["errors"]["FFNet"][metric]
        assert all(ours < result["errors"][name][metric] for name in ("last value", "seasonal naive"))

    series = forecasting.weekly_co2()
    (tmp_path / "co2.csv").write_text("co2\n" + "".join(f"{value}\n" for value in series[:-52, 0].tolist()))
    capsys.readouterr()
    argv = ["forecast", str(tmp_path / "co2.csv"), "--checkpoint", str(tmp_path / "model.pth")]
    assert command(argv) == 0
    values = [float(line.split(",")[1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert (torch.tensor(values) - series[-52:, 0]).abs().mean() < 2


def test_psnr_of_luma():
    from ffnet.examples.super_resolution import luma, psnr

    black, white = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    torch.testing.assert_close(luma(black) * 255, torch.full((8, 8), 16.0))
    torch.testing.assert_close(luma(white) * 255, torch.full((8, 8), 235.0), rtol=1e-3, atol=0)
    assert psnr(white, black, 2) == pytest.approx(-20 * torch.log10(torch.tensor(219 / 255)).item(), abs=1e-3)
    spoilt = black.clone()
    spoilt[:, 0] = 1.0  # in the border that does not count
    assert psnr(spoilt, black, 2) == float("inf")
    assert psnr(spoilt, black, 1) == float("inf")


def test_windows_do_not_see_what_they_are_tested_on():
    from ffnet.examples import forecasting

    series = torch.arange(400.0)[:, None]
    past, future = forecasting.windows(series, 200, 300)
    assert future[0, 0] == 200
    assert future[-1, -1] == 299
    assert torch.equal(past[:, -1] + 1, future[:, 0])
    simple = forecasting.simple_forecasts(past)
    assert torch.equal(simple["seasonal naive"] + 52, future)
    assert torch.equal(simple["seasonal naive + drift"], future)
    assert torch.equal(simple["last value"][:, 0] + 1, future[:, 0])


@pytest.mark.long
def test_loss_against_time(tmp_path):
    """All contenders learn, and the same: the loss after as many steps does not tell who runs them."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from ffnet.examples import loss_against_time

    result = loss_against_time.main(["--epochs", "2", "--out", str(tmp_path)])
    assert written(tmp_path) == result
    assert result["steps"] == 2 * (1437 // 64)
    ours, *others = result["runs"].values()
    assert len(others) == 2
    assert ours["loss"] < 0.5
    assert ours["held out"] > 0.5  # where guesses are right in one of ten
    for other in others:
        assert other["loss"] == pytest.approx(ours["loss"], rel=0.02)
