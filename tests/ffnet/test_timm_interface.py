"""What users of timm and torchvision ask of a model, with the packages themselves."""

import copy

import pytest
import torch
from ffnet_testing import randomise

import ffnet
import ffnet_kernels

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "stem_width": 8}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def detection():
    return pytest.importorskip("torchvision.models.detection")


@pytest.mark.parametrize(
    ("name", "strides"), [("ffnet_1", [4, 8, 16, 32]), ("ffnet_3", [4, 8, 16, 32]), ("ffnet_seg", [8, 16, 32])]
)
@torch.no_grad()
def test_features_only(timm, name, strides):
    model = timm.create_model(name, features_only=True, **SMALL).eval()
    x = torch.randn(1, 3, 64, 96)
    assert model.feature_info.reduction() == strides
    assert [m.shape[1] for m in model(x)] == model.feature_info.channels()
    assert [(64 // m.shape[2], 96 // m.shape[3]) for m in model(x)] == [(s, s) for s in strides]
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)
    some = timm.create_model(name, features_only=True, out_indices=(1, 3), in_chans=4, **SMALL).eval()
    assert some.feature_info.reduction() == [8, 32]
    assert len(some(torch.randn(1, 4, 64, 64))) == 2


def test_our_feature_info_answers_as_timms(timm):
    own = timm.create_model("ffnet_1", features_only=True, out_indices=(1, 3), **SMALL).feature_info
    theirs = timm.models.FeatureInfo(copy.deepcopy(ffnet.FFNet(**SMALL).feature_info), (1, 3))
    for ask in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(own, ask)() == getattr(theirs, ask)(), ask
    for index in (2, [0, 3]):
        for ask in ("channels", "reduction", "module_name"):
            assert getattr(own, ask)(index) == getattr(theirs, ask)(index), ask
        assert own.get_dicts(["num_chs"], index) == theirs.get_dicts(["num_chs"], index)
    assert (own.out_indices, len(own), own[1]) == (theirs.out_indices, len(theirs.info), theirs[1])


@torch.no_grad()
def test_timms_own_wrapper_takes_the_maps(timm):
    """It asks classifiers for intermediates; without norms our backbones give the same."""
    classifier = randomise(ffnet.FFNet(**SMALL)).eval()
    x = torch.randn(1, 3, 64, 64)
    hooked = timm.models.FeatureHookNet(copy.deepcopy(classifier), out_indices=(0, 2))
    for own, theirs in zip(
        classifier.forward_intermediates(x, (0, 2), intermediates_only=True), hooked(x), strict=True
    ):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("name", ["ffnet_1", "ffnet_3", "ffnet_seg"])
def test_layers_have_learning_rates_of_their_own(timm, name):
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, num_classes=5, **SMALL)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5, verbose=False)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names)
    assert all(decay == 0 for n, (_, decay) in found.items() if "layer_scale" in n)
    scales = [max(s for n, (s, _) in found.items() if n.startswith(p)) for p in ("patch_embed", "stages.0", "stages.3")]
    assert scales == sorted(set(scales))
    assert model.get_classifier().out_features == 5


def test_heads_and_checkpointing(timm):
    for name in ffnet.list_models("classification"):
        model = timm.create_model(name, num_classes=5, **SMALL)
        model.set_grad_checkpointing(True)
        x = torch.randn(2, 3, 64, 64)
        features = model.forward_features(x)
        assert model.forward_head(features).shape == (2, 5)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "avg")
        assert model(x).shape == (2, model.head_hidden_size)


def faster_rcnn(detection, backbone):
    return detection.FasterRCNN(backbone, num_classes=3, min_size=64, max_size=128, rpn_post_nms_top_n_test=20)


def retinanet(detection, backbone):
    return detection.RetinaNet(backbone, num_classes=3, min_size=64, max_size=128)


def pyramid(**kwargs):
    from ffnet.detection import pyramid_backbone

    return pyramid_backbone("ffnet_1_features", out_channels=16, **SMALL, **kwargs)


def test_a_classifier_is_no_backbone(detection):
    from ffnet.detection import pyramid_backbone

    with pytest.raises(ValueError, match="expected a backbone such as ffnet_1_features, got FFNet"):
        pyramid_backbone("ffnet_1", **SMALL)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_torchvisions_detectors_train_and_run(detection, kind):
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    if kind == "faster_rcnn":
        model = faster_rcnn(detection, pyramid())
    else:
        model = retinanet(detection, pyramid())
        sizes = tuple((x, int(x * 1.26), int(x * 1.59)) for x in (16, 32, 64, 128, 256))
        model.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    images = [torch.rand(3, 70, 90), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("backbone.body"))
    plain = model.eval()
    with torch.no_grad():
        expected = plain(images)
        fast = ffnet_kernels.optimize(copy.deepcopy(plain))
        for _ in range(2):
            found = fast(images)
    assert list(plain.backbone(images[1][None])) == ["0", "1", "2", "3", "pool"]
    for own, other in zip(found, expected, strict=True):
        assert set(own) == {"boxes", "labels", "scores"}
        assert len(own["boxes"]) == len(other["boxes"])
        torch.testing.assert_close(own["scores"], other["scores"], rtol=1e-3, atol=1e-4)
    operators = {row.runs_on for row in ffnet_kernels.report(fast).rows if row.is_fused}
    assert {"ffnified_attention", "channel_mixer"} <= operators
