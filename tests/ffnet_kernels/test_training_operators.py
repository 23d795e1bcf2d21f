"""Operators of training steps: results, gradients and running statistics against plain modules in float64."""

import copy

import parity
import pytest
import torch
import torch.utils._python_dispatch
from torch import nn

import ffnet_kernels as fk
from ffnet_kernels import training
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.ops import _operator
from ffnet_kernels.ops.channel_mixer import pointwise_reference
from ffnet_kernels.selftest import error_limit

BRANCHES = {
    "7x7 and 3x3": {"kernels": (7, 3)},
    "one 3x3": {"kernels": (3,)},
    "any size": {"kernels": (5, (1, 3))},
    "stride 2, two outputs": {"kernels": (7, 3), "stride": 2, "multiplier": 2},
    "stride 2": {"kernels": (3,), "stride": (2, 1)},
}
SHAPES = {"vectors": (2, 32, 16, 16), "odd": (3, 21, 9, 7), "small": (4, 5, 2, 3), "wide": (1, 17, 5, 70)}


def random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def branches(channels, kernels, stride=1, multiplier=1, **norm_options):
    pairs = []
    for i, kernel in enumerate(kernels):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel)
        outputs = channels * multiplier
        conv = nn.Conv2d(channels, outputs, kernel, stride, padding, groups=channels, bias=False)
        norm = nn.BatchNorm2d(outputs, **norm_options)
        with torch.no_grad():
            conv.weight.copy_(random(*conv.weight.shape, seed=i) / max(kernel))
            if norm.affine:
                norm.weight.copy_(random(outputs, seed=10 + i).abs() + 0.5)
                norm.bias.copy_(random(outputs, seed=20 + i))
        pairs.append((conv, norm))
    return nn.ModuleList(nn.ModuleList(pair) for pair in pairs)


def branched(x, layers, activation="none"):
    """The operator on (convolution, normalisation) pairs."""
    convs, norms = zip(*layers, strict=True)
    own = [training.Norm.of(norm) for norm in norms]
    return training.branched_depthwise(x, [conv.weight for conv in convs], own, convs[0].stride, activation)


def normed(x, norm, activation="none"):
    return training.batch_norm(x, training.Norm.of(norm), activation)


def plain(x, layers, activation):
    outputs = [norm(conv(x)) for conv, norm in layers]
    return fk.backends.activations.ACTIVATE[activation](sum(outputs[1:], outputs[0]))


def results(function, tensors, seed=5):
    """The output and the gradient of every tensor, for a random gradient of the output."""
    tensors = [t.requires_grad_() for t in tensors]
    out = function()
    grad = random(*out.shape, seed=seed).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def step(function, x, layers, activation, dtype=torch.float32):
    """Everything a training step makes of the layers, which are copied first."""
    layers = copy.deepcopy(layers).to(dtype)
    x = x.detach().to(dtype)
    found = results(lambda: function(x, layers, activation), [x, *layers.parameters()])
    return found, [b for b in layers.buffers() if b.dim()], [b for b in layers.buffers() if not b.dim()]


def assert_close(found, expected, eager):
    for i, (a, r, e) in enumerate(zip(found, expected, eager, strict=True)):
        assert a.shape == r.shape
        assert a.dtype == e.dtype
        error = (a.double() - r).abs().max().item()
        assert error <= error_limit(r, e), f"result {i}: {error}"


