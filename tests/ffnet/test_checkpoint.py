import argparse
import importlib.util
import pickle

import pytest
import torch
from ffnet_testing import randomise, small_ffnet
from torch.nn import DataParallel

import ffnet


@pytest.fixture
def source():
    return randomise(small_ffnet())


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("container", [None, "state_dict", "state_dict_ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers_and_prefix(tmp_path, source, container, prefix):
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = tmp_path / "checkpoint.pth"
    torch.save(state if container is None else {container: state, "epoch": 3}, path)
    model = small_ffnet()
    report = ffnet.load_checkpoint(model, path)
    assert same(model, source.state_dict())
    assert report == ([], [], [])


def test_averaged_weights_are_preferred_and_arguments_tolerated(tmp_path, source):
    path = tmp_path / "checkpoint.pth"
    content = {
        "state_dict": small_ffnet().state_dict(),
        "state_dict_ema": DataParallel(source).state_dict(),
        "args": argparse.Namespace(lr=1e-3, opt="adamw"),
    }
    torch.save(content, path)
    model = small_ffnet()
    ffnet.load_checkpoint(model, str(path))
    assert same(model, source.state_dict())


def test_dtype_of_the_model_is_kept(tmp_path, source):
    torch.save(source.half().state_dict(), tmp_path / "half.pth")
    model = small_ffnet()
    ffnet.load_checkpoint(model, tmp_path / "half.pth")
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source.head.weight.float())


def test_reparameterised_checkpoints_load_into_reparameterised_models(tmp_path, source):
    fused = ffnet.reparameterize(source)
    torch.save(fused.state_dict(), tmp_path / "fused.pth")
    model = ffnet.reparameterize(small_ffnet())
    ffnet.load_checkpoint(model, tmp_path / "fused.pth")
    assert same(model, fused.state_dict())


def test_create_model_loads(tmp_path):
    options = {"dims": (8, 16, 32, 64), "num_classes": 3}
    source = randomise(ffnet.create_model("ffnet_1", **options))
    torch.save(source.state_dict(), tmp_path / "checkpoint.pth")
    model = ffnet.create_model("ffnet_1", checkpoint=tmp_path / "checkpoint.pth", **options)
    assert same(model, source.state_dict())


def test_differences_are_named_and_the_model_left_alone(tmp_path, source):
    state = source.state_dict()
    del state["norm.weight"]
    state["foreign.key"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(11)
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    model = small_ffnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ffnet.load_checkpoint(model, path)
    message = str(caught.value)
    assert str(path) in message
    assert "1 missing: norm.weight; 1 unexpected: foreign.key; 1 mismatched: head.bias" in message
    assert "head.bias: expected [10], got [11]" in message
    assert same(model, before)

    report = ffnet.load_checkpoint(model, path, strict=False)
    assert report == (["norm.weight"], ["foreign.key"], ["head.bias"])
    assert torch.equal(model.head.weight, source.head.weight)
    assert torch.equal(model.head.bias, before["head.bias"])


def test_long_lists_are_shortened(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for strict in (True, False):  # a checkpoint of which nothing fits is refused either way
        with pytest.raises(ValueError, match=r"missing: .* and \d+ more; 1 unexpected: a") as caught:
            ffnet.load_checkpoint(small_ffnet(), tmp_path / "other.pth", strict=strict)
        assert len(str(caught.value)) < 1000


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        ffnet.load_checkpoint(small_ffnet(), tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        ffnet.load_checkpoint(small_ffnet(), tmp_path)


class Payload:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps(Payload(), 2), pickle.dumps({"a": 1}, 2)[:-3]]
)
def test_garbage_file(tmp_path, content, capsys):
    path = tmp_path / "garbage.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"garbage\.pth is not a readable checkpoint"):
        ffnet.load_checkpoint(small_ffnet(), path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {"a": 1}}, {1: torch.zeros(1)}])
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no state dict"):
        ffnet.load_checkpoint(small_ffnet(), tmp_path / "other.pth")


def test_safetensors(tmp_path, source):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"garbage")
    if importlib.util.find_spec("safetensors") is None:
        with pytest.raises(ImportError, match="needs the safetensors package"):
            ffnet.load_checkpoint(small_ffnet(), path)
        return
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="not a readable checkpoint"):
        ffnet.load_checkpoint(small_ffnet(), path)
    save_file(source.state_dict(), path)
    model = small_ffnet()
    ffnet.load_checkpoint(model, path)
    assert same(model, source.state_dict())


def test_keys_under_a_prefix(tmp_path, source):
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "neck.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    model = small_ffnet()
    assert ffnet.load_checkpoint(model, tmp_path / "detector.pth", prefix="backbone.") == ([], [], [])
    assert same(model, source.state_dict())
    with pytest.raises(ValueError, match="missing"):
        ffnet.load_checkpoint(model, tmp_path / "detector.pth", prefix="body.")


def test_a_classifiers_checkpoint_starts_a_backbone(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "classifier.pth")
    options = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "stem_width": 8}
    backbone = ffnet.create_model("ffnet_2_features", **options)
    report = ffnet.load_checkpoint(backbone, tmp_path / "classifier.pth", strict=False)
    assert {key.split(".")[0] for key in report.missing} == {f"norm{i}" for i in range(4)}
    assert {key.split(".")[0] for key in report.unexpected} == {"norm", "head"}
    state = source.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items() if "norm" not in key)
