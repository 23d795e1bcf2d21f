import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error, small_ffnet
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.layers import BNConv, FoldableConv, SkipConv

EXACT = 1e-10


@pytest.fixture(scope="module")
def models():
    """Randomised float64 models, built once: FFNet-1 and 3 as published, the plans of 2 and 4 narrowed."""
    torch.manual_seed(0)
    narrow = {"dims": (8, 16, 32, 64), "stem_width": 8}
    kwargs = {"ffnet_1": {}, "ffnet_2": narrow, "ffnet_3": {}, "ffnet_4": narrow}
    return {name: randomise(ffnet.create_model(name, dtype=torch.float64, **kwargs[name])).eval() for name in kwargs}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ffnet_1", (256, 256)),
        pytest.param("ffnet_1", (224, 320), marks=pytest.mark.long),
        pytest.param("ffnet_3", (256, 256), marks=pytest.mark.long),
        pytest.param("ffnet_3", (224, 320), marks=pytest.mark.long),
        ("ffnet_2", (224, 320)),
        ("ffnet_4", (224, 320)),
        ("ffnet_2", (33, 1)),
        ("ffnet_4", (47, 95)),
    ],
)
@torch.no_grad()
def test_same_logits_in_float64(models, name, size):
    model = models[name]
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = model(x)
    assert expected.std() > 0.01  # the input shows in the logits
    for extra_folds in (False, True):
        assert relative_error(ffnet.reparameterize(model, extra_folds=extra_folds)(x), expected) < EXACT


@torch.no_grad()
def test_the_comparison_can_fail(models):
    """A single running mean that is wrong in the deepest stage shows far above the tolerance."""
    model = models["ffnet_3"]
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    faulty = copy.deepcopy(model)
    faulty.stages[3][5].token_mixer[0].main.conv2.conv1.bn.running_mean[7] += 1e-3
    assert relative_error(ffnet.reparameterize(faulty)(x), expected) > 100 * EXACT


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("layer_scale_init", [None, 1.0])
@torch.no_grad()
def test_every_option_folds(norm, num_classes, in_chans, layer_scale_init):
    options = {"norm": norm, "num_classes": num_classes, "in_chans": in_chans, "layer_scale_init": layer_scale_init}
    model = randomise(small_ffnet(**options)).double().eval()
    fused = ffnet.reparameterize(model)
    x = torch.randn(2, in_chans, 40, 56, dtype=torch.float64)
    assert relative_error(fused(x), model(x)) < EXACT
    assert fused.norm_folded == (norm == "batch" and num_classes > 0)
    assert not any("layer_scale" in key for key in fused.state_dict())


def test_fused_tree():
    """Every foldable layer is one biased convolution of the same name; nothing else is renamed."""
    model = small_ffnet(layer_scale_init=1e-6)
    fused = ffnet.reparameterize(model, extra_folds=False)
    folded = [name for name, module in model.named_modules() if isinstance(module, FoldableConv)]
    outermost = [name for name in folded if not any(name.startswith(f"{other}.") for other in folded)]
    assert "stages.1.0.proj.1" in outermost
    for name in outermost:
        assert type(fused.get_submodule(name)) is nn.Conv2d
        assert fused.get_submodule(name).bias is not None
    kept = {key for key in model.state_dict() if not any(key.startswith(f"{name}.") for name in outermost)}
    new = {f"{name}.{leaf}" for name in outermost for leaf in ("weight", "bias")}
    assert set(fused.state_dict()) == kept | new


@pytest.mark.parametrize("extra_folds", [False, True])
def test_idempotent(extra_folds):
    once = ffnet.reparameterize(randomise(small_ffnet(layer_scale_init=1.0)), extra_folds=extra_folds)
    twice = ffnet.reparameterize(once, extra_folds=extra_folds)
    assert str(twice) == str(once)
    assert twice is not once
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(twice.state_dict()[key], value) for key, value in once.state_dict().items())


def test_extra_folds_can_follow():
    model = randomise(small_ffnet(layer_scale_init=1.0))
    late = ffnet.reparameterize(ffnet.reparameterize(model, extra_folds=False)).state_dict()
    early = ffnet.reparameterize(model).state_dict()
    assert all(torch.equal(late[key], value) for key, value in early.items())


