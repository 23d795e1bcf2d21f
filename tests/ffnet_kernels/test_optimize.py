"""optimize(model): which layers it replaces, which it must not, and that the result computes and trains the same."""

import copy

import parity
import pytest
import torch
from torch import nn

import ffnet
import ffnet_kernels as fk
from ffnet_kernels.selftest import error_limit


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def depthwise(channels=8, kernel=7, **options):
    return nn.Conv2d(
        channels, channels * options.pop("multiplier", 1), kernel, padding=kernel // 2, groups=channels, **options
    )


def reported(model):
    return [tuple(replacement) for replacement in model.kernel_replacements]


def assert_same(optimized, model, x):
    """Outputs and gradients, by the relative rule."""

    def step(model, x):
        x = x.detach().clone().requires_grad_()
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        return {"out": out.detach(), "input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}

    double = copy.deepcopy(model).double()
    got, eager, expected = step(optimized, x), step(model, x), step(double, x.double())
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max().item()
        assert error <= error_limit(expected[name], eager[name]), name


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dwconv = depthwise(channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.act(self.pwconv1(y))).permute(0, 3, 1, 2)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = depthwise(), nn.GELU()

    def forward(self, x):
        y = self.conv(x)
        return self.act(y) + y


class CalledTwice(UsedTwice):
    def forward(self, x):
        return self.act(self.conv(self.act(self.conv(x))))


class Branching(UsedTwice):
    def forward(self, x):
        return self.act(self.conv(x)) if x.sum() > 0 else self.conv(x)


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.act = depthwise(), depthwise(), nn.GELU()

    def forward(self, x):
        return self.act(self.conv2(self.act(self.conv1(x))))


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"), (nn.SiLU(), "silu")],
)
@pytest.mark.parametrize("options", [{}, {"multiplier": 2, "stride": 2}, {"kernel": 3, "bias": False}])
@pytest.mark.parametrize("training", [False, True])
def test_a_following_activation_is_fused(activation, name, options, training):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), depthwise(**options), activation, nn.Flatten()).train(training)
    optimized = fk.optimize(model)
    dense = [] if training else [("0", "conv2d")]
    assert reported(optimized) == [*dense, ("1", f"depthwise_conv2d + {name}")]
    assert isinstance(optimized[1], fk.DepthwiseConv2d)
    assert optimized[1].activation == name
    assert isinstance(optimized[2], nn.Identity)
    assert_same(optimized, model, torch.randn(2, 3, 13, 11))


@pytest.mark.parametrize("make", [UsedTwice, CalledTwice, Branching, SharedActivation, lambda: ConvNeXtBlock(8)])
def test_an_activation_that_reads_something_else_stays(make):
    model = make().eval()
    optimized = fk.optimize(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert reported(optimized) == [(name, "depthwise_conv2d") for name in convolutions]
    assert isinstance(optimized.act, nn.GELU)
    assert_same(optimized, model, torch.randn(2, 8, 13, 11))


def test_a_shared_activation_instance_stays():
    act = nn.GELU()
    model = nn.Sequential(depthwise(), act, depthwise(), act)
    optimized = fk.optimize(model)
    assert reported(optimized) == [("0", "depthwise_conv2d"), ("2", "depthwise_conv2d")]
    assert_same(optimized, model, torch.randn(1, 8, 9, 9))


@pytest.mark.parametrize("hooked", [0, 1])
def test_hooks_are_kept_and_prevent_fusion(hooked):
    seen = []
    model = nn.Sequential(depthwise(), nn.GELU())
    model[hooked].register_forward_hook(lambda module, args, out: seen.append(out))
    optimized, x = fk.optimize(model), torch.randn(1, 8, 9, 9)
    assert reported(optimized) == [("0", "depthwise_conv2d")]
    model(x)
    optimized(x)
    assert len(seen) == 2
    assert (seen[0] - seen[1]).abs().max().item() <= error_limit(seen[0].double(), seen[0])


@pytest.mark.parametrize("hooked", [0, 1])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_called(hooked, register):
    """A hook sees the gradient of its own layer: a fused layer has none of the convolution alone."""
    seen = []
    model = nn.Sequential(depthwise(), nn.GELU())
    getattr(model[hooked], register)(lambda module, *grads: seen.append(grads[-1][0]))
    optimized = fk.optimize(model)
    for m in (model, optimized):
        m(torch.ones(1, 8, 9, 9)).sum().backward()
    assert len(seen) == 2
    assert (seen[0] - seen[1]).abs().max().item() <= error_limit(seen[0].double(), seen[0])


def test_other_layers_stay():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 24, 3, groups=8),
        nn.Conv2d(24, 24, 3, groups=24, dilation=2),
        nn.Conv2d(24, 24, 3, groups=24, padding=1, padding_mode="circular"),
        nn.Conv2d(24, 24, 3, groups=24, stride=3),
        nn.GELU(),
    )
    optimized = fk.optimize(model)
    assert reported(optimized) == []
    assert [type(m) for m in optimized] == [type(m) for m in model]


