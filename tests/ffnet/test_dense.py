"""Backbones and segmentation models: what they are, and that folding, operators, training and export keep it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.layers import FoldableConv, LayerNorm2d, StripDepthwise
from ffnet.segmentation import BAND, label_map

EXACT = 1e-10
TRUNK = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "stem_width": 8}
SEG = {**TRUNK, "num_classes": 5, "head": {"width": 16, "align_width": 24, "blocks": 1}}
SMALL = {
    "ffnet_1_features": TRUNK,
    "ffnet_3_features": {**TRUNK, "out_indices": (1, -1)},
    "ffnet_seg": {**TRUNK, "num_classes": 5},
    "ffnet_seg_features": TRUNK,
    "ffnet_seg_ade20k": SEG,
    "ffnet_seg_cityscapes": SEG,
    "ffnet_2_upernet": {**TRUNK, "num_classes": 5, "width": 16},
}
every_model = pytest.mark.parametrize("name", SMALL)


def small(name, **kwargs):
    """All of a model's structure, at a size for tests."""
    return randomise(ffnet.create_model(name, **{**SMALL[name], **kwargs}))


def one(out):
    """The outputs of any of the models as one vector, so that all of them count alike."""
    maps = out if isinstance(out, list) else [out]
    return torch.cat([(m / m.detach().abs().max()).flatten() for m in maps])


def as_list(out):
    return out if isinstance(out, list) else [out]


