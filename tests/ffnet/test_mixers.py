import copy

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.layers import BranchedDepthwise, ConvBN
from ffnet.mixers import InputDependent, MetaMixer, ResidualMixer


def test_frame_composes_its_parts_and_hands_the_input_to_those_that_depend_on_it():
    class PlusInput(InputDependent):
        def forward(self, z, x):
            return z + 10 * x

    mixer = MetaMixer(
        query=("twice", nn.Linear(1, 1, bias=False)),
        interaction=("plus", PlusInput()),
        activation=("act", nn.ReLU()),
        aggregation=("plus2", PlusInput()),
    )
    nn.init.constant_(mixer.twice.weight, 2.0)
    x = torch.tensor([[3.0], [-1.0]])
    assert mixer(x).tolist() == [[66.0], [-10.0]]  # relu(2x + 10x) + 10x
    assert mixer.part("query") is mixer.twice
    assert list(dict(mixer.named_children())) == ["twice", "plus", "act", "plus2"]


def test_frame_rejects_two_parts_of_one_name():
    parts = {role: ("part", nn.Identity()) for role in ("query", "interaction", "activation", "aggregation")}
    with pytest.raises(ValueError, match="names of their own"):
        MetaMixer(**parts)


@pytest.mark.parametrize("kernel", [3, 7])
def test_ffnified_attention_row(kernel):
    mixer = randomise(ffnet.ffnified_attention_mixer(6, kernel)).double().eval()
    assert list(dict(mixer.named_children())) == ["fc", "conv1", "act", "conv2"]
    assert isinstance(mixer.conv1, BranchedDepthwise if kernel == 7 else nn.Conv2d)
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    fused = ffnet.reparameterize(mixer)
    key, value, pad = fused.conv1, fused.conv2, kernel // 2
    q = F.conv2d(x, fused.fc.weight, fused.fc.bias)
    hidden = F.gelu(F.conv2d(q, key.weight, key.bias, padding=pad, groups=6))
    assert relative_error(mixer(x), F.conv2d(hidden, value.weight, value.bias, padding=pad, groups=6)) < 1e-13


@pytest.mark.parametrize("kernel", [3, 7])
def test_conv_ffn_row(kernel):
    mixer = randomise(ffnet.conv_ffn_mixer(6, kernel, expansion=2)).double().eval()
    assert list(dict(mixer.named_children())) == ["conv", "fc1", "act", "fc2"]
    assert isinstance(mixer.conv, BranchedDepthwise if kernel == 7 else ConvBN)
    assert mixer.fc1.out_channels == 12
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    fused = ffnet.reparameterize(mixer)
    y = F.conv2d(x, fused.conv.weight, fused.conv.bias, padding=kernel // 2, groups=6)
    y = F.conv2d(F.gelu(F.conv2d(y, fused.fc1.weight, fused.fc1.bias)), fused.fc2.weight, fused.fc2.bias)
    assert relative_error(mixer(x), y) < 1e-13


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_self_attention_row(batch, height, width, heads, head_dim):
    dim = heads * head_dim
    mixer = randomise(ffnet.self_attention_mixer(dim, heads)).double()
    x = torch.randn(batch, dim, height, width, dtype=torch.float64)

    def tokens(conv):
        return conv(x).flatten(2).unflatten(1, (heads, head_dim)).transpose(2, 3)

    expected = F.scaled_dot_product_attention(tokens(mixer.q), tokens(mixer.k.proj), tokens(mixer.v.proj))
    expected = expected.transpose(2, 3).reshape(x.shape)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-12)


def test_self_attention_works_as_a_token_mixer():
    residual = randomise(ResidualMixer(ffnet.self_attention_mixer(4, 2), 4, layer_scale_init=0.1)).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(residual(x), x + residual.layer_scale * residual.main(x))
    fused = ffnet.reparameterize(residual)
    assert fused.layer_scale is not None  # its last part is no plain convolution
    assert torch.equal(fused(x), residual(x))


def test_self_attention_rejects_heads():
    with pytest.raises(ValueError, match="dim=6 and heads=4"):
        ffnet.self_attention_mixer(6, 4)


MIXERS = {"ffnified_attention": ffnet.ffnified_attention_mixer, "channel_mixer": ffnet.conv_ffn_mixer}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def build(mixer, kernel, **kwargs) -> ResidualMixer:
    return randomise(ResidualMixer(MIXERS[mixer](4, kernel), 4, **kwargs))