@parity.needs_native
@parity.every_isa
@pytest.mark.parametrize("options", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_branched_depthwise(options, activation, shape, isa):
    layers = branches(shape[1], **options)
    x = parity.laid_out(shape, "channels_last", torch.Generator().manual_seed(1)) + 0.5
    expected, statistics, counts = step(plain, x, layers, activation, torch.float64)
    eager, eager_statistics, _ = step(plain, x, layers, activation)
    with parity.selected_isa(isa), parity.poisoned_memory(), fk.use_backend("cpu"):
        found, own_statistics, own_counts = step(branched, x, layers, activation)
    assert_close(found, expected, eager)
    assert_close(own_statistics, statistics, eager_statistics)
    assert own_counts == counts


@parity.needs_native
@pytest.mark.parametrize("layout", parity.LAYOUTS)
def test_any_layout(layout):
    x = parity.laid_out((2, 19, 8, 9), layout, torch.Generator().manual_seed(1))
    layers = branches(19, (7, 3))
    expected, eager = (step(plain, x, layers, "gelu", dtype)[0] for dtype in (torch.float64, torch.float32))
    assert_close(step(branched, x, layers, "gelu")[0], expected, eager)


@parity.needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    layers, x = branches(18, (5, 3)), random(2, 18, 6, 7)
    expected, eager = (step(plain, x, layers, activation, dtype)[0] for dtype in (torch.float64, torch.float32))
    assert_close(step(branched, x, layers, activation)[0], expected, eager)


@parity.needs_native
def test_statistics_far_from_zero():
    """A sum of squares would lose the variance of values around 1000."""
    layers, x = branches(16, (1,)), random(4, 16, 12, 12) + 1000
    _, statistics, _ = step(plain, x, layers, "none", torch.float64)
    _, eager, _ = step(plain, x, layers, "none")
    _, found, _ = step(branched, x, layers, "none")
    assert_close(found, statistics, eager)


@parity.needs_native
@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}])
def test_running_statistics_as_configured(options):
    layers = branches(6, (3,), **options)
    twin = copy.deepcopy(layers)
    for seed in range(3):
        x = random(2, 6, 7, 7, seed=seed)
        branched(x, layers)
        plain(x, twin, "none")
    for (name, own), other in zip(layers.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


IN_PLAIN_PYTORCH = {
    "float64": lambda x, layers: (x.double(), layers.double()),
    "one pixel": lambda x, layers: (x[:1, :, :1, :1].repeat(2, 1, 1, 1), layers),
    "not affine": lambda x, layers: (x, branches(6, (3, 1), affine=False)),
}


@pytest.mark.parametrize("change", IN_PLAIN_PYTORCH.values(), ids=IN_PLAIN_PYTORCH)
def test_branches_in_plain_pytorch(change):
    x, layers = change(random(2, 6, 7, 7), branches(6, (3, 1)))
    twin = copy.deepcopy(layers)
    out, expected = branched(x, layers, "gelu"), plain(x, twin, "gelu")
    torch.testing.assert_close(out, expected)
    for own, other in zip(layers.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other)


def test_the_reference_backend_runs_plain_pytorch(monkeypatch):
    layers, x = branches(6, (3, 1)), random(2, 6, 7, 7)
    monkeypatch.setattr(_operator, "call", None)  # no native call
    with fk.use_backend("reference"):
        branched(x, layers)


@parity.needs_native
def test_autocast_gives_maps_of_its_dtype():
    layers, x = branches(6, (3, 1)), random(2, 6, 7, 7)
    expected, double = step(plain, x, layers, "gelu"), step(plain, x, layers, "gelu", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        eager, found = (step(function, x, layers, "gelu") for function in (plain, branched))
    assert found[0][0].dtype == eager[0][0].dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found[0][1:]] == [gradient.dtype for gradient in expected[0][1:]]
    for own, other, exact in zip(found[0], eager[0], double[0], strict=True):
        assert (own.double() - exact).abs().max() <= error_limit(exact, other.bfloat16())


def test_too_few_values_are_refused_as_batch_normalisation_does():
    with pytest.raises(ValueError, match="more than 1 value"):
        branched(random(1, 6, 1, 1), branches(6, (3,)))


def norm_layer(channels, **options):
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        norm.weight.copy_(random(channels, seed=10))
        norm.bias.copy_(random(channels, seed=20))
    return norm


def norm_step(function, x, norm, activation, dtype=torch.float32):
    """As `step`, of one normalisation."""
    return step(
        lambda x, norms, activation: function(x, norms[0], activation), x, nn.ModuleList([norm]), activation, dtype
    )


def plain_norm(x, norm, activation):
    return fk.backends.activations.ACTIVATE[activation](norm(x))


# Chunks of unlike sizes, blocks that end early, and one pixel more than a value needs.
NORM_SHAPES = {**SHAPES, "chunks": (3, 35, 54, 62), "two values": (2, 3, 1, 1)}


@parity.needs_native
@parity.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES)
def test_batch_norm(activation, shape, isa):
    norm, x = norm_layer(shape[1]), random(*shape) + 0.5
    expected, statistics, counts = norm_step(plain_norm, x, norm, activation, torch.float64)
    eager, eager_statistics, _ = norm_step(plain_norm, x, norm, activation)
    for formats in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=formats)
        with parity.selected_isa(isa), parity.poisoned_memory(), fk.use_backend("cpu"):
            found, own_statistics, own_counts = norm_step(normed, laid_out, norm, activation)
        assert_close(found, expected, eager)
        assert_close(own_statistics, statistics, eager_statistics)
        assert own_counts == counts


