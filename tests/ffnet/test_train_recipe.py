"""Options, optimizer, learning rate, loss, averages and models of a training run."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import small_ffnet

import ffnet
from ffnet.train.models import build_model, build_teacher, checkpoint_file
from ffnet.train.options import parse_train
from ffnet.train.recipe import Loss, averaged, build_optimizer, learning_rate
from ffnet_kernels import optimize, report


def test_defaults_are_the_papers():
    options = parse_train(["DATA"])
    assert (options.model, options.epochs, options.batch, options.lr) == ("ffnet_1", 300, 1024, 1e-3)
    assert (options.weight_decay, options.warmup, options.ema, options.label_smoothing) == (0.05, 5, 0.9995, 0.1)
    assert (options.rand_augment, options.cutmix, options.erasing, options.mixup) == (9, 1.0, 0.25, 0.2)
    assert parse_train(["DATA", "--model", "ffnet_3"]).mixup == 0.8
    assert parse_train(["DATA", "--batch", "256"]).lr == 1e-3 / 4
    assert parse_train(["digits"]).model == "ffnet_tiny"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--batch 0", "--batch >= 1, got 0"),
        ("--ema 1.5", r"--ema in \[0, 1\], got 1.5"),
        ("--crop 0", r"--crop in \(0, 1\], got 0.0"),
        ("--label-smoothing -1", "--label-smoothing"),
        ("--teacher-checkpoint x", "needs --teacher"),
        ("--fsdp --amp fp16", "--amp bf16"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=message):
        parse_train(["DATA", *given.split()])


def test_what_a_run_must_keep():
    recipe = parse_train(["DATA"]).recipe()
    assert {"model", "lr", "batch", "seed", "amp", "epochs"} <= set(recipe)
    assert not {"data", "workers", "fsdp", "accumulate", "keep", "output"} & set(recipe)


def test_learning_rate():
    options = parse_train(["DATA", "--epochs", "10", "--warmup", "2", "--lr", "0.1", "--min-lr", "0.001"])
    rates = [learning_rate(options, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * n / 11 for n in range(1, 11)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[30] == pytest.approx((0.1 + 0.001) / 2)  # half way down
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert 0.001 < rates[-1] < 0.0013
    assert learning_rate(options, 50, 5) == pytest.approx(0.001)
    assert learning_rate(parse_train(["DATA", "--warmup", "0", "--lr", "0.1"]), 0, 5) == 0.1


def test_norms_biases_and_scales_do_not_decay():
    model = small_ffnet(layer_scale_init=1e-6)
    decayed, plain = build_optimizer(model, parse_train(["DATA"])).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = {kind: [names[id(p)] for p in group["params"]] for kind, group in (("decayed", decayed), ("plain", plain))}
    assert sorted(of["decayed"] + of["plain"]) == sorted(names.values())
    assert all(name.endswith((".c.weight", ".weight")) and ".bn." not in name for name in of["decayed"])
    assert {"head.weight", "patch_embed.0.c.weight"} <= set(of["decayed"])
    assert {"head.bias", "norm.weight", "stages.0.0.channel_mixer.layer_scale"} <= set(of["plain"])


def test_averages():
    model = torch.nn.BatchNorm1d(2)
    ema = averaged(model, 0.9)
    expected, values = None, [0.0, 1.0, 5.0, -2.0] * 10
    for update, value in enumerate(values):
        model.weight.data.fill_(value)
        model.running_mean.fill_(2 * value)
        model.num_batches_tracked += 1
        ema.update_parameters(model)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert ema.module.weight[0].item() == pytest.approx(expected, rel=1e-5)
    assert ema.module.running_mean[0].item() == pytest.approx(2 * expected, rel=1e-5)
    assert ema.module.num_batches_tracked == len(values)


def test_losses():
    logits, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 5])
    torch.testing.assert_close(
        Loss(0.1, None, 0.5)(logits, targets), F.cross_entropy(logits, targets, label_smoothing=0.1)
    )
    soft = torch.full((4, 6), 1 / 6)
    assert Loss(0, None, 0.5)(logits, soft).item() == pytest.approx(-logits.log_softmax(1).mean().item(), rel=1e-5)
    teacher = torch.nn.Linear(3, 6)
    loss = Loss(0, teacher, 0.25)
    x = torch.randn(4, 3)
    choices = loss.choices(x)
    assert torch.equal(choices, teacher(x).argmax(1))
    expected = 0.75 * F.cross_entropy(logits, targets) + 0.25 * F.cross_entropy(logits, choices)
    torch.testing.assert_close(loss(logits, targets, choices), expected)
    assert loss(logits.bfloat16(), targets, choices).dtype == torch.float32


def test_models(tmp_path):
    model = build_model("ffnet_tiny", 7, drop_path=0.2)
    assert model.head.out_features == 7
    with pytest.raises(ValueError, match=r"ffnet_1, .*ffnet_tiny, got 'resnet'"):
        build_model("resnet", 7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth")
    again = build_model("ffnet_tiny", 7, checkpoint=str(tmp_path))  # the folder of a run
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_a_head_of_other_classes_starts_anew(tmp_path, capsys):
    model = build_model("ffnet_tiny", 7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    other = build_model("ffnet_tiny", 9, checkpoint=str(tmp_path / "seven.pth"))
    assert "the head starts anew: 2 mismatched: head.weight, head.bias" in capsys.readouterr().err
    assert torch.equal(
        other.stages[3][1].channel_mixer.main.fc1.weight, model.stages[3][1].channel_mixer.main.fc1.weight
    )


def test_a_checkpoint_of_another_model(tmp_path):
    torch.save(small_ffnet().state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"not a checkpoint of this model"):
        build_model("ffnet_tiny", 10, checkpoint=str(tmp_path / "small.pth"))
    with pytest.raises(FileNotFoundError, match=r"no best\.pth or last.pth"):
        checkpoint_file(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        build_model("ffnet_tiny", 10, checkpoint=str(tmp_path / "none.pth"))


def test_teachers(tmp_path):
    model = build_model("ffnet_tiny", 7)
    torch.save({"state_dict": model.state_dict(), "recipe": {"classes": 7}}, tmp_path / "best.pth")
    teacher = build_teacher("ffnet_tiny", 7, str(tmp_path))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="a teacher of 9 classes, as the data has, got ffnet_tiny of 7"):
        build_teacher("ffnet_tiny", 9, str(tmp_path))
    with pytest.raises(ValueError, match="--teacher-checkpoint for ffnet_1"):
        build_teacher("ffnet_1", 9, None)


def test_a_teacher_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_resnet", num_classes=1000).state_dict(), tmp_path / "teacher.pth")
    teacher = build_teacher("timm/test_resnet", 1000, str(tmp_path / "teacher.pth"))
    assert teacher(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_the_small_preset_runs_on_the_operators():
    """Its last maps are of one pixel."""
    model = optimize(build_model("ffnet_tiny", 10).eval())
    x = torch.randn(3, 3, 32, 32)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        expected = ffnet.reparameterize(model)(x)
        for _ in range(2):
            out = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert "channel_mixer" in {row.runs_on for row in report(model).rows}
    assert math.isfinite(out.sum())
