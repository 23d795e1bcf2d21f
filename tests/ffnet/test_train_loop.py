"""Runs of `ffnet train` and `ffnet eval` in this process."""

import json
import re
import shutil
import sys

import pytest
import torch
from torch import nn
from train_testing import PLAIN, equal, make_images, options

from ffnet.__main__ import main
from ffnet.train import cli, loop
from ffnet.train.data import Batch
from ffnet.train.distributed import Ranks
from ffnet.train.loop import Trainer, train
from ffnet.train.progress import Progress, duration
from ffnet.train.sources import open_data

ALONE = Ranks(0, 1, torch.device("cpu"))
TRAIN = ("--model", "ffnet_tiny", "--batch", "6", "--epochs", "1", "--lr", "1e-3", "--workers", "0", *PLAIN)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


class Stop(Exception):
    """As if the process ended there."""


def stop_at(monkeypatch, step):
    run = Trainer._train_step

    def stopping(self, *args):
        if self.step == step:
            raise Stop
        return run(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", stopping)


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("--amp", "bf16", "--clip", "1", "--accumulate", "2", "--ema", "0")])
def test_goes_on_bit_for_bit(tmp_path, images, monkeypatch, capsys, more):
    """With mixing, erasing and drop path, whose random numbers must be the same ones."""
    mixing = "--mixup 0.5 --cutmix 0.5 --erasing 0.5 --drop-path 0.3 --checkpoint-every 3"
    given = (*mixing.split(), *more)
    outcome = train(options(images, tmp_path / "whole", *given), ALONE)
    assert outcome.steps == 8
    for step in (5, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stop):
                train(options(images, tmp_path / "parts", *given), ALONE)
    assert train(options(images, tmp_path / "parts", *given), ALONE) == outcome
    out = capsys.readouterr().out
    assert "goes on from step 4 of 8" in out  # the end of the first epoch
    assert "goes on from step 6 of 8" in out
    assert equal(tmp_path / "whole" / "last.pth", tmp_path / "parts" / "last.pth")
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]  # each step once, and two evaluations
    moments = []
    for name in ("whole", "parts"):
        trainer = Trainer(*build(images), options(images, tmp_path / name, *given), ALONE)
        trainer._resume()
        moments.append(trainer._tensors()["optimizer"])
    torch.testing.assert_close(moments[0]["state"], moments[1]["state"], rtol=0, atol=0)
    assert moments[0]["param_groups"] == moments[1]["param_groups"]


def build(images):
    data = open_data(str(images))
    return loop.build_model("ffnet_tiny", data.classes), data, data.classes


def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(tmp_path, images, capsys):
    given = options(images, tmp_path / "run")
    train(given, ALONE)
    shutil.copy(tmp_path / "run" / "last.pth", tmp_path / "last.pth")
    (tmp_path / "run" / "step-000000008" / "__0_0.distcp").write_bytes(b"")
    train(given, ALONE)
    captured = capsys.readouterr()
    assert "step-000000008 is damaged (__0_0.distcp: expected" in captured.err
    assert "goes on from step 4 of 8" in captured.out
    assert equal(tmp_path / "last.pth", tmp_path / "run" / "last.pth")


def test_another_runs_checkpoints(tmp_path, images):
    train(options(images, tmp_path / "run", "--epochs", "1"), ALONE)
    with pytest.raises(
        ValueError, match=r"of a run with epochs 1 \(now 2\), lr 0.001 \(now 0.01\), .*: give another --output"
    ):
        train(options(images, tmp_path / "run", "--lr", "1e-2"), ALONE)


