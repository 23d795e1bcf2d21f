"""The layers of hub/ in the Hub's kernel format: pure ones, which take the place of a model's own forward."""

import importlib.util
import json
import subprocess
import sys
from types import MethodType

import parity
import pytest
import torch
from torch import nn

import ffnet_kernels as fk


@pytest.fixture(scope="module")
def repository(root, tmp_path_factory):
    if sys.version_info < (3, 11):
        pytest.skip("tools/hub_kernel.py reads TOML by Python's own library, from 3.11 on")
    out = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, root / "tools" / "hub_kernel.py", out], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def layers(repository):
    path = repository / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location("hub_kernel_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.layers
    del sys.modules[spec.name]


def kernelized(module: nn.Module, layer: type[nn.Module]) -> nn.Module:
    """As kernels.kernelize does it."""
    module.forward = MethodType(layer.forward, module)
    return module


def test_layers_are_pure(layers):
    for name in layers.__all__:
        layer = getattr(layers, name)
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) == {"has_backward", "can_torch_compile"}
        assert layer.has_backward
        assert layer.can_torch_compile


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8),
        lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8, bias=False),
        lambda: nn.Conv2d(8, 5, 3, padding=1),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
    ],
)
def test_a_convolution(conv, layers):
    torch.manual_seed(0)
    plain = conv()
    ours = kernelized(conv(), layers.Conv2d)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 9, 10)
    results = []
    for module in (plain, ours):
        given = x.clone().requires_grad_()
        out = module(given)
        out.square().sum().backward()
        results.append((out, given.grad, module.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x[0]), plain(x[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="channels"):
        ours(torch.randn(2, 7, 9, 10))


@pytest.mark.parametrize(
    ("name", "make"), [("FFNifiedAttention", fk.FFNifiedAttention), ("ChannelMixer", fk.ChannelMixer)]
)
def test_a_mixer(name, make, layers):
    torch.manual_seed(0)
    module = make(8, 5, layer_scale=0.5)
    x = torch.randn(2, 8, 9, 10)
    expected = module(x, x)
    assert torch.equal(kernelized(module, getattr(layers, name))(x, x), expected)


def test_metadata(repository):
    variants = sorted(path.name for path in (repository / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        metadata = json.loads((repository / "build" / variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": variant.removeprefix("torch-")}
        assert metadata["name"] == "ffnet-kernels-layers"


WITHOUT_A_PACKAGE = """
import importlib.util, sys, torch
path = sys.argv[1] + "/__init__.py"
spec = importlib.util.spec_from_file_location("a_kernel", path)
module = importlib.util.module_from_spec(spec)
sys.modules["a_kernel"] = module
spec.loader.exec_module(module)
import ffnet_kernels
assert ffnet_kernels.__file__.startswith(sys.argv[1]), ffnet_kernels.__file__
assert "cpu" in ffnet_kernels.available_backends()
"""


@parity.needs_native
def test_it_brings_the_package_along(repository, tmp_path):
    """Where none is installed: of the path only the standard library and torch are left."""
    hide = "import sys; sys.path[:] = [p for p in sys.path if p]; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"  # noqa: E501
    subprocess.run(
        [sys.executable, "-c", hide + WITHOUT_A_PACKAGE, str(repository / "build" / "torch-cpu")],
        check=True, cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.long
def test_kernelize(repository):
    """By the kernels package itself."""
    kernels = pytest.importorskip("kernels")
    from kernels._rust import Build

    assert [str(backend).lower() for backend in Build.open(repository).general.backends] == ["cpu", "cuda"]
    ffnet = pytest.importorskip("ffnet")
    torch.manual_seed(0)
    model = ffnet.create_model("ffnet_1", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)

    class Conv2d(nn.Conv2d):
        pass

    kernels.replace_kernel_forward_from_hub(Conv2d, "Conv2d")
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
    mapping = {"Conv2d": {"cpu": kernels.LocalLayerRepository(repository, layer_name="Conv2d")}}
    with kernels.use_kernel_mapping(mapping):
        for mode in (kernels.Mode.INFERENCE, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
            kernelized = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
            assert any("forward" in vars(module) for module in model.modules())
            torch.testing.assert_close(kernelized(x), expected, rtol=1e-4, atol=1e-5)
