"""FFNet for time series: published keys, what it computes, folds, kernels, training, export, bad series."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error, steps_side_by_side
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.forecasting import ForecastFFNet, forecast_arguments
from ffnet.rows import BranchedRow, RegroupedConv, RowConv, RowNorm, regroup

SMALL = {"variables": 3, "lookback": 24, "horizon": 5, "dim": 8, "kernel_size": 9, "small_kernel": 3}


def small(**kwargs) -> ForecastFFNet:
    model = randomise(ForecastFFNet(**{**SMALL, **kwargs}))
    assert isinstance(model, ForecastFFNet)
    return model.eval()


def test_keys():
    m, d = 7, 64
    shapes = {key: tuple(value.shape) for key, value in ForecastFFNet(expansion=2, device="meta").state_dict().items()}
    block = "model.stages.0.blocks.0"
    for key, shape in {
        "model.downsample_layers.0.0.weight": (d, 1, 4),
        "model.downsample_layers.0.0.bias": (d,),
        "model.downsample_layers.0.1.running_var": (d,),
        f"{block}.token_mixer.ffnpw1.weight": (2 * m * d, m, 1),
        f"{block}.token_mixer.ffnpw2.weight": (m * d, 2 * d, 1),
        f"{block}.token_mixer.norm.running_mean": (d,),
        f"{block}.token_mixer.dw1.weight": (m * d, 1, 51),
        f"{block}.token_mixer.dw2.weight": (m * d, 1, 51),
        f"{block}.channel_mixer.dw.lkb_origin.conv.weight": (m * d, 1, 51),
        f"{block}.channel_mixer.dw.lkb_origin.bn.weight": (m * d,),
        f"{block}.channel_mixer.dw.small_conv.conv.weight": (m * d, 1, 5),
        f"{block}.channel_mixer.dw.small_conv.bn.weight": (m * d,),
        f"{block}.channel_mixer.norm.weight": (d,),
        f"{block}.channel_mixer.ffnpw1.weight": (m * 2 * d, d, 1),
        f"{block}.channel_mixer.ffnpw2.weight": (m * d, m * 2, 1),
        "model.head.linear.weight": (96, d * 48),
    }.items():
        assert shapes[key] == shape, key
    assert "model.revin_layer.affine_weight" not in shapes
    convolutions = ForecastFFNet(device="meta").model.stages[0].blocks[0].token_mixer
    assert (convolutions.ffnpw1.groups, convolutions.ffnpw2.groups) == (d, m)


def test_rows_are_1d_convolutions():
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    row = RowConv(6, 12, 5, 2, 3, 2, groups=3, dtype=torch.float64)
    plain = nn.Conv1d(6, 12, 5, 2, 3, 2, groups=3, dtype=torch.float64)
    plain.load_state_dict(row.state_dict())
    torch.testing.assert_close(row(x[:, :, None])[:, :, 0], plain(x), rtol=1e-12, atol=1e-12)
    assert row.state_dict().keys() == plain.state_dict().keys()


def test_regroup():
    x = torch.arange(12)[None, :, None, None]  # (2 groups, 3 members, 2 values)
    assert regroup(x, 2, 3).flatten().tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert torch.equal(regroup(regroup(x, 2, 3), 3, 2), x)


def test_a_regrouped_convolution_mixes_what_has_one_place():
    """The feature of one variable reaches that feature of all variables, and no other."""
    conv = RegroupedConv(6, 6, outer=3, groups=2, restore=True)
    x = torch.zeros(1, 6, 1, 1)
    x[0, 2] = 1.0  # variable 1, feature 0
    changed = (conv(x) - conv(torch.zeros_like(x))).flatten() != 0
    assert changed.tolist() == [True, False] * 3


@pytest.mark.parametrize("restore", [False, True])
@torch.no_grad()
def test_a_norm_is_folded_only_where_its_channels_are_the_convolution_s(restore):
    """Behind a convolution that restores the order of channels they are not."""
    conv = RegroupedConv(12, 12, outer=3, groups=4, restore=restore)
    parts = {
        "interaction": ("a", nn.Identity()),
        "activation": ("b", nn.Identity()),
        "aggregation": ("c", nn.Identity()),
    }
    mixer = ffnet.MetaMixer(query=[("conv", conv), ("norm", RowNorm(3, 4))], **parts)
    mixer = randomise(mixer).double().eval()
    fused, x = ffnet.reparameterize(mixer), torch.randn(2, 12, 1, 5, dtype=torch.float64)
    assert relative_error(fused(x), mixer(x)) < 1e-12
    assert isinstance(fused.norm, RowNorm if restore else nn.Identity)


@torch.no_grad()
def test_what_it_computes():
    """With einsum over (variable, feature) in place of grouped convolutions."""
    model = small(expansion=2).double()
    m, d, n = 3, 8, 12
    x = 5 * torch.randn(4, 24, m, dtype=torch.float64) + 3
    net = model.model
    token, channel = net.stages[0].blocks[0].token_mixer, net.stages[0].blocks[0].channel_mixer

    def norm(z: torch.Tensor, bn: nn.Module) -> torch.Tensor:  # [N, M, D, L]
        flat = z.flatten(0, 1)
        out = F.batch_norm(flat, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        return out.view(z.shape)

    def depthwise(z: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        out = F.conv1d(z.flatten(1, 2), conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=m * d)
        return out.view(z.shape)

    def bias(conv: nn.Module, *shape: int) -> torch.Tensor:
        return conv.bias.view(*shape)[..., None]

    mean, std = x.mean(1, keepdim=True), (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    z = ((x - mean) / std).transpose(1, 2)
    z = torch.cat([z, z[..., -1:], z[..., -1:]], -1).unfold(-1, 4, 2)  # [N, M, L, 4]
    embed = dict(net.downsample_layers[0].named_children())
    z = torch.einsum("nmlp,dp->nmdl", z, embed["0"].weight[:, 0]) + embed["0"].bias[:, None]
    z = norm(z, embed["1"])

    w1, w2 = token.ffnpw1.weight.view(d, m, 2, m), token.ffnpw2.weight.view(m, d, d, 2)
    y = torch.einsum("nmdl,dorm->nodrl", z, w1) + bias(token.ffnpw1, d, m, 2).transpose(0, 1)
    y = torch.einsum("nmdrl,medr->nmel", F.gelu(y), w2) + bias(token.ffnpw2, m, d)
    y = F.gelu(depthwise(norm(y, token.norm), token.dw1))
    z = z + depthwise(y, token.dw2)

    branches = (depthwise(z, branch.conv) for branch in (channel.dw.lkb_origin, channel.dw.small_conv))
    norms = (channel.dw.lkb_origin.bn, channel.dw.small_conv.bn)
    y = sum(
        F.batch_norm(b.flatten(1, 2), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        for b, bn in zip(branches, norms, strict=True)
    ).view(z.shape)
    w1, w2 = channel.ffnpw1.weight.view(m, d, 2, d), channel.ffnpw2.weight.view(d, m, m, 2)
    y = torch.einsum("nmdl,merd->nmerl", norm(y, channel.norm), w1) + bias(channel.ffnpw1, m, d, 2)
    y = torch.einsum("nmdrl,domr->nodl", F.gelu(y), w2) + bias(channel.ffnpw2, d, m).transpose(0, 1)
    z = z + y
    assert z.shape == (4, m, d, n)
    expected = net.head.linear(z.flatten(2)).transpose(1, 2) * std + mean
    assert relative_error(model(x), expected) < 1e-12


def test_the_norm_of_variables_in_training():
    norm = RowNorm(4, 3).double().train()
    plain = nn.BatchNorm1d(4).double().train()
    x = torch.randn(5, 12, 1, 7, dtype=torch.float64)
    expected = plain(x.view(15, 4, 7)).view(x.shape)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x.view(15, 4, 7)).view(x.shape))


@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad()
def test_units_do_not_matter(affine):
    """A scaled and shifted series has the scaled and shifted forecast."""
    model, x = small(affine=affine).double(), torch.randn(2, 24, 3, dtype=torch.float64)
    if affine:
        model.model.revin_layer.affine_weight.uniform_(0.5, 1.5)
        model.model.revin_layer.affine_bias.normal_()
    scaled = model(1e3 * x - 7e3)
    torch.testing.assert_close(scaled, 1e3 * model(x) - 7e3, rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("kwargs", [{}, {"variables": 1}, {"expansion": 3, "depth": 2}, {"affine": True}])
@torch.no_grad()
def test_folds_in_float64(kwargs):
    model = small(**kwargs).double()
    fused, x = ffnet.reparameterize(model), torch.randn(2, 24, model.variables, dtype=torch.float64)
    assert relative_error(fused(x), model(x)) < 1e-10
    assert not any(isinstance(module, (nn.BatchNorm2d, BranchedRow)) for module in fused.modules())
    assert str(ffnet.reparameterize(fused)) == str(fused)
    assert fused.model.stages[0].blocks[0].channel_mixer.dw.weight.shape == (8 * model.variables, 1, 9)
    model.model.stages[0].blocks[0].token_mixer.norm.running_mean[3] += 1e-3
    assert relative_error(fused(x), model(x)) > 1e-8


@torch.inference_mode()
def test_the_published_size():
    model = randomise(ffnet.create_model("ffnet_ts")).eval()
    x = torch.randn(2, 96, 7)
    assert model(x).shape == (2, 96, 7)
    fast = ffnet_kernels.optimize(copy.deepcopy(model))
    for _ in range(3):
        assert relative_error(fast(x), model(x)) < 1e-4
    wide, model = x.double(), model.double()
    assert relative_error(ffnet.reparameterize(model)(wide), model(wide)) < 1e-10


@pytest.mark.parametrize("reparameterized", [False, True])
@torch.inference_mode()
def test_optimised(reparameterized):
    plain = small(kernel_size=51, lookback=64, dim=16)
    fast = ffnet_kernels.optimize(ffnet.reparameterize(plain) if reparameterized else copy.deepcopy(plain))
    x = torch.randn(4, 64, 3)
    for _ in range(3):
        assert relative_error(fast(x), plain(x)) < 1e-4
    operators = {row.runs_on for row in ffnet_kernels.report(fast.model.stages[0]).rows if row.is_fused}
    assert {"ffnified_attention", "depthwise_conv2d"} <= operators


def test_trains_the_same_when_optimised():
    plain = small(dim=16).train()
    fast = ffnet_kernels.optimize(copy.deepcopy(plain))
    for _ in steps_side_by_side((plain, fast), torch.randn(3, 8, 24, 3)):
        pass
    for own, other in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_exports():
    model, x = small(), torch.randn(2, 24, 3)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    torch.testing.assert_close(program(x), model(x))
    more = torch.randn(5, 24, 3)
    torch.testing.assert_close(program(more), model(more))


def test_arguments_from_weights():
    arguments = {**SMALL, "depth": 2, "expansion": 3, "affine": True, "patch": 6, "stride": 3}
    assert forecast_arguments(ForecastFFNet(**arguments).state_dict()) == arguments
    folded = ffnet.reparameterize(ForecastFFNet(**arguments)).state_dict()
    assert forecast_arguments(folded) == {**arguments, "small_kernel": 1}  # of which nothing is left
    for stride in (1, 6):  # not half of a patch of 6
        arguments |= {"stride": stride, "lookback": 12 * stride}
        assert forecast_arguments(ForecastFFNet(**arguments).state_dict(), 12 * stride) == arguments
    for lookback in (11, 13, 84):
        with pytest.raises(ValueError, match=f"12 patches of 6 steps, 1 to 6 steps apart, got {lookback}"):
            forecast_arguments(ForecastFFNet(**arguments).state_dict(), lookback)
    with pytest.raises(ValueError, match="no weights of FFNet for time series"):
        forecast_arguments(ffnet.create_model("ffnet_1", device="meta").state_dict())


def test_forecast_of_a_longer_series():
    model = small().train()
    series = torch.randn(100, 3)
    out = model.forecast(series)
    assert model.training
    assert not out.requires_grad
    torch.testing.assert_close(out, model.eval()(series[None, -24:])[0])
    series[10] = torch.nan  # which is not looked back at
    torch.testing.assert_close(model.forecast(series), out)


@pytest.mark.parametrize(("dtype", "becomes"), [(torch.float64, torch.float64), (torch.int64, torch.float32)])
def test_a_forecast_far_from_zero(dtype, becomes):
    """In float32, the model's dtype, 10⁶ steps of 0.03 apart would all be the same."""
    series = (100 * torch.randn(30, 3)).round().to(dtype)
    scale, shift = (1e-3, 1e9) if dtype == torch.float64 else (1, 10**6)
    model = small()
    far = model.forecast(series * scale + shift)
    assert far.dtype == becomes
    near = model.forecast(series * scale)
    torch.testing.assert_close(far - shift, near, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (torch.randn(23, 3), "at least the 24 steps of the look-back, got 23"),
        (torch.randn(30, 2), r"a series \[steps, 3\], got the shape \[30, 2\]"),
        (torch.randn(30), r"a series \[steps, 3\], got the shape \[30\]"),
        (torch.randn(30, 3).index_fill(0, torch.tensor([20]), torch.nan), "finite values of torch.float32, got NaN"),
        (
            torch.randn(30, 3).index_fill(0, torch.tensor([29]), torch.inf),
            "finite values of torch.float32, got NaN or infinity",
        ),
    ],
)
def test_bad_series(series, message):
    with pytest.raises(ValueError, match=message):
        small().forecast(series)


@pytest.mark.parametrize("shape", [(2, 23, 3), (2, 24, 4), (24, 3)])
def test_bad_windows(shape):
    with pytest.raises(ValueError, match=r"windows \[N, 24, 3\]"):
        small()(torch.randn(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variables": 0}, "variables >= 1, got 0"),
        ({"horizon": -1}, "horizon >= 1, got -1"),
        ({"lookback": 25}, "a lookback of 25"),
        ({"stride": 5}, "a stride of 5"),
        ({"kernel_size": 8}, "odd kernels, .* got 3 and 8"),
        ({"small_kernel": 11}, "odd kernels, .* got 11 and 9"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ForecastFFNet(**{**SMALL, **kwargs})
