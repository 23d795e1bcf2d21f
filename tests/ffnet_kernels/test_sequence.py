"""Layers in one call: they compute what they compute one by one, and step back where they cannot."""

import copy

import parity
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sequence_cases import DTYPES, TINY, calls, one_by_one, optimized_sequential, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ffnet
import ffnet_kernels as fk
from ffnet_kernels import sequence
from ffnet_kernels.selftest import error_limit
from ffnet_kernels.sequence import Layers, Sequence

pytestmark = parity.needs_native


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def optimized():
    return optimized_sequential()


def assert_close(got, expected, plain):
    assert (got.double() - expected).abs().max().item() <= error_limit(expected, plain)


@parity.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"layer_scale_init": 0.5, "channel_kernel": 3}], ids=["plain", "scaled"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_a_model_is_one_call(isa, dtype, options, layout):
    model = tiny(dtype, **options)
    x = torch.randn(3, 3, 37, 51).to(dtype).contiguous(memory_format=layout)
    plain, exact = ffnet.reparameterize(model), ffnet.reparameterize(copy.deepcopy(model).double())
    with parity.selected_isa(isa):
        names, out = calls(fk.optimize(model), x)
    assert names == ["sequence"]
    with torch.no_grad():
        assert_close(out, exact(x.double()), plain(x))


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 17])
@pytest.mark.parametrize("norm", ["batch", "folded"])
def test_batches_of_the_head(size, norm):
    model = fk.optimize(ffnet.reparameterize(tiny()) if norm == "folded" else tiny())
    x = torch.randn(size, 3, 32, 32)
    out = calls(model, x)[1]
    assert out.shape == (size, 21)
    torch.testing.assert_close(out, one_by_one(model, x), rtol=1e-4, atol=1e-4)


def test_a_layer_norm_keeps_the_head_outside():
    names, out = calls(fk.optimize(tiny(norm="layer")), torch.randn(1, 3, 32, 32))
    assert set(names) == {"sequence"}
    assert out.shape == (1, 21)


def test_layers_are_collected_once(optimized):
    model, x = fk.optimize(tiny(layer_scale_init=0.5)), torch.randn(1, 3, 32, 32)
    for module, map_ in ((optimized, torch.randn(2, 6, 15, 11)), (model, x)):
        calls(module, map_)
        layers = module.__dict__[sequence._COLLECTED].layers
        calls(module, map_)
        assert module.__dict__[sequence._COLLECTED].layers is layers


def test_a_sequential_is_one_call(optimized):
    x = torch.randn(2, 6, 15, 11)
    names, out = calls(optimized, x)
    assert names == ["sequence"]
    torch.testing.assert_close(out, one_by_one(optimized, x), rtol=1e-5, atol=1e-5)


@st.composite
def pairs(draw):
    size = draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 24)), draw(st.integers(1, 40))
    one = {"outputs": draw(st.sampled_from([1, 2, 15, 32, 40])), "kernel": draw(st.sampled_from([1, 3, (3, 2)]))}
    two = {"outputs": draw(st.sampled_from([1, 16, 33, 48])), "kernel": draw(st.sampled_from([1, 2, 3, (5, 1), 7]))}
    for options in (one, two):
        options |= {
            "stride": draw(st.sampled_from([1, 2, (2, 1)])),
            "padding": draw(st.sampled_from([0, 1, (2, 4), (0, 25)])),
        }
    return (
        size,
        one,
        two,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(parity.LAYOUTS)),
        draw(st.integers(0, 99)),
    )


@given(pairs())
def test_two_convolutions_in_a_row(case):
    """An image's are computed without the map between them."""
    size, one, two, dtype, layout, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = parity.laid_out(size, layout, generator, dtype=dtype)
    convolutions = []
    for inputs, options in ((size[1], one), (one["outputs"], two)):
        conv = nn.Conv2d(inputs, options["outputs"], options["kernel"], options["stride"], options["padding"])
        for parameter in conv.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        convolutions.append(conv.to(dtype).requires_grad_(False))
    first, second = convolutions

    def exact(x, conv):
        bias = conv.bias.double()
        return F.conv2d(x.double(), conv.weight.double(), bias, conv.stride, conv.padding)

    layers = Layers()
    layers.conv2d(first.weight, first.bias, stride=first.stride, padding=first.padding, activation="gelu")
    layers.conv2d(second.weight, second.bias, stride=second.stride, padding=second.padding, activation="relu")
    try:
        plain = F.relu(second(F.gelu(first(x))))
    except RuntimeError:  # a map smaller than a filter
        with pytest.raises(RuntimeError, match=r"smaller than the kernel|height and width"):
            layers.run(x)
        return
    expected = F.relu(exact(F.gelu(exact(x, first)).to(dtype), second))
    for isa in parity.ISAS:
        with parity.selected_isa(isa):
            out = layers.run(x)
        assert out.shape == expected.shape
        assert out.dtype == dtype
        if out.numel():
            assert_close(out, expected, plain)