@parity.needs_native
@parity.every_isa
def test_batch_norm_of_values_far_from_zero(isa):
    norm, x = norm_layer(16), random(4, 16, 12, 12) + 1000
    expected, statistics, _ = norm_step(plain_norm, x, norm, "none", torch.float64)
    eager, eager_statistics, _ = norm_step(plain_norm, x, norm, "none")
    with parity.selected_isa(isa), fk.use_backend("cpu"):
        found, own_statistics, _ = norm_step(normed, x, norm, "none")
    assert_close(own_statistics, statistics, eager_statistics)
    assert_close(found, expected, eager)


@parity.needs_native
def test_batch_norm_shows_what_is_not_a_number():
    norm = norm_layer(5)
    for value in (float("nan"), float("inf")):
        x = random(2, 5, 6, 6)
        x[1, 2, 3, 3] = value
        found, expected = normed(x, copy.deepcopy(norm)), copy.deepcopy(norm)(x)
        torch.testing.assert_close(found, expected, equal_nan=True)


@parity.needs_native
@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}])
def test_running_statistics_of_a_norm_as_configured(options):
    norm = norm_layer(6, **options)
    twin = copy.deepcopy(norm)
    for seed in range(3):
        x = random(2, 6, 7, 7, seed=seed)
        normed(x, norm)
        twin(x)
    for (name, own), other in zip(norm.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


@parity.needs_native
def test_parameters_of_a_norm_in_any_layout():
    norm, x = norm_layer(7), random(2, 7, 5, 6)
    with torch.no_grad():
        norm.weight = nn.Parameter(random(7, 2)[:, 0])
        norm.bias = nn.Parameter(random(1).expand(7))
    torch.testing.assert_close(normed(x, norm, "gelu"), plain_norm(x, norm, "gelu"))
    conv = nn.Conv2d(7, 7, 3, 1, 1, groups=7, bias=False)
    torch.testing.assert_close(branched(x, [(conv, norm)]), norm(conv(x)))


@parity.needs_native
def test_batch_norm_gives_only_the_gradients_that_are_wanted():
    norm, x = norm_layer(7), random(2, 7, 5, 6)
    grad = random(2, 7, 5, 6, seed=3)
    found = torch.autograd.grad(normed(x, norm, "gelu"), list(norm.parameters()), grad)
    expected = torch.autograd.grad(plain_norm(x, norm, "gelu"), list(norm.parameters()), grad)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    norm.requires_grad_(False)
    x.requires_grad_()
    found = torch.autograd.grad(normed(x, norm, "gelu"), x, grad)
    torch.testing.assert_close(found, torch.autograd.grad(plain_norm(x, norm, "gelu"), x, grad), atol=1e-4, rtol=1e-4)


NORMS_IN_PLAIN_PYTORCH = {
    "float64": lambda x, norm: (x.double(), norm.double()),
    "not affine": lambda x, norm: (x, nn.BatchNorm2d(6, affine=False)),
}


@pytest.mark.parametrize("change", NORMS_IN_PLAIN_PYTORCH.values(), ids=NORMS_IN_PLAIN_PYTORCH)
def test_norms_in_plain_pytorch(change, monkeypatch):
    x, norm = change(random(2, 6, 7, 7), norm_layer(6))
    monkeypatch.setattr(_operator, "call", None)  # no native call
    torch.testing.assert_close(normed(x, norm, "gelu"), plain_norm(x, copy.deepcopy(norm), "gelu"))


def feed_forward_arguments(shape, hidden, outputs, full):
    channels = shape[1]
    x = random(*shape, seed=1)
    expand, project = random(hidden, channels, seed=2) / channels**0.5, random(outputs, hidden, seed=3) / hidden**0.5
    if not full:
        return {"x": x, "expand_weight": expand, "project_weight": project}
    return {
        "x": x, "expand_weight": expand, "expand_bias": random(hidden, seed=4), "project_weight": project,
        "project_bias": random(outputs, seed=5), "scale": random(outputs, seed=6),
        "residual": random(shape[0], outputs, *shape[2:], seed=7),
    }  # fmt: skip


def run_feed_forward(function, arguments, activation, dtype=torch.float32, **formats):
    values = {k: v.detach().to(dtype, **(formats if v.dim() == 4 else {})) for k, v in arguments.items()}
    optional = {"expand_bias": None, "project_bias": None}
    return results(lambda: function(**{**optional, **values}, activation=activation), list(values.values()))


@parity.needs_native
@parity.every_isa
@pytest.mark.parametrize("full", [False, True], ids=["bare", "biases, scale, residual"])
@pytest.mark.parametrize(
    ("shape", "hidden", "outputs"),
    [((2, 32, 8, 8), 96, 32), ((3, 19, 5, 7), 61, 11), ((1, 3, 1, 1), 5, 2), ((2, 300, 24, 24), 130, 40)],
)
def test_feed_forward(shape, hidden, outputs, full, isa):
    arguments = feed_forward_arguments(shape, hidden, outputs, full)
    expected = run_feed_forward(pointwise_reference, arguments, "gelu", torch.float64)
    eager = run_feed_forward(pointwise_reference, arguments, "gelu")
    for formats in ({}, {"memory_format": torch.channels_last}):
        with parity.selected_isa(isa), parity.poisoned_memory(), fk.use_backend("cpu"):
            found = run_feed_forward(training.feed_forward, arguments, "gelu", **formats)
        assert_close(found, expected, eager)


@parity.needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_with_every_activation(activation):
    arguments = feed_forward_arguments((2, 18, 6, 7), 50, 18, True)
    expected = run_feed_forward(pointwise_reference, arguments, activation, torch.float64)
    eager = run_feed_forward(pointwise_reference, arguments, activation)
    assert_close(run_feed_forward(training.feed_forward, arguments, activation), expected, eager)


@parity.needs_native
@parity.every_isa
def test_the_same_bits_on_any_number_of_threads(isa):
    x, arguments = random(5, 40, 33, 20), feed_forward_arguments((5, 40, 33, 20), 100, 40, True)
    layers = branches(40, (7, 3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with parity.selected_isa(isa), fk.use_backend("cpu"):
                found.append(
                    step(branched, x, layers, "gelu")[0]
                    + norm_step(normed, x, norm_layer(40), "gelu")[0]
                    + run_feed_forward(training.feed_forward, arguments, "gelu")
                )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def twice(function, tensors):
    """Gradients of the sum of squared gradients."""
    tensors = [t.requires_grad_() for t in tensors]
    first = torch.autograd.grad(function().square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


@parity.needs_native
def test_second_derivatives():
    layers, x = branches(8, (5, 3)), random(3, 8, 9, 9)
    found = []
    for function, dtype in ((branched, None), (plain, torch.float64), (plain, torch.float32)):
        own, x_own = copy.deepcopy(layers).to(dtype), x.detach().to(dtype or torch.float32)
        found.append(twice(lambda f=function, o=own, v=x_own: f(v, o, "gelu"), [x_own, *own.parameters()]))
    assert_close(*found)
    norm, found = norm_layer(8), []
    for function, dtype in ((normed, None), (plain_norm, torch.float64), (plain_norm, torch.float32)):
        own, x_own = copy.deepcopy(norm).to(dtype), x.detach().to(dtype or torch.float32)
        found.append(twice(lambda f=function, o=own, v=x_own: f(v, o, "gelu"), [x_own, *own.parameters()]))
    assert_close(*found)
    arguments, found = feed_forward_arguments((3, 8, 9, 9), 20, 8, True), []
    for function, dtype in (
        (training.feed_forward, torch.float32),
        (pointwise_reference, torch.float64),
        (pointwise_reference, torch.float32),
    ):
        own = {k: v.detach().to(dtype) for k, v in arguments.items()}
        found.append(twice(lambda f=function, o=own: f(**o, activation="gelu"), list(own.values())))
    assert_close(*found)


@parity.needs_native
def test_registration():
    ops = torch.ops.ffnet_kernels_training
    x, vector = random(2, 8, 5, 5).contiguous(memory_format=torch.channels_last), random(8, seed=1).abs()
    test = {"test_utils": ("test_schema", "test_faketensor")}
    one = (random(8, 1, 3, 3), vector, vector)
    for branches, eps in (((*one, *one), [1e-5, 1e-5]), ((*one, None, None, None), [1e-5])):
        _, mean, variance = ops.branched_depthwise(x, *branches, eps, [1, 1], "gelu")
        torch.library.opcheck(ops.branched_depthwise.default, (x, *branches, eps, [1, 1], "gelu"), **test)
        torch.library.opcheck(
            ops.branched_depthwise_backward.default, (x, x, *branches, mean, variance, eps, "gelu", True), **test
        )
    _, mean, variance = ops.batch_norm(x, vector, vector, 1e-5, "gelu")
    torch.library.opcheck(ops.batch_norm.default, (x, vector, vector, 1e-5, "gelu"), **test)
    torch.library.opcheck(
        ops.batch_norm_backward.default, (x, x, vector, vector, mean, variance, 1e-5, "gelu", False), **test
    )
    weight = random(8, 8)
    torch.library.opcheck(ops.feed_forward.default, (x, weight, vector, weight, vector, "gelu", vector, x), **test)
    torch.library.opcheck(
        ops.feed_forward_backward.default, (x, x, x, weight, vector, weight, vector, "gelu", vector, False), **test
    )


@parity.needs_native
def test_raw_operators_refuse_what_they_cannot_read():
    ops = torch.ops.ffnet_kernels_training
    x, vector, weight = random(2, 8, 5, 5), random(8), random(8, 1, 3, 3)
    with pytest.raises(RuntimeError, match="odd"):
        ops.branched_depthwise(x, random(8, 1, 2, 2), vector, vector, None, None, None, [0.1], [1, 1], "none")
    with pytest.raises(RuntimeError, match="gamma"):
        ops.branched_depthwise(x, weight, random(7), vector, None, None, None, [0.1], [1, 1], "none")
    for eps, others in (
        ([0.1] * 2, (None, None, None)),
        ([0.1], (weight, vector, vector)),
        ([0.1], (None, vector, None)),
    ):
        with pytest.raises(RuntimeError, match="branches"):
            ops.branched_depthwise(x, weight, vector, vector, *others, eps, [1, 1], "none")
    with pytest.raises(RuntimeError, match="channels-last"):
        ops.batch_norm(x, vector, vector, 0.1, "none")
    with pytest.raises(RuntimeError, match="gamma"):
        ops.batch_norm(x.contiguous(memory_format=torch.channels_last), random(7), vector, 0.1, "none")
    matrix = random(8, 8)
    with pytest.raises(RuntimeError, match="channels-last"):
        ops.feed_forward(x, matrix, vector, matrix, vector, "gelu", vector, None)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="empty"):
        ops.feed_forward(channels_last[:0], matrix, vector, matrix, vector, "gelu", vector, None)
    with pytest.raises(RuntimeError, match="8 columns"):
        ops.feed_forward(channels_last, random(8, 7), vector, matrix, vector, "gelu", vector, None)


def test_wrong_arguments_are_named():
    x = random(2, 8, 5, 5)
    with pytest.raises(ValueError, match="project_weight"):
        training.feed_forward(x, random(6, 8), None, random(8, 7), None)


@parity.needs_native
def test_the_short_way_to_gradients_is_taken_in_eager_mode_only():
    operator = torch.ops.ffnet_kernels.conv2d.default
    x, weight = random(2, 8, 5, 5).requires_grad_(), random(4, 8, 1, 1, seed=1).requires_grad_()
    args = (x, weight, None, [1, 1], [0, 0, 0, 0], "gelu", None, None)
    short, registered = _operator.call(operator, *args), operator(*args)
    assert type(short.grad_fn) is not type(registered.grad_fn)
    found, expected = (torch.autograd.grad(out.square().sum(), (x, weight)) for out in (short, registered))
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert _operator.call(operator, *args).grad_fn is None

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    with Names():
        watched = _operator.call(operator, *args)
    assert names == ["ffnet_kernels.conv2d.default"]
    assert type(watched.grad_fn) is type(registered.grad_fn)
