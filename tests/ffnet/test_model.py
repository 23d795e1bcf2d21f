import copy
import io
import pickle

import pytest
import torch
from ffnet_testing import randomise, small_ffnet
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.layers import DropPath, LayerNorm2d

# Training-time parameters, fused parameters, multiply-adds of the fused model at 256 and at 384 (in units of 1e6),
# state-dict entries. Published parameter counts are fused, with the final norm and the layer scales still in place:
# reparameterize(extra_folds=False).
PUBLISHED = {
    "ffnet_1": (13_775_656, 13_660_152, 2_985, 6_715, 553),
    "ffnet_2": (27_208_408, 26_908_440, 6_003, 13_507, 1057),
    "ffnet_3": (48_817_896, 48_330_632, 10_146, 22_828, 1593),
    "ffnet_4": (79_868_968, 79_200_360, 19_166, 43_122, 1737),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    train_parameters, fused_parameters, macs_256, macs_384, entries = PUBLISHED[name]
    model = ffnet.create_model(name, device="meta")
    fused = ffnet.reparameterize(model, extra_folds=False)
    assert ffnet.count_parameters(model) == train_parameters
    assert ffnet.count_parameters(fused) == fused_parameters
    assert round(ffnet.count_macs(fused) / 1e6) == macs_256
    assert round(ffnet.count_macs(fused, (3, 384, 384)) / 1e6) == macs_384
    assert len(model.state_dict()) == entries


@pytest.mark.parametrize(
    ("name", "crop", "drop_path", "scaled"),
    [("ffnet_1", 0.9, 0.1, 0), ("ffnet_2", 0.9, 0.15, 0), ("ffnet_3", 0.95, 0.35, 1), ("ffnet_4", 0.95, 0.4, 1)],
)
def test_published_settings(name, crop, drop_path, scaled):
    model = ffnet.create_model(name, device="meta")
    assert model.config["crop_pct"] == crop
    assert model.config["input_size"] == (3, 256, 256)
    assert model.config["interpolation"] == "bicubic"
    assert model.config["mean"] == (0.485, 0.456, 0.406)
    assert model.config["std"] == (0.229, 0.224, 0.225)
    assert any("layer_scale" in key for key in model.state_dict()) == scaled
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    blocks = len(rates) // 2
    assert rates[::2] == rates[1::2] == pytest.approx([drop_path * i / (blocks - 1) for i in range(blocks)])


def test_layer_scale_is_published_value():
    model = ffnet.create_model("ffnet_3", dims=(8, 16, 32, 64), stem_width=8)
    assert torch.equal(model.stages[0][0].channel_mixer.layer_scale, torch.full((8, 1, 1), 1e-6))


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def conv_bn(name):
    return {f"{name}.c.weight", *(f"{name}.bn.{leaf}" for leaf in BN)}


def branched(name):
    return conv_bn(f"{name}.conv") | conv_bn(f"{name}.conv1")


def biased(name):
    return {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys(name):
    """The key set, written out from the published layout."""
    depths = {
        "ffnet_1": (2, 2, 8, 2),
        "ffnet_2": (3, 3, 15, 3),
        "ffnet_3": (4, 4, 22, 5),
        "ffnet_4": (4, 4, 27, 3),
    }[name]
    keys = conv_bn("patch_embed.0") | conv_bn("patch_embed.2") | {f"norm.{leaf}" for leaf in BN} | biased("head")
    for i, depth in enumerate(depths):
        if i > 0:
            keys |= branched(f"stages.{i}.0.proj.0") | conv_bn(f"stages.{i}.0.proj.1.conv")
        for j in range(depth):
            block = f"stages.{i}.{j + (i > 0)}"
            token, channel = f"{block}.token_mixer.0", f"{block}.channel_mixer"
            keys |= conv_bn(f"{token}.main.fc")
            for conv in ("conv1", "conv2"):
                keys |= (biased if i < 2 else branched)(f"{token}.main.{conv}")
            keys |= (conv_bn if name == "ffnet_1" else branched)(f"{channel}.main.conv")
            keys |= biased(f"{channel}.main.fc1") | biased(f"{channel}.main.fc2")
            if name in ("ffnet_3", "ffnet_4"):
                keys |= {f"{token}.layer_scale", f"{channel}.layer_scale"}
    state = ffnet.create_model(name, device="meta").state_dict()
    assert set(state) == keys


def test_published_shapes():
    state = ffnet.create_model("ffnet_3", device="meta").state_dict()
    shapes = {
        "patch_embed.0.c.weight": (64, 3, 3, 3),
        "patch_embed.2.c.weight": (96, 64, 3, 3),
        "stages.1.0.proj.0.conv.c.weight": (192, 1, 7, 7),
        "stages.1.0.proj.0.conv1.c.weight": (192, 1, 3, 3),
        "stages.1.0.proj.1.conv.bn.weight": (192,),
        "stages.1.0.proj.1.conv.c.weight": (192, 192, 1, 1),
        "stages.0.3.token_mixer.0.main.conv2.weight": (96, 1, 3, 3),
        "stages.2.3.token_mixer.0.main.fc.c.weight": (384, 384, 1, 1),
        "stages.2.3.token_mixer.0.main.conv1.conv1.c.weight": (384, 1, 3, 3),
        "stages.2.3.token_mixer.0.layer_scale": (384, 1, 1),
        "stages.3.5.channel_mixer.main.conv.conv.c.weight": (768, 1, 7, 7),
        "stages.3.5.channel_mixer.main.fc1.weight": (2304, 768, 1, 1),
        "head.weight": (1000, 768),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_downsampling_reads_groups_of_the_input_width():
    conv = small_ffnet().stages[1][0].proj[0].conv.c
    assert (conv.groups, conv.stride, conv.padding) == (8, (2, 2), (3, 3))


def test_squeeze_excite_slot_is_an_identity_in_even_blocks():
    stage = small_ffnet(depths=(3, 1, 1, 1)).stages[0]
    assert [len(block.token_mixer) for block in stage] == [2, 1, 2]
    assert isinstance(stage[0].token_mixer[1], nn.Identity)


def test_initialisation():
    model = ffnet.create_model("ffnet_1", dims=(16, 32, 64, 128), depths=(1, 1, 1, 1))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.bias is None or not module.bias.any()
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.reset_classifier(50)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head.bias.any()


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (33, 50)])
@torch.no_grad()
def test_any_size(size):
    model = small_ffnet().eval()
    x = torch.randn(2, 3, *size)
    features = model.forward_features(x)
    assert features.shape == (2, 64, *(-(-length // 32) for length in size))
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (2, 10)
    assert model(x[:0]).shape == (0, 10)


@torch.no_grad()
def test_forward_head():
    model = randomise(small_ffnet()).eval()
    features = torch.randn(2, 64, 3, 5)
    pooled = model.norm(features).mean((2, 3))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(features), model.head(pooled))


def test_layer_norm_option():
    assert isinstance(small_ffnet(norm="layer").norm, LayerNorm2d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factory_dtype(dtype):
    model = small_ffnet(dtype=dtype, layer_scale_init=1e-6, norm="layer")
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_factory_device():
    model = small_ffnet(device="meta", layer_scale_init=1e-6)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_reset_classifier():
    model = small_ffnet(dtype=torch.float64)
    model.reset_classifier(3)
    assert model.get_classifier() is model.head
    assert (model.num_classes, model.config["num_classes"], model.head.out_features) == (3, 3, 3)
    assert model.head.weight.dtype == torch.float64
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity)
    assert model.eval()(x).shape == (2, 64)
    with pytest.raises(ValueError, match="num_classes >= 0, got -1"):
        model.reset_classifier(-1)


@torch.no_grad()
def test_forward_intermediates():
    model = randomise(small_ffnet()).eval()
    x = torch.randn(1, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [
        (8, 4),
        (16, 8),
        (32, 16),
        (64, 32),
    ]
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(maps[-1], final)
    for indices, chosen in [(2, (2, 3)), ([0, -1], (0, 3)), ([1], (1,)), ((), ())]:
        some = model.forward_intermediates(x, indices, intermediates_only=True)
        assert len(some) == len(chosen)
        assert all(torch.equal(a, maps[i]) for a, i in zip(some, chosen, strict=True))
    final, normed = model.forward_intermediates(x, norm=True)
    assert torch.equal(normed[-1], model.norm(maps[-1]))
    assert torch.equal(normed[0], maps[0])
    assert torch.equal(final, maps[-1])
    final, early = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert torch.equal(final, maps[1])
    assert len(early) == 2


@pytest.mark.parametrize("indices", [0, 5, [4], [-5]])
def test_forward_intermediates_rejects_indices(indices):
    with pytest.raises(ValueError, match="expected"):
        small_ffnet().forward_intermediates(torch.randn(1, 3, 32, 32), indices)


def test_forward_intermediates_rejects_format():
    with pytest.raises(ValueError, match="'NCHW', got 'NLC'"):
        small_ffnet().forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 1, 3, 32, 32)])
@pytest.mark.parametrize("optimized", [False, True])
def test_wrong_input_is_refused_by_the_first_convolution(shape, optimized):
    model = small_ffnet().eval()
    if optimized:
        ffnet_kernels.optimize(model)(torch.randn(1, 3, 32, 32))
    with pytest.raises(RuntimeError, match=r"to have 3 channels, but got 4|Expected 3D .* or 4D"):
        model(torch.randn(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": -1}, "num_classes >= 0, got -1"),
        ({"in_chans": 0}, "in_chans >= 1, got 0"),
        ({"norm": "group"}, "'batch' or 'layer', got 'group'"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate in \[0, 1\), got 1.5"),
        ({"depths": (1, 1)}, "of one length"),
        ({"dims": (8, 12, 24, 48)}, "multiple of the one before"),
        ({"channel_kernel": 4}, "odd kernels"),
        ({"token_kernels": (3, 3, 7, 8)}, "odd kernels"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_ffnet(**kwargs)


def test_create_model_errors():
    assert ffnet.list_models("classification")[:4] == ["ffnet_1", "ffnet_2", "ffnet_3", "ffnet_4"]
    with pytest.raises(ValueError, match=r"expected one of ffnet_1, ffnet_2, ffnet_3, ffnet_4, .*, got 'ffnet_5'"):
        ffnet.create_model("ffnet_5")
    with pytest.raises(TypeError, match="pretrained"):
        ffnet.create_model("ffnet_1", pretrained=True)


def test_drop_path_and_dropout_act_in_training_only():
    model = randomise(small_ffnet(drop_path_rate=0.5, drop_rate=0.5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # so that only the random draws differ
    x = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_without_graph_breaks(fused):
    model = randomise(small_ffnet(layer_scale_init=1.0)).eval()
    model = ffnet.reparameterize(model) if fused else model
    x = torch.randn(1, 3, 64, 96)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_exports():
    model = randomise(small_ffnet(layer_scale_init=1.0)).eval()
    x = torch.randn(2, 3, 64, 96)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_gradient_checkpointing_gives_equal_gradients():
    model = randomise(small_ffnet(drop_path_rate=0.3, layer_scale_init=1.0)).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        candidate = copy.deepcopy(model)
        candidate.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        candidate(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in candidate.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_gradient_checkpointing_recomputes_every_block():
    model = small_ffnet()
    model.set_grad_checkpointing()
    calls = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda module, _: calls.append(module))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(calls) == 2 * sum(len(stage) for stage in model.stages)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_pickle_and_deepcopy(fused):
    model = randomise(small_ffnet(layer_scale_init=1.0)).eval()
    model = ffnet.reparameterize(model) if fused else model
    x = torch.randn(1, 3, 32, 32)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False))
    assert all(torch.equal(clone(x), model(x)) for clone in copies)


def test_count_macs_leaves_the_model_alone():
    model = small_ffnet().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ffnet.count_macs(model, (3, 64, 64))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_count_macs_of_an_optimised_model():
    model = small_ffnet().eval()
    expected = ffnet.count_macs(model)
    ffnet_kernels.optimize(model)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(1, 3, 64, 64))
    assert ffnet.count_macs(model) == expected


def test_count_macs_by_hand():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(8 * 25, 7))
    assert ffnet.count_macs(net, (4, 5, 5)) == 8 * 25 * (2 * 9) + 7 * 8 * 25
    assert ffnet.count_parameters(net) == 8 * 2 * 9 + 8 + 7 * 200 + 7