# ---- where it does not apply ----------------------------------------------------------------------------------------


def test_gradients_go_layer_by_layer(optimized):
    x = torch.randn(2, 6, 15, 11)
    optimized(x).sum().backward()
    assert all(parameter.grad is not None for parameter in optimized.parameters())


def test_autocast_goes_layer_by_layer(optimized):
    with torch.autocast("cpu", torch.bfloat16):
        names, out = calls(optimized, torch.randn(2, 6, 15, 11))
    assert "sequence" not in names
    assert out.dtype == torch.bfloat16


def test_a_forced_backend_goes_layer_by_layer(optimized):
    with fk.use_backend("reference"):
        assert calls(optimized, torch.randn(2, 6, 15, 11))[0] == []


def test_compile_sees_the_layers(optimized):
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        compiled = torch.compile(optimized, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), optimized(x), rtol=1e-5, atol=1e-5)


def test_a_trace_holds_the_layers(optimized):
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        expected = optimized(x)
        traced = torch.jit.trace(optimized, (x,))
        torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_layers(optimized):
    with torch.no_grad(), Recorded() as recorded:
        optimized(torch.randn(2, 6, 15, 11))
    assert {"conv2d", "depthwise_conv2d", "channel_mixer"} <= set(recorded.names)


@pytest.mark.parametrize("layers", [[], [nn.Identity(), nn.Dropout()], [nn.Conv2d(6, 4, 1)]], ids=len)
def test_what_is_not_worth_a_call_stays(layers):
    assert type(fk.optimize(nn.Sequential(*layers).eval())) is nn.Sequential


def test_a_layer_with_two_homes_stays_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(fk.ChannelMixer(6, 3), fk.ChannelMixer(6, 5))
            self.b, self.none = self.a, None

        def forward(self, x):
            return self.a(x) + self.b(x)

    optimized = fk.optimize(Shared().eval())
    assert type(optimized.a) is Sequence
    assert optimized.a is optimized.b


def test_an_absent_layer_is_left_to_the_module():
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1))
    model._modules["2"] = None
    assert type(fk.optimize(model.eval())) is nn.Sequential


def test_the_format_is_that_of_the_layers():
    layers = Layers()
    layers.conv2d(torch.ones(1, 3, 3, 3), None, padding=1)
    layers.conv2d(torch.ones(8, 1, 3, 3), None, padding=9)
    for x in (torch.ones(2, 3, 1, 1), torch.ones(0, 3, 4, 4)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            middle = fk.conv2d(x, torch.ones(1, 3, 3, 3), padding=1)
            with torch.no_grad():
                assert layers.run(x).stride() == fk.conv2d(middle, torch.ones(8, 1, 3, 3), padding=9).stride()


@pytest.mark.parametrize("threads", [2, 16])
@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [((1, 3, 16, 8192), 3, 8), ((1, 3, 1, 64), (1, 3), (0, 150)), ((2, 1, 5, 40), 2, 30), ((1, 3, 4096, 2), 3, (1, 9))],
)
def test_padding_wider_than_a_task(size, kernel, padding, threads):
    """Tasks of the second convolution that read nothing but its padding."""
    first, second = nn.Conv2d(size[1], 4, kernel, padding="same"), nn.Conv2d(4, 8, kernel, padding=padding)
    layers, x, before = Layers(), torch.randn(size), torch.get_num_threads()
    layers.conv2d(first.weight, first.bias, padding="same", activation="relu")
    layers.conv2d(second.weight, second.bias, padding=padding)
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            torch.testing.assert_close(layers.run(x), second(F.relu(first(x))), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_functional_call_is_obeyed(optimized):
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        optimized(x)
        state = {name: 2 * value for name, value in optimized.state_dict().items()}
        out = torch.func.functional_call(optimized, state, (x,))
        optimized.load_state_dict(state)
        torch.testing.assert_close(out, optimized(x), rtol=1e-5, atol=1e-5)


def test_a_class_with_a_forward_of_its_own_is_called():
    class Louder(fk.ChannelMixer):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(1, 8, 6, 6)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Louder(8, 3)).eval()
    optimized = fk.optimize(model)
    assert type(optimized) is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


