import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error
from torch import nn

from ffnet.layers import BNConv, BranchedDepthwise, ConvBN, DropChannels, DropPath, LayerNorm2d, SkipConv

LAYERS = {
    "dense": lambda: ConvBN(4, 6, 3, stride=2),
    "depthwise": lambda: ConvBN(4, 4, 5, groups=4),
    "pointwise": lambda: ConvBN(4, 6),
    "bn first": lambda: BNConv(4, 6),
    "skip": lambda: SkipConv(4),
    "branches": lambda: BranchedDepthwise(4, 4),
    "branches, widening, stride 2": lambda: BranchedDepthwise(4, 8, 7, stride=2),
    "branches 9 and 5": lambda: BranchedDepthwise(4, 4, 9, 5),
    "branches 5 and 5": lambda: BranchedDepthwise(4, 4, 5, 5),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 2)])
def test_fused_layer_is_one_equal_convolution(name, size):
    layer = randomise(LAYERS[name]()).double().eval()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    fused = layer.fused()
    assert type(fused) is nn.Conv2d
    assert fused.bias is not None
    assert fused(x).shape == layer(x).shape
    assert relative_error(fused(x), layer(x)) < 1e-13


@pytest.mark.parametrize("name", LAYERS)
def test_fold_is_rounded_once(name):
    """The float32 fold is the float64 one, rounded: not folded in float32."""
    layer = randomise(LAYERS[name]())
    fused, exact = layer.fused(), layer.double().fused()
    assert torch.equal(fused.weight, exact.weight.float())
    assert torch.equal(fused.bias, exact.bias.float())


def test_fused_layer_shares_no_storage():
    layer = randomise(BNConv(4, 6)).double()
    fused = layer.fused()
    expected = fused.weight.clone()
    with torch.no_grad():
        layer.c.weight.zero_()
    assert torch.equal(fused.weight, expected)


def test_small_branch_is_padded_by_half_its_own_kernel():
    layer = BranchedDepthwise(2, 2, 9, 5)
    assert layer.conv.c.padding == (4, 4)
    assert layer.conv1.c.padding == (2, 2)


@pytest.mark.parametrize("kernels", [(7, 4), (8, 3), (3, 5)])
def test_branches_reject_kernels_that_do_not_nest(kernels):
    with pytest.raises(ValueError, match="odd kernels"):
        BranchedDepthwise(2, 2, *kernels)


def test_layer_norm_2d_normalises_channels():
    x = torch.randn(2, 6, 3, 5)
    norm = randomise(LayerNorm2d(6))
    expected = torch.stack(
        [F.layer_norm(x[..., i, j], (6,), norm.weight, norm.bias, 1e-6) for i in range(3) for j in range(5)], dim=-1
    )
    torch.testing.assert_close(norm(x), expected.unflatten(-1, (3, 5)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(4000, 2, 2, 2)
    drop = DropPath(0.3)
    y = drop(x)
    per_sample = y.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop.active
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_rejects_rate(rate):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        DropPath(rate)


def test_dropped_channels_are_those_of_dropout2d():
    x = torch.randn(3, 40, 2, 5)
    for drop in (DropChannels(0.3), torch.nn.Dropout2d(0.3)):
        torch.manual_seed(1)
        y = drop(x)
        dropped = (y == 0).flatten(2).all(2)
        assert torch.equal(dropped, (y == 0).flatten(2).any(2))
        assert 10 < dropped.sum() < 70
        torch.testing.assert_close(y[~dropped], x[~dropped] / 0.7)
        assert drop.eval()(x) is x or torch.equal(drop(x), x)
        torch.manual_seed(1)
        assert torch.equal((DropChannels(0.3)(x) == 0), y == 0)
