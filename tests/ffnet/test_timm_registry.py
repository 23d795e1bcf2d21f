import importlib.util
import sys

import pytest
import torch

import ffnet
from ffnet import timm_registry

FAKE_TIMM = """
import sys
from types import ModuleType

entrypoints = {}

def register_model(fn):
    # As timm does: the function's module is looked up and must be able to list it.
    module = sys.modules[fn.__module__]
    module.__all__.append(fn.__name__)
    assert hasattr(module, fn.__name__)
    entrypoints[fn.__name__] = fn
    return fn

def create_model(name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    return entrypoints[name](
        pretrained=pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **kwargs,
    )

models = sys.modules[__name__ + ".models"] = ModuleType(__name__ + ".models")
models.register_model = register_model
"""


@pytest.fixture
def timm_to_import(tmp_path, monkeypatch):
    """A stand-in for timm that can be imported but has not been."""
    (tmp_path / "timm.py").write_text(FAKE_TIMM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, timm_registry.TimmHook)])
    monkeypatch.setattr(ffnet, "__all__", list(ffnet.__all__))
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
    sys.modules.update(saved)


def check(timm):
    model = timm.create_model("ffnet_1", num_classes=5, dims=(8, 16, 32, 64), drop_rate=0.0, global_pool=None)
    assert isinstance(model, ffnet.FFNet)
    assert model.head.out_features == 5
    assert model.default_cfg["crop_pct"] == 0.9
    assert set(timm.entrypoints) == set(ffnet.list_models("classification"))


def test_timm_first(timm_to_import):
    import timm

    timm_registry.register_when_imported()
    check(timm)
    assert not any(isinstance(finder, timm_registry.TimmHook) for finder in sys.meta_path)


def test_ffnet_first(timm_to_import):
    timm_registry.register_when_imported()
    assert "timm" not in sys.modules
    # Asking whether timm is there, as some libraries do, must not use the hook up.
    assert importlib.util.find_spec("timm") is not None
    import timm

    check(timm)
    assert not any(isinstance(finder, timm_registry.TimmHook) for finder in sys.meta_path)


def test_explicitly_and_twice(timm_to_import):
    ffnet.register_timm()
    ffnet.register_timm()
    import timm

    check(timm)


def test_pretrained_is_refused_and_unknown_arguments_too(timm_to_import):
    import timm

    ffnet.register_timm()
    with pytest.raises(RuntimeError, match=r"ffnet\.load_checkpoint"):
        timm.create_model("ffnet_2", pretrained=True)
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("ffnet_2", window_size=7, device="meta")
    overlay = {"crop_pct": 1.0}
    assert timm.create_model("ffnet_2", device="meta", pretrained_cfg_overlay=overlay).default_cfg["crop_pct"] == 1.0


def test_without_timm(timm_to_import, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    timm_registry.register_when_imported()
    with pytest.raises(ModuleNotFoundError, match="timm"):
        import timm  # noqa: F401


def test_the_registered_model_runs(timm_to_import):
    ffnet.register_timm()
    import timm

    model = timm.create_model("ffnet_1", dims=(8, 16, 32, 64), in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1000)