@every_mixer
def test_residual_with_layer_scale(mixer):
    plain = build(mixer, 3)
    mixer = build(mixer, 3, layer_scale_init=1e-6).eval()
    assert mixer.layer_scale.shape == (4, 1, 1)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(mixer(x), x + mixer.layer_scale * mixer.main(x))
    assert [k for k in plain.state_dict() if "layer_scale" in k or "drop" in k] == []


def test_layer_scale_starts_at_the_given_value():
    mixer = ResidualMixer(ffnet.ffnified_attention_mixer(4), 4, layer_scale_init=1e-6)
    assert torch.equal(mixer.layer_scale, torch.full((4, 1, 1), 1e-6))


@every_mixer
def test_drop_path_drops_the_branch_only(mixer):
    mixer = build(mixer, 3, drop_path=0.5).train()
    x = torch.randn(64, 4, 3, 3)
    unchanged = (mixer(x) == x).flatten(1).all(1)
    assert 0 < unchanged.sum() < 64


def fused(model) -> list[str]:
    """The operators that an optimised model has run on."""
    return [row.runs_on for row in ffnet_kernels.report(model).rows if row.is_fused]


@every_mixer
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("reparameterized", [False, True])
@torch.no_grad()
def test_an_optimised_mixer_computes_the_same(mixer, kernel, scale, reparameterized):
    plain = build(mixer, kernel, layer_scale_init=scale, drop_path=0.5).double().eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    fast = ffnet.reparameterize(plain, extra_folds=False) if reparameterized else copy.deepcopy(plain)
    tree = str(fast)
    ffnet_kernels.optimize(fast)
    for _ in range(2):
        assert relative_error(fast(x), plain(x)) < 1e-13
    assert str(fast) == tree
    assert fused(fast)[-1] == mixer
    assert len(fused(fast)) == {"ffnified_attention": 2, "channel_mixer": 1}[mixer]


@every_mixer
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("reparameterized", [False, True])
def test_an_optimised_mixer_trains_the_same(mixer, kernel, scale, drop_path, reparameterized):
    """From the second step on: in the first the modules run, which tells how results lie in memory."""
    plain = build(mixer, kernel, layer_scale_init=scale, drop_path=drop_path).train()
    plain = ffnet.reparameterize(plain, extra_folds=False) if reparameterized else plain
    fast = ffnet_kernels.optimize(copy.deepcopy(plain))
    for step in range(3):
        x = torch.randn(16, 4, 6, 5)
        outs, states = [], []
        for model in (plain, fast):
            torch.manual_seed(step)
            outs.append(model(x))
            states.append(torch.get_rng_state())
            model.zero_grad()
            outs[-1].square().mean().backward()
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(*states)
        for own, other in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-4)
    for own, other in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert fused(fast)


def replaced(mixer, name, module) -> ResidualMixer:
    model = ffnet.reparameterize(build(mixer, 3))
    setattr(model.main, name, module)
    return randomise(model)


@pytest.mark.parametrize(
    ("make", "operator"),
    [
        (lambda: replaced("ffnified_attention", "act", nn.GELU("tanh")), "ffnified_attention"),
        (lambda: replaced("channel_mixer", "act", nn.ReLU()), "channel_mixer"),
        (
            lambda: replaced("ffnified_attention", "conv1", nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)),
            "ffnified_attention",
        ),
        (lambda: replaced("ffnified_attention", "conv1", nn.Conv2d(4, 4, 3, padding=1, groups=2)), None),
        (lambda: replaced("ffnified_attention", "conv1", nn.Conv2d(4, 4, 5, padding=2, groups=4)), None),
        (lambda: replaced("ffnified_attention", "conv2", nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)), None),
        (
            lambda: replaced(
                "ffnified_attention", "conv2", nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular")
            ),
            None,
        ),
        (lambda: replaced("channel_mixer", "fc1", nn.Conv2d(4, 12, 1, bias=False)), "channel_mixer"),
        (lambda: replaced("channel_mixer", "fc2", nn.Conv2d(12, 4, 1, groups=4)), None),
        (lambda: replaced("channel_mixer", "conv", nn.Conv2d(4, 4, 3, padding=1)), None),
        (lambda: ResidualMixer(nn.Conv2d(4, 4, 1), 4), None),
    ],
)
@torch.no_grad()
def test_mixers_of_other_parts(make, operator):
    plain = make().double().eval()
    fast, x = ffnet_kernels.optimize(copy.deepcopy(plain)), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for _ in range(2):
        assert relative_error(fast(x), plain(x)) < 1e-13
    assert [name for name in fused(fast) if name in MIXERS] == ([operator] if operator else [])
