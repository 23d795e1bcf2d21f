"""The modules: drop-ins for nn.Conv2d, copied, saved and compiled as any module is."""

import copy
import io
import pickle

import native_build
import parity
import pytest
import torch
from torch import nn

import ffnet_kernels as fk
from ffnet_kernels.selftest import error_limit

MODULES = {
    "conv": lambda: fk.DepthwiseConv2d(8, 7, activation="gelu"),
    "attention": lambda: fk.FFNifiedAttention(8, 5, layer_scale=0.5),
    "mixer": lambda: fk.ChannelMixer(8, 3, layer_scale=0.5),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train_step(module, x):
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def assert_close(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert (g - e).abs().max().item() <= error_limit(e.double(), e)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 7, "padding": 3},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 5, "padding": "valid", "bias": False},
        {"kernel_size": 3, "padding": 1, "stride": (2, 1)},
    ],
)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_from_conv_is_a_drop_in(arguments, multiplier):
    conv = nn.Conv2d(6, 6 * multiplier, groups=6, **arguments)
    module = fk.DepthwiseConv2d.from_conv(conv)
    assert isinstance(module, nn.Conv2d)
    assert module.weight is conv.weight
    assert module.state_dict().keys() == conv.state_dict().keys()
    for x in (torch.randn(2, 6, 11, 13), torch.randn(6, 11, 13)):
        out, expected = module(x), conv(x)
        double = copy.deepcopy(conv).double()(x.double())
        assert out.shape == expected.shape
        assert (out - double).abs().max().item() <= error_limit(double, expected)


def test_depthwise_conv2d_loads_a_convolutions_state():
    conv, module = nn.Conv2d(6, 12, 3, padding=1, groups=6), fk.DepthwiseConv2d(6, 3, multiplier=2)
    module.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(1, 6, 9, 9)
    double = copy.deepcopy(conv).double()(x.double())
    assert (module(x) - double).abs().max().item() <= error_limit(double, conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, groups=3),
        nn.Conv2d(6, 18, 3, groups=6),
        nn.Conv2d(6, 6, 3, groups=6, dilation=2),
        nn.Conv2d(6, 6, 3, groups=6, stride=3),
        nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="reflect"),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 6, 3, groups=6),
        nn.Identity(),
    ],
    ids=str,
)
def test_from_conv_refuses_other_layers(conv):
    assert not fk.DepthwiseConv2d.takes(conv)
    with pytest.raises(ValueError, match=r"expected a depthwise convolution.*got"):
        fk.DepthwiseConv2d.from_conv(conv)


@pytest.mark.parametrize(("kernel", "message"), [(4, "even kernel"), ((3, 2), "even kernel")])
def test_an_even_kernel_needs_a_padding(kernel, message):
    with pytest.raises(ValueError, match=message):
        fk.DepthwiseConv2d(3, kernel)


def test_an_unknown_activation_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"expected one of none, relu.*got 'tanh'"):
        fk.DepthwiseConv2d(3, 3, activation="tanh")


@every_module
def test_copies_give_the_same(make):
    module, x = make(), torch.randn(2, 8, 9, 10)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = make()
    loaded.load_state_dict(module.state_dict(), strict=True)
    expected = module(x)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), loaded)
    for other in copies:
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(module)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}


@every_module
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_modules_train_the_same(make, memory_format):
    module = make()
    x = torch.randn(3, 8, 9, 10).contiguous(memory_format=memory_format)
    expected = train_step(module, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(train_step(compiled, x), expected)


@pytest.mark.skipif(not native_build.has_compiler(), reason="inductor needs a C++ compiler")
@every_module
def test_inductor(make):
    module, x = make().eval(), torch.randn(2, 8, 9, 10)
    expected = train_step(module, x)
    assert_close(train_step(torch.compile(module, fullgraph=True), x), expected)


@every_module
def test_changing_batches_recompile_once(make):
    """The second batch size makes the batch symbolic; every further one runs that graph."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 7, 5, 2):
        x = torch.randn(batch, 8, 9, 10)
        assert_close([compiled(x)], [module(x)])
    assert counter.frame_count <= 2


@parity.needs_native
def test_a_compiled_module_follows_use_backend():
    """The operator in the graph is the backend's that was chosen when it was traced: another choice traces anew."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    module, x = fk.DepthwiseConv2d(8, 7).eval(), torch.randn(1, 8, 9, 10)
    compiled = torch.compile(module, fullgraph=True, backend=keep)
    kernel = compiled(x)
    with fk.use_backend("reference"):
        plain = compiled(x)
        assert torch.equal(plain, module(x))
    assert torch.equal(compiled(x), kernel)
    assert torch.equal(kernel, module(x))
    assert len(graphs) == 2
    assert any("ffnet_kernels" in target for target in graphs[0])
    assert not any("ffnet_kernels" in target for target in graphs[1])
