"""Models as folders and as repositories of the Hub, which a stand-in plays: nothing here asks the network."""

import json
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ffnet_testing import randomise

import ffnet

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "num_classes": 5}


def model_of(name: str = "ffnet_1", **kwargs):
    torch.manual_seed(0)
    model = ffnet.create_model(name, **{**SMALL, **kwargs})
    randomise(model)
    return model.eval()


def assert_same(found, expected):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))
    assert not found.training


@pytest.fixture(params=[True, False], ids=["safetensors", "pth"])
def weights(request, monkeypatch):
    """The name of the file of weights."""
    if request.param:
        pytest.importorskip("safetensors")
    monkeypatch.setattr("ffnet.pretrained._has_safetensors", lambda: request.param)
    return "model.safetensors" if request.param else "model.pth"


@pytest.mark.parametrize("folded", [False, True])
def test_there_and_back(folded, weights, tmp_path):
    model = model_of()
    if folded:
        model = ffnet.reparameterize(model)
    ffnet.save_pretrained(model, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(["config.json", weights])
    assert_same(ffnet.from_pretrained(tmp_path / "model"), model)


def test_a_new_head(tmp_path):
    model = model_of()
    model.reset_classifier(9)
    model.eval()
    ffnet.save_pretrained(model, tmp_path)
    assert_same(ffnet.from_pretrained(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["num_classes"] == 9


def test_other_tasks(tmp_path):
    made = ffnet.create_model("ffnet_1_features", depths=SMALL["depths"], dims=SMALL["dims"]).eval()
    ffnet.save_pretrained(made, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, ffnet.from_pretrained(tmp_path)(x), made(x)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "expected a model of ffnet.create_model, got Linear"),
        (lambda: ffnet.FFNet(**SMALL), "expected a model of ffnet.create_model, got FFNet"),
        (lambda: changed(model_of()), "its parameters are not those of ffnet_1"),
    ],
)
def test_what_is_no_model_of_ours_is_not_saved(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ffnet.save_pretrained(model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def changed(model):
    model.head = torch.nn.Linear(64, 7)
    return model


def test_broken_folders(tmp_path):
    with pytest.raises(ValueError, match=r"expected a config\.json as ffnet\.save_pretrained writes it"):
        ffnet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a config\.json"):
        ffnet.from_pretrained(tmp_path)
    ffnet.save_pretrained(model_of(), tmp_path)
    for path in tmp_path.glob("model.*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"expected model\.safetensors or model\.pth"):
        ffnet.from_pretrained(tmp_path)
    (tmp_path / "model.pth").write_text("no weights")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        ffnet.from_pretrained(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub, with repositories that are folders."""
    root = tmp_path / "hub"

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"{repo_id}: {commit_message}")

    module = ModuleType("huggingface_hub")
    module.HfApi = HfApi
    module.snapshot_download = lambda repo_id, revision=None, allow_patterns=None: root / repo_id
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_to_the_hub_and_back(hub):
    model = model_of()
    assert ffnet.push_to_hub(model, "user/name") == "user/name: Upload FFNet"
    assert_same(ffnet.from_pretrained("user/name"), model)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="needs huggingface_hub"):
        ffnet.push_to_hub(model_of(), "user/name")
    with pytest.raises(FileNotFoundError, match=r"no folder user/name; .*huggingface_hub is needed"):
        ffnet.from_pretrained("user/name")


def test_importing_ffnet_imports_neither(root):
    code = "import ffnet, sys; assert not {'huggingface_hub', 'safetensors', 'kernels'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