def largest_relative_error(out, expected):
    return max(relative_error(a, b) for a, b in zip(as_list(out), as_list(expected), strict=True))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ffnet_seg_features", {"": 63_826_048}),
        ("ffnet_seg", {"": 63_826_048 + 3_384_040}),
        ("ffnet_seg_ade20k", {"backbone": 63_826_048, "decode_head": 4_650_518}),
        ("ffnet_seg_cityscapes", {"backbone": 63_826_048, "decode_head": 3_932_307}),
    ],
)
def test_published_parameter_counts(name, parameters):
    model = ffnet.create_model(name, device="meta")
    assert {path: ffnet.count_parameters(model.get_submodule(path)) for path in parameters} == parameters


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_backbones_have_the_classifiers_keys_and_norms(number):
    classifier = ffnet.create_model(f"ffnet_{number}", device="meta").state_dict()
    backbone = ffnet.create_model(f"ffnet_{number}_features", device="meta")
    own = {key: value.shape for key, value in backbone.state_dict().items() if not key.startswith("norm")}
    assert own == {k: v.shape for k, v in classifier.items() if not k.startswith(("norm.", "head."))}
    for i, channels in enumerate(backbone.feature_info.channels()):
        norm = getattr(backbone, f"norm{i}")
        assert type(norm) is LayerNorm2d
        assert (norm.normalized_shape, norm.eps) == ((channels,), 1e-6)
    norms = {f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")}
    assert set(backbone.state_dict()) == {*own, *norms}


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def conv_bn(*names):
    return {f"{name}.{leaf}" for name in names for leaf in ("c.weight", *(f"bn.{leaf}" for leaf in BN))}


def strips(name, kernel):
    branches = (
        ("conv1", "conv2", "strip_conv1", "strip_conv2") if kernel == 9 else ("conv1", "strip_conv1", "strip_conv2")
    )
    return conv_bn(*(f"{name}.{branch}" for branch in branches))


def biased(*names):
    return {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


def seg_backbone_keys():
    keys = conv_bn("patch_embed.0", "patch_embed.2", "patch_embed.4", "patch_embed.5")
    for i, depth in enumerate((3, 4, 18, 5)):
        if i > 0:
            keys |= conv_bn(f"stages.{i}.0.proj.0", f"stages.{i}.0.proj.2")
        for j in range(depth):
            token, channel = (f"stages.{i}.{j + (i > 0)}.{mixer}" for mixer in ("token_mixer.0", "channel_mixer"))
            keys |= conv_bn(f"{token}.main.fc", f"{channel}.main.conv")
            for conv in ("conv1", "conv2"):
                keys |= strips(f"{token}.main.{conv}", 3 if i < 2 else 9)
            keys |= biased(f"{channel}.main.fc1", f"{channel}.main.fc2")
            keys |= {f"{token}.layer_scale", f"{channel}.layer_scale"}
    return keys


def test_published_keys_of_seg():
    """Written out from the published layout."""
    backbone = seg_backbone_keys()
    heads = conv_bn("head1.0") | biased("head2.0", "head2.1", "head2.3")
    assert set(ffnet.create_model("ffnet_seg_features", device="meta").state_dict()) == backbone
    assert set(ffnet.create_model("ffnet_seg", device="meta").state_dict()) == backbone | heads
    for name, blocks in (("ffnet_seg_ade20k", 3), ("ffnet_seg_cityscapes", 5)):
        keys = {f"backbone.{key}" for key in backbone}
        keys |= conv_bn("decode_head.squeeze.0", "decode_head.squeeze.2", "decode_head.align.0")
        keys |= biased("decode_head.conv_seg")
        for k in range(blocks):
            block = f"decode_head.head_blocks.{k}"
            token, channel = f"{block}.token_mixer.main", f"{block}.channel_mixer.main"
            keys |= conv_bn(f"{token}.fc") | strips(f"{token}.conv1", 9) | strips(f"{token}.conv2", 9)
            keys |= strips(f"{channel}.conv", 9) | biased(f"{channel}.fc1", f"{channel}.fc2")
        assert set(ffnet.create_model(name, device="meta").state_dict()) == keys


def test_published_shapes_of_seg():
    state = ffnet.create_model("ffnet_seg_ade20k", device="meta").state_dict()
    shapes = {
        "backbone.patch_embed.4.c.weight": (96, 64, 3, 3),
        "backbone.patch_embed.5.c.weight": (96, 96, 3, 3),
        "backbone.stages.2.0.proj.0.c.weight": (768, 192, 3, 3),
        "backbone.stages.2.0.proj.2.c.weight": (384, 768, 1, 1),
        "backbone.stages.0.2.token_mixer.0.main.conv1.strip_conv1.c.weight": (96, 1, 1, 3),
        "backbone.stages.0.2.token_mixer.0.main.conv1.strip_conv2.c.weight": (96, 1, 3, 1),
        "backbone.stages.3.5.token_mixer.0.main.conv2.conv1.c.weight": (768, 1, 9, 9),
        "backbone.stages.3.5.token_mixer.0.main.conv2.conv2.c.weight": (768, 1, 5, 5),
        "backbone.stages.3.5.token_mixer.0.main.conv2.strip_conv1.c.weight": (768, 1, 1, 9),
        "backbone.stages.3.5.channel_mixer.main.conv.c.weight": (768, 1, 3, 3),
        "backbone.stages.3.5.channel_mixer.main.fc1.weight": (3072, 768, 1, 1),
        "backbone.stages.3.5.channel_mixer.layer_scale": (768, 1, 1),
        "decode_head.squeeze.0.c.weight": (1344, 1344, 1, 1),
        "decode_head.squeeze.2.c.weight": (256, 1344, 1, 1),
        "decode_head.align.0.c.weight": (1024, 256, 1, 1),
        "decode_head.conv_seg.weight": (150, 1024, 1, 1),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    scale = small("ffnet_seg_features").stages[0][0].channel_mixer.layer_scale
    assert scale.shape == (8, 1, 1)
    torch.testing.assert_close(
        ffnet.create_model("ffnet_seg_features", **TRUNK).stages[0][0].channel_mixer.layer_scale,
        torch.full((8, 1, 1), 1e-5),
    )


@torch.no_grad()
def test_backbones_give_normed_maps_of_the_stages():
    backbone = small("ffnet_1_features").eval()
    classifier = ffnet.FFNet(**{**TRUNK, "channel_kernel": 3}).eval()
    classifier.load_state_dict({k: v for k, v in backbone.state_dict().items() if "norm" not in k}, strict=False)
    x = torch.randn(2, 3, 70, 97)
    plain = classifier.forward_intermediates(x, intermediates_only=True)
    maps = backbone(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 18, 25), (2, 16, 9, 13), (2, 32, 5, 7), (2, 64, 3, 4)]
    for i, (found, map_) in enumerate(zip(maps, plain, strict=True)):
        norm = getattr(backbone, f"norm{i}")
        expected = F.layer_norm(map_.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(found, expected.permute(0, 3, 1, 2))
    unnormed = backbone.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, unnormed, plain))


@pytest.mark.parametrize(("wanted", "indices"), [((0, 2), (0, 2)), ((-1,), (3,)), (2, (2, 3)), ((1, 0), (0, 1))])
@torch.no_grad()
def test_some_of_the_maps(wanted, indices):
    backbone = small("ffnet_1_features", out_indices=wanted)
    info, x = backbone.feature_info, torch.randn(1, 3, 64, 64)
    assert info.out_indices == backbone.out_indices == indices
    assert info.channels() == [(8, 16, 32, 64)[i] for i in indices]
    assert info.reduction() == [(4, 8, 16, 32)[i] for i in indices]
    assert info.module_name() == [f"stages.{i}" for i in indices]
    assert [m.shape[1:] for m in backbone(x)] == [
        (c, 64 // r, 64 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert (info.channels(3), info.reduction([0, 1]), len(info), info[2]["index"]) == (64, [4, 8], 4, 2)
    assert info.get_dicts(["reduction"], [0, 3]) == [{"reduction": 4}, {"reduction": 32}]
    assert {key.split(".")[0] for key in backbone.state_dict() if "norm" in key} >= {f"norm{i}" for i in indices}
    used = [p.numel() for p in backbone.parameters()]
    backbone.zero_grad()
    with torch.enable_grad():
        sum(m.sum() for m in backbone(x.expand(2, -1, -1, -1))).backward()
    assert sum(p.grad is not None for p in backbone.parameters()) == len(used)


@pytest.mark.parametrize("indices", [(), (4,), (-5,), 0, 5])
def test_stages_that_are_not_there(indices):
    with pytest.raises(ValueError, match="expected"):
        small("ffnet_1_features", out_indices=indices)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (1, 1), (100, 7)])
@torch.no_grad()
def test_any_size(size):
    x = torch.randn(2, 3, *size)
    eighth, quarter = ([-(-length // stride) for length in size] for stride in (8, 4))
    assert small("ffnet_seg").eval()(x).shape == (2, 5)
    assert small("ffnet_seg_ade20k").eval()(x).shape == (2, 5, *eighth)
    assert small("ffnet_2_upernet").eval()(x).shape == (2, 5, *quarter)
    model = small("ffnet_seg_ade20k").eval()
    assert model(x[:0]).shape == (0, 5, *eighth)
    for labels in (model.predict(x), model.bfloat16().predict(x.bfloat16())):
        assert (labels.shape, labels.dtype) == ((2, *size), torch.int64)


@pytest.mark.parametrize("size", [(2 * BAND + 5, 40), (BAND, 17), (3, 200)])
def test_label_map_is_the_enlarged_logits_argmax(size):
    logits = torch.randn(2, 7, 11, 13, dtype=torch.float64)
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(label_map(logits, size), expected)


@torch.no_grad()
def test_predict_for_another_size():
    model, x = small("ffnet_seg_ade20k").eval(), torch.randn(1, 3, 64, 64)
    assert torch.equal(model.predict(x, (100, 90)), label_map(model(x), (100, 90)))


@every_model
@pytest.mark.parametrize("extra_folds", [False, True])
@torch.no_grad()
def test_reparameterised_in_float64(name, extra_folds):
    model = small(name, layer_scale_init=0.5).double().eval()
    fused = ffnet.reparameterize(model, extra_folds=extra_folds)
    assert not any(isinstance(m, (FoldableConv, nn.BatchNorm2d)) for m in fused.modules())
    for size in ((64, 64), (39, 85)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert largest_relative_error(fused(x), model(x)) < EXACT
    assert any("layer_scale" in key for key in fused.state_dict()) != extra_folds


@pytest.mark.long
@pytest.mark.parametrize("name", ["ffnet_2_features", "ffnet_seg_ade20k"])
@torch.no_grad()
def test_reparameterised_in_float64_at_full_size(name):
    model = randomise(ffnet.create_model(name, dtype=torch.float64)).eval()
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    assert largest_relative_error(ffnet.reparameterize(model)(x), model(x)) < EXACT


@torch.no_grad()
def test_the_comparison_of_folds_can_fail():
    model = small("ffnet_seg_ade20k").double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    faulty = copy.deepcopy(model)
    faulty.backbone.stages[2][1].token_mixer[0].main.conv1.strip_conv2.bn.running_mean[3] += 1e-3
    assert largest_relative_error(ffnet.reparameterize(faulty)(x), expected) > 100 * EXACT


def test_strips_are_centred():
    layer = randomise(StripDepthwise(2, 9)).double().eval()
    weight = layer.fused().weight
    branches = {name: branch.folded()[0] for name, branch in layer.named_children()}
    assert list(branches) == ["conv1", "conv2", "strip_conv1", "strip_conv2"]
    expected = branches["conv1"].clone()
    expected[..., 2:7, 2:7] += branches["conv2"]
    expected[..., 4:5, :] += branches["strip_conv1"]
    expected[..., :, 4:5] += branches["strip_conv2"]
    torch.testing.assert_close(weight, expected)
    assert list(dict(StripDepthwise(2, 3).named_children())) == ["conv1", "strip_conv1", "strip_conv2"]


def operators(model):
    """The operators that an optimised model has run on."""
    return {row.runs_on for row in ffnet_kernels.report(model).rows if row.is_fused}


#: Of two that differ in numbers only, one.
every_kind = pytest.mark.parametrize("name", [name for name in SMALL if name != "ffnet_seg_cityscapes"])
EXPECTED = {"conv2d", "ffnified_attention", "channel_mixer"}


@every_kind
@torch.no_grad()
def test_optimised_in_inference(name, caplog):
    model = small(name, layer_scale_init=0.5).eval()
    x = torch.randn(2, 3, 96, 128)
    expected = model(x)
    for plain in (model, ffnet.reparameterize(model)):
        fast = ffnet_kernels.optimize(copy.deepcopy(plain))
        for _ in range(2):
            assert largest_relative_error(fast(x), expected) < 1e-4
        report = ffnet_kernels.report(fast)
        assert report.rows[0].runs_on == "a program", report
        assert operators(fast) >= EXPECTED, report
        assert not [row for row in report.rows if row.is_step and "batch_norm" in row.runs_on], report
    assert not caplog.records  # of a program that is refused


@pytest.mark.parametrize("name", ["ffnet_3_features", "ffnet_seg_ade20k"])
@torch.no_grad()
def test_optimised_in_bfloat16(name):
    model, x = small(name, layer_scale_init=0.5).eval().bfloat16(), torch.randn(2, 3, 96, 128).bfloat16()
    exact = as_list(copy.deepcopy(model).double()(x.double()))
    eager, fast = as_list(model(x)), ffnet_kernels.optimize(copy.deepcopy(model))
    fast(x)
    for out, plain, expected in zip(as_list(fast(x)), eager, exact, strict=True):
        assert out.dtype == torch.bfloat16
        assert relative_error(out.double(), expected) <= 2 * relative_error(plain.double(), expected)


@every_kind
def test_optimised_in_training(name):
    model = small(name, layer_scale_init=0.5).train()
    fast, double = ffnet_kernels.optimize(copy.deepcopy(model)), copy.deepcopy(model).double()
    x = torch.randn(4, 3, 64, 64)
    for step in range(2):  # in the first the modules run
        for m in (model, fast, double):
            m.zero_grad()
            torch.manual_seed(step)  # of dropout
            out = one(m(x.to(next(m.parameters()).dtype)))
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).mean().backward()
        exact = torch.cat([p.grad.flatten() for p in double.parameters()])
        errors = [(torch.cat([p.grad.flatten() for p in m.parameters()]) - exact).norm() for m in (fast, model)]
        assert errors[1] < 1e-3 * exact.norm()  # else they drew other channels
        assert errors[0] <= 2 * errors[1] + 1e-5 * exact.norm(), step
    report = ffnet_kernels.report(fast)
    assert report.rows[0].runs_on == "a program, with gradients", report
    assert operators(fast) >= {"branched_depthwise", "feed_forward"}, report


@every_model
def test_a_training_step_reaches_every_parameter(name):
    model = small(name).train()
    one(model(torch.randn(2, 3, 64, 64))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.long
@every_model
@torch.no_grad()
def test_exports(name):
    model, x = small(name, layer_scale_init=0.5, depths=(1, 1, 1, 1)).eval(), torch.randn(2, 3, 64, 96)
    exported = torch.export.export(model, (x,)).module()
    assert largest_relative_error(exported(x), model(x)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", ["ffnet_1_features", "ffnet_seg_ade20k"])
@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    model, x = small(name, depths=(1, 1, 1, 1)).eval(), torch.randn(2, 3, 64, 96)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert largest_relative_error(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["ffnet_1_features", "ffnet_seg_ade20k"])
def test_gradient_checkpointing(name):
    model, x = small(name).double().train(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        candidate = copy.deepcopy(model)
        candidate.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        one(candidate(x)).square().mean().backward()
        gradients.append([p.grad for p in candidate.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_the_classifier_of_seg_changes_its_head():
    model, x = small("ffnet_seg").eval(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 1280)
    model.reset_classifier(3, "avg")
    assert (model(x).shape, model.num_classes, model.get_classifier().out_features) == ((2, 3), 3, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    with pytest.raises(ValueError, match="num_classes >= 0, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="'avg', got 'max'"):
        model.reset_classifier(3, "max")


def test_layer_scales_do_not_decay_and_layers_have_groups():
    backbone = small("ffnet_3_features")
    assert backbone.no_weight_decay() == {n for n, _ in backbone.named_parameters() if "layer_scale" in n} != set()
    seg = small("ffnet_seg_ade20k")
    assert seg.no_weight_decay() == {n for n, _ in seg.named_parameters() if "layer_scale" in n}
    assert set(backbone.group_matcher()) == {"stem", "blocks"}


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_classes >= 1, got 0"):
        small("ffnet_seg_ade20k", num_classes=0)
    with pytest.raises(TypeError, match="window"):
        small("ffnet_2_upernet", window=7)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        small("ffnet_seg_ade20k").eval()(torch.randn(1, 4, 32, 32))


@every_kind
def test_factory(name):
    model = ffnet.create_model(name, dtype=torch.bfloat16, device="meta", **SMALL[name])
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