def test_the_model_may_be_a_convolution():
    model = depthwise(kernel=3)
    optimized = fk.optimize(model)
    assert reported(optimized) == [("", "depthwise_conv2d")]
    assert_same(optimized, model, torch.randn(1, 8, 9, 9))


@pytest.mark.parametrize("training", [False, True])
def test_the_original_is_untouched(training):
    model = nn.Sequential(ConvNeXtBlock(8), depthwise(), nn.GELU()).train(training)
    state = {name: (t, t.clone(), t.stride()) for name, t in model.state_dict(keep_vars=True).items()}
    text = repr(model)
    optimized = fk.optimize(model)
    optimized(torch.randn(1, 8, 9, 9)).sum().backward()
    assert repr(model) == text
    assert not hasattr(model, "kernel_replacements")
    assert optimized.training == training
    for name, tensor in model.state_dict(keep_vars=True).items():
        same, values, stride = state[name]
        assert tensor is same
        assert tensor.grad is None
        assert tensor.stride() == stride
        assert torch.equal(tensor, values)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in optimized.parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_state_dicts_go_both_ways(training):
    model, other = (nn.Sequential(ConvNeXtBlock(8), depthwise(), nn.GELU()).train(training) for _ in range(2))
    optimized = fk.optimize(model)
    optimized.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(1, 8, 9, 9)
    assert_same(optimized, other, x)
    model.load_state_dict(optimized.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


@parity.needs_native
def test_eval_weights_lie_as_the_kernels_read_them():
    optimized = fk.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), depthwise(), nn.BatchNorm2d(8)).eval())
    assert optimized[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert optimized[1].weight.stride() == (1, 392, 56, 8)


def test_optimizing_twice_changes_nothing_more():
    model = nn.Sequential(depthwise(), nn.GELU()).eval()
    once = fk.optimize(model)
    twice, x = fk.optimize(once), torch.randn(1, 8, 9, 9)
    assert reported(twice) == []
    assert torch.equal(twice(x), once(x))


@pytest.mark.parametrize("training", [False, True])
def test_an_ffnet(training):
    model = ffnet.FFNet((1, 1, 1), (8, 16, 32), token_kernels=(3, 5, 7), stem_width=8, num_classes=5).train(training)
    x = torch.randn(2, 3, 64, 64)
    double = copy.deepcopy(model).double()(x.double())
    eager = copy.deepcopy(model)(x)
    optimized = fk.optimize(model)
    operators = [operator for _, operator in reported(optimized)]
    if training:
        assert operators
    else:
        assert {"ffnified_attention", "channel_mixer"} <= set(operators)
    error = (optimized(x).double() - double).abs().max().item()
    assert error <= error_limit(double, eager)