class Plain(nn.Module):
    """Without batch normalisation, whose statistics are those of a pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(4 * 49, 3))
        self.config = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
        self.config["interpolation"] = "bilinear"

    def forward(self, x):
        return self.layers(x)


def test_accumulation_is_the_larger_batch(tmp_path, images):
    weights = []
    for accumulate in (1, 3):
        given = options(images, tmp_path / str(accumulate), "--accumulate", accumulate, "--ema", "0", "--clip", "0.5")
        model = Plain()
        before = [p.detach().clone() for p in model.parameters()]
        Trainer(model, open_data(str(images)), 3, given, ALONE).run()
        assert all((p - b).abs().max() > 1e-5 for p, b in zip(model.parameters(), before, strict=True))
        weights.append(list(model.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_learns_with_and_without_the_operators(tmp_path, images, capsys):
    losses = []
    for name in ("optimize", "no-optimize"):
        folder = tmp_path / name
        more = ("--no-optimize",) if name == "no-optimize" else ()
        train(options(images, folder, "--epochs", "6", "--eval-every", "6", *more), ALONE)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-3)
    assert sum(losses[0][-4:]) / 4 < 0.7 * losses[0][0]
    line = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"epoch 0.25  step 1/24  loss [\d.]+  lr [\d.e-]+  [\d.]+ images/s  ETA \d+:\d\d$", line)


def test_unreadable_images_are_named_and_counted(tmp_path, images, capsys):
    for number in range(2):
        (images / "train" / "ape" / f"{number:03}.png").write_bytes(b"no picture")
    (images / "val" / "bee" / "000.png").write_bytes(b"")
    train(options(images, tmp_path / "run", "--epochs", "1"), ALONE)
    out = capsys.readouterr().out
    assert out.count("skipped") == 3
    assert f"skipped {images}/train/ape/000.png: " in out
    assert "3 images could not be read and were left out" in out
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 3


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, images, monkeypatch, capsys):
    given = ("train", images, "--output", tmp_path / "run", *TRAIN, "--checkpoint-every", "1")
    poisoned = Trainer._train_step

    def poison(self, parts, watch):
        if self.step == 2:
            parts = [Batch(torch.full_like(parts[0].images, torch.nan), *parts[0][1:])]
        return poisoned(self, parts, watch)

    monkeypatch.setattr(Trainer, "_train_step", poison)
    assert main([str(word) for word in given]) == 2
    err = capsys.readouterr().err
    assert "the loss of step 2 is nan" in err
    saved = torch.load(tmp_path / "run" / "not-a-number-step-000000002-rank-0.pt", weights_only=True)
    assert saved["images"].isnan().all()
    assert len(saved["labels"]) == 6
    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    assert main([str(word) for word in given]) == 0
    assert "goes on from step 2 of 4" in capsys.readouterr().out


@pytest.mark.long
def test_fine_tuning_at_another_size_from_a_teacher(tmp_path, images, capsys):
    train(options(images, tmp_path / "first", "--epochs", "1"), ALONE)
    other = make_images(tmp_path / "other", classes=("ant", "bat", "cat", "dog"))
    given = ("--epochs", "1", "--checkpoint", tmp_path / "first", "--size", "48")
    train(options(other, tmp_path / "second", *given), ALONE)
    assert "the head starts anew" in capsys.readouterr().err
    content = torch.load(tmp_path / "second" / "last.pth", weights_only=True)
    assert content["recipe"] == {"model": "ffnet_tiny", "classes": 4, "size": 48, "step": 5}
    assert content["state_dict"]["head.weight"].shape == (4, 192)
    taught = ("--epochs", "1", "--teacher", "ffnet_tiny", "--teacher-checkpoint", tmp_path / "second")
    assert train(options(other, tmp_path / "third", *taught), ALONE).steps == 5


def test_evaluation(tmp_path, images, capsys):
    train(options(images, tmp_path / "run", "--epochs", "4", "--lr", "3e-3", "--ema", "0.5"), ALONE)
    (images / "val" / "ape" / "001.png").write_bytes(b"no picture")
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert (
        main(["eval", str(images), "--checkpoint", str(tmp_path / "run"), "--json", str(report), "--batch", "5"]) == 0
    )
    out = capsys.readouterr().out
    assert "1 of 24 images could not be read" in out
    found = json.loads(report.read_text())
    assert found["images"] == sum(map(sum, found["confusion"])) == 23
    assert found["classes"] == ["ape", "bee", "cow"]
    assert found["top1"] == pytest.approx(100 / 23 * sum(found["confusion"][i][i] for i in range(3)))
    assert found["top5"] == 100
    assert f"top-1 {found['top1']:.2f} %, top-5 100.00 %" in out
    # The same, image by image, in plain PyTorch.
    model, data = loop.build_model("ffnet_tiny", 3, checkpoint=str(tmp_path / "run")).eval(), open_data(str(images))
    transform = loop.eval_transform(model.config, 32)
    right = 0
    for index in range(24):
        if index != 1:
            with torch.inference_mode():
                right += int(model(transform(data.val.image(index))[None]).argmax()) == data.val.labels[index]
    assert found["top1"] == pytest.approx(100 * right / 23)


@pytest.fixture
def broken(tmp_path, images):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").touch()
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train {}/none", "no folder"),
        ("train {}/flat", "expected folders train and val"),
        ("train {}/images --batch 5000", "at most the 24 images"),
        ("train {}/images --batch 7 --accumulate 2", "multiple of ranks × --accumulate = 1 × 2, got 7"),
        ("train {}/images --model ffnet_9", "got 'ffnet_9'"),
        ("train {}/images --classes 2", "the data has 3 classes, the head only 2"),
        ("train {}/images --checkpoint {}/other.pth", "does not fit FFNet"),
        ("train {}/images --checkpoint {}/none.pth", "no checkpoint file"),
        ("train {}/images --device tpu", "--device cpu, cuda or auto, got 'tpu'"),
        ("train {}/images --output {}/file", "file"),
        ("train {}/images --amp none --ema 2", "--ema in [0, 1], got 2.0"),
        ("eval {}/images --checkpoint {}/other.pth", "does not say its model"),
        ("eval {}/images --checkpoint {}/none.pth --model ffnet_tiny", "no checkpoint file"),
        ("eval {}/images --checkpoint {}/none.pth --model ffnet_tiny --classes 2", "has class 2, the head only 0 to 1"),
        ("eval {}/flat --checkpoint {}/other.pth --model ffnet_tiny", "expected a folder for each class"),
    ],
)
def test_one_line_for_what_the_user_can_put_right(line, message, broken, capsys):
    command, data, *rest = line.replace("{}", str(broken)).split()
    more = [*TRAIN, "--output", str(broken / "run")] if command == "train" else []
    assert main([command, data, *more, *rest]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"ffnet {command}: ")


@pytest.mark.parametrize(
    ("option", "package"),
    [("--tensorboard", "tensorboard"), ("--rand-augment 9", "torchvision"), ("--teacher timm/resnet18", "timm")],
)
def test_packages_that_are_missing(option, package, tmp_path, images, monkeypatch, capsys):
    for name in ("tensorboard", "torch.utils.tensorboard", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("ffnet.train.augment.has_torchvision", lambda: False)
    assert main(["train", str(images), "--output", str(tmp_path / "run"), *TRAIN, *option.split()]) == 2
    err = capsys.readouterr().err
    assert package in err
    assert err.count("\n") == 1


def test_out_of_memory(monkeypatch, capsys):
    def full(arguments):
        torch.empty(1 << 60)

    monkeypatch.setitem(cli._COMMANDS, "train", full)
    assert main(["train", "x"]) == 2
    assert "Take a larger --accumulate" in capsys.readouterr().err


def test_tensorboard(tmp_path, images):
    pytest.importorskip("tensorboard")
    train(options(images, tmp_path / "run", "--epochs", "1", "--tensorboard"), ALONE)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_progress_on_a_terminal_is_one_line(tmp_path):
    class Terminal(list):
        write, flush = list.append, lambda self: None

        def isatty(self):
            return True

    screen = Terminal()
    progress = Progress(tmp_path, 10, 0, active=True, stream=screen)
    for step in (1, 2):
        progress.show(step, step / 5, 1.0, 0.1, 8)
    progress.say("saved")
    progress.close()
    text = "".join(screen)
    assert text.count("\n") == 2
    assert text.count("\r\033[K") == 2
    assert text.endswith("\nsaved\n")
    silent = Progress(tmp_path / "none", 10, 0, active=False, stream=Terminal())
    silent.show(1, 0.2, 1.0, 0.1, 8)
    silent.say("nothing")
    assert not silent.stream


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "0:42"), (725, "12:05"), (11220, "3:07:00"), (183600, "2d 03:00"), (59.7, "1:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.long
def test_digits_are_learnt(tmp_path):
    """The example of docs/training.md, as it stands there."""
    pytest.importorskip("sklearn")
    assert main(["train", "digits", "--output", str(tmp_path / "run"), "--eval-every", "20"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["top1"] >= 98