def test_original_is_untouched_and_shares_nothing():
    model = randomise(small_ffnet(layer_scale_init=1.0)).double()  # float64: where a cast would not copy
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tree = str(model)
    fused = ffnet.reparameterize(model)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.fill_(torch.nan)
    assert str(model) == tree
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype):
    fused = ffnet.reparameterize(small_ffnet(dtype=dtype, layer_scale_init=1e-6))
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}


def test_device_is_kept():
    fused = ffnet.reparameterize(small_ffnet(device="meta"))
    assert {parameter.device.type for parameter in fused.parameters()} == {"meta"}


@pytest.mark.parametrize("training", [False, True])
def test_training_flags_are_kept(training):
    fused = ffnet.reparameterize(small_ffnet().train(training))
    assert {module.training for module in fused.modules()} == {training}


@torch.no_grad()
def test_training_mode_folds_running_statistics():
    model = randomise(small_ffnet()).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = ffnet.reparameterize(model.train())
    assert relative_error(fused(x), model.eval()(x)) < EXACT


def test_requires_grad_is_kept():
    model = small_ffnet(layer_scale_init=1e-6)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.stages[3].requires_grad_(True)
    trainable = {n for n, p in ffnet.reparameterize(model).named_parameters() if p.requires_grad}
    assert trainable == {
        n for n, _ in ffnet.reparameterize(model).named_parameters() if n.startswith(("head", "stages.3"))
    }


@torch.no_grad()
def test_query_bias_stays_before_the_depthwise_convolution():
    """Moved through zero padding, the bias would be right inside the map and wrong at its border."""
    mixer = randomise(ffnet.ffnified_attention_mixer(4)).double().eval()
    fused = ffnet.reparameterize(mixer)
    assert fused.fc.bias.abs().min() > 0
    x = torch.randn(1, 4, 20, 20, dtype=torch.float64)
    expected = mixer.conv1(mixer.fc(x))
    torch.testing.assert_close(fused.conv1(fused.fc(x)), expected)

    moved = F.conv2d(x, fused.fc.weight)
    bias = fused.conv1.bias + fused.conv1.weight.sum((1, 2, 3)) * fused.fc.bias
    moved = F.conv2d(moved, fused.conv1.weight, bias, padding=3, groups=4)
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(moved[inside], expected[inside])
    border = torch.ones(20, 20, dtype=torch.bool)
    border[3:-3, 3:-3] = False
    assert ((moved - expected)[..., border].abs() > 1e-6).all()


@torch.no_grad()
def test_works_on_any_tree_and_on_a_single_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([BNConv(3, 3), nn.Sequential(SkipConv(3), nn.ReLU())])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    net = randomise(Net()).eval()
    x = torch.randn(2, 3, 4, 4)
    fused = ffnet.reparameterize(net)
    assert [type(m) for m in itertools.islice(fused.layers.modules(), 1, None)] == [
        nn.Conv2d,
        nn.Sequential,
        nn.Conv2d,
        nn.ReLU,
    ]
    torch.testing.assert_close(fused(x), net(x))
    layer = net.layers[1][0]
    assert type(ffnet.reparameterize(layer)) is nn.Conv2d
    torch.testing.assert_close(ffnet.reparameterize(layer)(x), layer(x))


def test_features_that_need_the_folded_norm_are_refused():
    fused = ffnet.reparameterize(small_ffnet())
    x = torch.randn(1, 3, 32, 32)
    for request in (
        lambda: fused.forward_head(fused.forward_features(x), pre_logits=True),
        lambda: fused.forward_intermediates(x, norm=True),
        lambda: fused.reset_classifier(0),
    ):
        with pytest.raises(RuntimeError, match="extra_folds=False"):
            request()
    fused.forward_intermediates(x)
    ffnet.reparameterize(small_ffnet(), extra_folds=False).reset_classifier(5)


@pytest.mark.parametrize("training", [False, True])
def test_kernels_and_folding_in_either_order(training):
    model = randomise(small_ffnet(layer_scale_init=1.0)).double().train(training)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    optimized = ffnet_kernels.optimize(copy.deepcopy(model))
    for _ in range(2):
        assert relative_error(optimized(x), model(x)) < EXACT
    folded = ffnet.reparameterize(optimized).eval()
    expected = model.eval()(x)
    assert relative_error(folded(x), expected) < EXACT
    assert relative_error(ffnet_kernels.optimize(folded)(x), expected) < EXACT
