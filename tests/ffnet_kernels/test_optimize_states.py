"""What users do to a model before or after `optimize` counts: the result is that of the plain model, or its error."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import ffnet
import ffnet_kernels as fk

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def depthwise(**options) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **{"padding": 1, "groups": 8, **options})


class Alone(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "alone": lambda **options: Alone(depthwise(**options)),
    "in a row": lambda **options: nn.Sequential(depthwise(**options), nn.ReLU(), depthwise(**options)),
}
every_model = pytest.mark.parametrize("model", MODELS)
every_mode = pytest.mark.parametrize("training", [False, True])


def outcome(model: nn.Module, x: torch.Tensor):
    try:
        return model(x)
    except Exception as error:
        return error


def assert_same(plain: nn.Module, optimized: nn.Module, x: torch.Tensor) -> None:
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            expected, got = outcome(plain, x), outcome(optimized, x)
        if isinstance(expected, Exception):
            assert type(got) is type(expected), got
        else:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@every_model
@every_mode
@pytest.mark.parametrize("channels", [4, 16])
def test_other_channels_are_refused_as_plain_pytorch_does(model, training, channels):
    plain = MODELS[model]().train(training)
    x = torch.randn(2, channels, 9, 9)
    assert isinstance(outcome(plain, x), RuntimeError)
    assert_same(plain, fk.optimize(plain), x)


def test_channels_between_layers_are_looked_at():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), depthwise()).eval()
    assert_same(plain, fk.optimize(plain), torch.randn(1, 3, 9, 9))


CHANGES = [
    {"stride": (2, 2)},
    {"stride": 2},
    {"stride": (3, 3)},
    {"stride": (np.int64(2), np.int64(2))},
    {"padding": 0},
    {"padding": (2, 0)},
    {"padding": "valid"},
    {"dilation": (2, 2)},
    {"dilation": 1},
    {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
    {"groups": 4},
    {"groups": 1},
    {"_conv_forward": lambda x, weight, bias: 3 * x},
]


def named(change: dict) -> str:
    return ", ".join(name if callable(value) else f"{name}={value}" for name, value in change.items())


@every_model
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_a_convolution_that_is_changed_later(model, change):
    plain = MODELS[model]().eval()
    optimized = fk.optimize(plain)
    assert_same(plain, optimized, X)  # so that what it has collected is of before
    for conv in (*convolutions(plain), *convolutions(optimized)):
        vars(conv).update(change)
    assert_same(plain, optimized, X)


@pytest.mark.parametrize("number", [2, np.int64(2)])
def test_integers_of_numpy(number):
    plain = Alone(depthwise(stride=number)).eval()
    assert_same(plain, fk.optimize(plain), X)


def test_complex_maps():
    plain = Alone(depthwise(dtype=torch.complex64)).eval()
    assert_same(plain, fk.optimize(plain), X.to(torch.complex64))


def test_lazy_layers():
    optimized = fk.optimize(nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()).eval())
    assert optimized(X).shape == (2, 8, 7, 7)


# ---- FFNet ----


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = ffnet.create_model("ffnet_1", num_classes=5, dims=(8, 16, 32, 64), stem_width=8).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0 if parameter.dim() > 1 else 1, 0.3 if parameter.dim() > 1 else 0.2)
    return model


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """Hands on what it is asked for, as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("wrap", [Twice, lambda model: nn.Sequential(Twice(model), nn.Softmax(1))])
def test_a_wrapper_that_hands_on_attributes_stays(network, wrap):
    plain = wrap(network)
    assert_same(plain, fk.optimize(plain), IMAGE)


def leaves(model: nn.Module) -> list[str]:
    """One of each kind of block, by path."""
    blocks = ("patch_embed", "stages.0.0", "stages.1.0", "norm", "head")
    return [n for n, m in model.named_modules() if n.startswith(blocks) and not list(m.children())]


@pytest.mark.parametrize("place", ["forward", "forward_pre", "patch"])
def test_a_hook_on_any_layer_counts(network, place):
    for path in leaves(network):
        plain = copy.deepcopy(network)
        layer = plain.get_submodule(path)
        if place == "forward":
            layer.register_forward_hook(lambda module, inputs, out: out + 0.5)
        elif place == "forward_pre":
            layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))
        else:
            layer.forward = lambda x, forward=layer.forward: forward(x) + 0.5
        with torch.no_grad():
            expected, got = plain(IMAGE), fk.optimize(plain)(IMAGE)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, msg=lambda text, path=path: f"{path}: {text}")


def test_a_hook_that_comes_and_goes(network):
    plain, optimized = copy.deepcopy(network), fk.optimize(network)
    kept = [path for path in leaves(network) if path in dict(optimized.named_modules())]
    with torch.no_grad():
        before = optimized(IMAGE)
        for path in kept:
            if "drop_path" not in path and ".act" not in path:
                continue  # other layers were folded: theirs is another map
            hooks = [
                m.get_submodule(path).register_forward_hook(lambda module, inputs, out: out + 0.5)
                for m in (plain, optimized)
            ]
            torch.testing.assert_close(optimized(IMAGE), plain(IMAGE), rtol=1e-3, atol=1e-3)
            for hook in hooks:
                hook.remove()
            assert torch.equal(optimized(IMAGE), before)


def swap_activations(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.ReLU())


def train_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()


def normalise_weights(model: nn.Module) -> None:
    for conv in convolutions(model):
        parametrizations.weight_norm(conv)


@pytest.mark.parametrize("change", [swap_activations, train_batch_norms, normalise_weights])
def test_a_network_that_was_changed_before(network, change):
    plain = copy.deepcopy(network)
    change(plain)
    optimized = fk.optimize(plain)
    with torch.no_grad():
        torch.testing.assert_close(optimized(IMAGE), plain(IMAGE), rtol=1e-3, atol=1e-3)


def test_activations_swapped_later(network):
    plain, optimized = copy.deepcopy(network), fk.optimize(network)
    with torch.no_grad():
        optimized(IMAGE)
        swap_activations(plain), swap_activations(optimized)
        torch.testing.assert_close(optimized(IMAGE), plain(IMAGE), rtol=1e-3, atol=1e-3)
