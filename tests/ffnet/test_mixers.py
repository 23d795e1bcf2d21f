import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ffnet
import ffnet_kernels
from ffnet import mixers
from ffnet.layers import BranchedDepthwise, ConvBN
from ffnet.mixers import ChannelMixer, InputDependent, MetaMixer, ResidualMixer, TokenMixer


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
    residual = randomise(TokenMixer(ffnet.self_attention_mixer(4, 2), 4, layer_scale_init=0.1)).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert residual.enable_kernels() is None
    torch.testing.assert_close(residual(x), x + residual.layer_scale * residual.main(x))
    fused = ffnet.reparameterize(residual)
    assert fused.layer_scale is not None  # its last part is no plain convolution
    assert torch.equal(fused(x), residual(x))


def test_self_attention_rejects_heads():
    with pytest.raises(ValueError, match="dim=6 and heads=4"):
        ffnet.self_attention_mixer(6, 4)


def build(wrapper, kernel, **kwargs) -> ResidualMixer:
    factory = ffnet.ffnified_attention_mixer if wrapper is TokenMixer else ffnet.conv_ffn_mixer
    return randomise(wrapper(factory(4, kernel), 4, **kwargs))


@pytest.mark.parametrize("wrapper", [TokenMixer, ChannelMixer])
def test_residual_with_layer_scale(wrapper):
    mixer = build(wrapper, 3, layer_scale_init=1e-6).eval()
    assert mixer.layer_scale.shape == (4, 1, 1)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(mixer(x), x + mixer.layer_scale * mixer.main(x))
    assert [k for k in build(wrapper, 3).state_dict() if "layer_scale" in k or "drop" in k] == []


def test_layer_scale_starts_at_the_given_value():
    mixer = TokenMixer(ffnet.ffnified_attention_mixer(4), 4, layer_scale_init=1e-6)
    assert torch.equal(mixer.layer_scale, torch.full((4, 1, 1), 1e-6))


@pytest.mark.parametrize("wrapper", [TokenMixer, ChannelMixer])
def test_drop_path_drops_the_branch_only(wrapper):
    mixer = build(wrapper, 3, drop_path=0.5).train()
    x = torch.randn(64, 4, 3, 3)
    unchanged = (mixer(x) == x).flatten(1).all(1)
    assert 0 < unchanged.sum() < 64


class Recorder:
    """The operators of ffnet_kernels, with a record of the mixers' calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if name != "conv2d":  # the query projection before the mixer
                self.calls.append((name, kwargs["scale"], kwargs["residual"]))
            return getattr(ffnet_kernels, name)(*args, **kwargs)

        return call


@pytest.fixture
def kernels(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(mixers, "ffnet_kernels", recorder)
    return recorder


@pytest.mark.parametrize("wrapper", [TokenMixer, ChannelMixer])
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_enabled_kernels_compute_the_same(kernels, wrapper, kernel, scale):
    mixer = build(wrapper, kernel, layer_scale_init=scale).double().eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    fused = ffnet.reparameterize(mixer, extra_folds=False)
    tree, state = str(fused), fused.state_dict()
    assert fused.enable_kernels() == wrapper.operator
    assert str(fused) == tree
    assert all(torch.equal(value, state[key]) for key, value in fused.state_dict().items())
    assert relative_error(fused(x), mixer(x)) < 1e-13
    ((operator, used_scale, residual),) = kernels.calls
    assert operator == wrapper.operator
    assert used_scale is fused.layer_scale
    assert residual is x


@pytest.mark.parametrize("wrapper", [TokenMixer, ChannelMixer])
def test_drop_path_keeps_the_residual_out_of_the_operator(kernels, wrapper):
    mixer = ffnet.reparameterize(build(wrapper, 3, drop_path=0.5, layer_scale_init=0.1).train(), extra_folds=False)
    x = torch.randn(64, 4, 3, 3)
    with torch.random.fork_rng():
        expected = mixer(x)
    mixer.enable_kernels()
    torch.testing.assert_close(mixer(x), expected)
    assert kernels.calls[0][2] is None
    mixer.eval()(x)
    assert kernels.calls[1][2] is x


def replaced(wrapper, name, module) -> ResidualMixer:
    mixer = ffnet.reparameterize(build(wrapper, 3))
    setattr(mixer.main, name, module)
    return mixer


@pytest.mark.parametrize(
    "mixer",
    [
        lambda: build(TokenMixer, 7),
        lambda: build(ChannelMixer, 3),
        lambda: build(ChannelMixer, 7),
        lambda: replaced(TokenMixer, "act", nn.GELU("tanh")),
        lambda: replaced(ChannelMixer, "act", nn.ReLU()),
        lambda: replaced(TokenMixer, "conv1", nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)),
        lambda: replaced(TokenMixer, "conv1", nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        lambda: replaced(TokenMixer, "conv1", nn.Conv2d(4, 4, 5, padding=2, groups=4)),
        lambda: replaced(TokenMixer, "conv2", nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)),
        lambda: replaced(TokenMixer, "conv2", nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular")),
        lambda: replaced(ChannelMixer, "fc1", nn.Conv2d(4, 12, 1, bias=False)),
        lambda: replaced(ChannelMixer, "fc2", nn.Conv2d(12, 4, 1, groups=4)),
        lambda: replaced(ChannelMixer, "conv", nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)),
        lambda: TokenMixer(nn.Identity(), 4),
        lambda: ChannelMixer(nn.Identity(), 4),
    ],
)
def test_kernels_stay_off_where_the_operator_does_not_apply(mixer):
    mixer = mixer().eval()
    assert mixer.enable_kernels() is None
    assert not mixer.kernels_enabled


def test_plain_token_mixers_take_kernels_while_training(kernels):
    """Stages 0 and 1 have plain convolutions after a query projection that keeps its batch norm."""
    mixer = build(TokenMixer, 3).train()
    x = torch.randn(2, 4, 5, 5)
    expected = mixer(x)
    assert mixer.enable_kernels() == "ffnified_attention"
    torch.testing.assert_close(mixer(x), expected)
    assert len(kernels.calls) == 1