class TwiceFeatures(ffnet.FFNet):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


def test_a_derived_model_runs_its_own_methods():
    model = TwiceFeatures(**TINY).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fk.optimize(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 5, 8, 8), "to have 6 channels, but got 5"),
        (torch.ones(2, 6, 8, 8, dtype=torch.bfloat16), "should be the same"),
        (torch.ones(8, 8), "[Ee]xpected 3D .* or 4D"),
    ],
)
def test_what_is_wrong_is_said_as_by_plain_pytorch(optimized, x, message):
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        optimized(x)


def test_a_map_without_batch_is_taken(optimized):
    x = torch.randn(6, 15, 11)
    with torch.no_grad():
        torch.testing.assert_close(optimized[:1](x), optimized[:1](x[None])[0])


def numbers(kind, activation=0, residual=0, stride=(1, 1), padding=(0, 0, 0, 0)):
    return [kind, activation, residual, *stride, *padding]


MAP, WEIGHT, HEAD = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 1, 1), [None] * 4


@pytest.mark.parametrize(
    ("tensors", "layers", "message"),
    [
        ([], [], "numbers"),
        ([WEIGHT, None], numbers(0)[:-1], "numbers"),
        ([WEIGHT, None], numbers(7), "unknown operator"),
        ([WEIGHT, None], numbers(-1), "unknown operator"),
        ([WEIGHT, None], numbers(0, activation=5), "unknown activation"),
        ([WEIGHT, None], numbers(0, activation=-1), "unknown activation"),
        ([WEIGHT], numbers(0), "expected 2 tensors"),
        ([WEIGHT, None, None], numbers(0), "expected 2 tensors"),
        ([WEIGHT, None, WEIGHT], numbers(0) * 2, "expected 4 tensors"),
        ([None, None], numbers(0), "lacks a weight"),
        ([None, None], numbers(1), "lacks a weight"),
        ([None] * 7, numbers(2), "lacks a weight"),
        ([None] * 7, numbers(3), "lacks a weight"),
        ([None] * 6, numbers(4), "lacks a weight"),
        ([WEIGHT, None], numbers(0, stride=(3, 1)), "stride"),
        ([WEIGHT, None], numbers(0, padding=(-1, 0, 0, 0)), "padding"),
        ([WEIGHT.double(), None], numbers(0), "dtype"),
        ([WEIGHT, torch.ones(3)], numbers(0), "4 elements"),
        ([torch.ones(4, 3, 1, 1), None], numbers(0), "shape"),
        ([*HEAD, torch.ones(2, 3), None], numbers(4), "columns"),
        ([*HEAD, torch.ones(2, 4), torch.ones(3)], numbers(4), "2 elements"),
        ([torch.ones(4), None, None, None, torch.ones(2, 4), None], numbers(4), "all of its tensors or none"),
        ([*[torch.ones(3)] * 4, torch.ones(2, 4), None], numbers(4), "4 elements"),
        ([*HEAD, torch.ones(2, 4), None, WEIGHT, None], numbers(4) + numbers(0), "4-dimensional"),
    ],
)
def test_a_raw_call_is_checked(tensors, layers, message):
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.ffnet_kernels.sequence(MAP, tensors, layers, 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_pixel_shows_where_it_does_without(value):
    model = fk.optimize(tiny()).eval()
    x = torch.randn(2, 3, 32, 32)
    x[0, 1, 3, 5] = value
    out = calls(model, x)[1]
    assert torch.equal(out.isfinite(), one_by_one(model, x).isfinite())
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype):
    model, x = fk.optimize(tiny(dtype)), torch.randn(3, 3, 61, 47).to(dtype)
    threads, outputs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outputs.append(calls(model, x)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, outputs[0]) for out in outputs)
