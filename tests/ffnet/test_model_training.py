"""Training steps of a model on the operators for training, against the plain model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise

import ffnet
import ffnet_kernels
from ffnet_kernels.ops import _operator
from ffnet_kernels.selftest import error_limit

BUILDS = {
    "3x3 channel mixers": {"channel_kernel": 3},
    "7x7 channel mixers, layer scale": {"layer_scale_init": 0.5},
}


def small_ffnet(**options):
    torch.manual_seed(0)
    return randomise(ffnet.FFNet((1, 1, 2, 1), (16, 32, 64, 64), num_classes=7, stem_width=20, **options)).train()


def batch(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 64, 64, generator=generator).to(dtype), torch.arange(4) % 7


def step(model, seed=1):
    """The logits; gradients and running statistics are the model's."""
    x, labels = batch(seed, next(model.parameters()).dtype)
    out = model(x)
    model.zero_grad()
    F.cross_entropy(out, labels).backward()
    return out.detach()


def optimized(model):
    """An optimised copy whose training program runs in the next step: the first step of all runs the modules."""
    fast = ffnet_kernels.optimize(copy.deepcopy(model))
    state = copy.deepcopy(fast.state_dict())
    step(fast)
    fast.load_state_dict(state)
    return fast


def fused(model):
    """The operators that an optimised model has run on."""
    return {row.runs_on for row in ffnet_kernels.report(model).rows if row.is_fused}


def gradients(model):
    return [p.grad for p in model.parameters()]


def statistics(model):
    return [b for b in model.buffers() if b.dim()]


@pytest.fixture
def native_calls(monkeypatch):
    """Names of the native operators that were called; empty where the library is missing."""
    names, call = [], _operator.call

    def spy(overload, *args):
        if overload.namespace == "ffnet_kernels_training":
            names.append(overload.name().split("::")[1])
        return call(overload, *args)

    monkeypatch.setattr(_operator, "call", spy)
    return names


@pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
def test_a_step_against_float64(options, native_calls):
    model = small_ffnet(**options)
    fast, double = optimized(model), copy.deepcopy(model).double()
    native_calls.clear()
    out, expected, eager = step(fast), step(double), step(model)
    assert (out.double() - expected).abs().max() <= error_limit(expected, eager)
    if "cpu" in ffnet_kernels.available_backends():
        assert set(native_calls) == {"batch_norm", "branched_depthwise", "feed_forward"}

    for of in (gradients, statistics):
        exact = of(double)
        largest = max(t.abs().max() for t in exact)
        # A bias before batch normalisation has no gradient but rounding.
        vanish = [t.abs().max() < 1e-12 * largest for t in exact]
        for own, zero in zip(of(fast), vanish, strict=True):
            assert not zero or own.abs().max() < 1e-5 * largest
        scales = [max(t.abs().max(), 1e-3 * largest) for t in exact]

        def whole(tensors, scales=scales, vanish=vanish):
            """Relative to each tensor's size: one tensor would judge by plain PyTorch's luck with a few elements."""
            rows = zip(tensors, scales, vanish, strict=True)
            return torch.cat([(t.double() / s).flatten() for t, s, zero in rows if not zero])

        found, reference, plain = whole(of(fast)), whole(exact), whole(of(model))
        assert (found - reference).abs().max() <= error_limit(reference, plain.float())


def test_steps_of_gradient_descent_stay_together():
    model = small_ffnet(channel_kernel=3)
    fast, double = ffnet_kernels.optimize(copy.deepcopy(model)), copy.deepcopy(model).double()
    outputs = []
    for m in (fast, model, double):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)
        for seed in range(4):
            out = step(m, seed)
            optimizer.step()
        m.eval()
        outputs.append((out, m(batch(9, out.dtype)[0]).detach()))
    for own, eager, expected in zip(*outputs, strict=True):
        own_error, eager_error = (own.double() - expected).abs().max(), (eager.double() - expected).abs().max()
        # Errors grow from step to step: a larger multiple of plain PyTorch's than for one operator.
        assert own_error <= 5 * eager_error + 1e-6 * expected.abs().max()


def test_what_it_shares_with_the_model():
    model = small_ffnet(channel_kernel=3)
    fast = optimized(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    step(fast)
    model.load_state_dict(fast.state_dict())
    again = optimized(fast)
    assert torch.equal(step(again), step(fast))
    x, _ = batch()
    model.load_state_dict(fast.state_dict())
    expected = model.eval()(x)
    torch.testing.assert_close(fast.eval()(x), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ffnet.reparameterize(fast)(x), expected, rtol=1e-3, atol=1e-3)


def test_hooks_see_their_layers():
    fast = optimized(small_ffnet(channel_kernel=3))
    seen = []
    hooked = {name: module for name, module in fast.named_modules() if name and name != "stages"}
    for name, module in hooked.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    step(fast)
    assert sorted(seen) == sorted(hooked)


def test_drop_path_and_checkpointing():
    torch.manual_seed(0)
    model = small_ffnet(channel_kernel=3, drop_path_rate=0.3)
    fast = optimized(model)
    outputs, random = [], []
    for m in (model, fast):
        torch.manual_seed(3)
        outputs.append(step(m))
        random.append(torch.get_rng_state())
    assert torch.equal(*random)
    assert "feed_forward" in fused(fast)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    plain = [p.grad.clone() for p in fast.parameters()]
    fast.set_grad_checkpointing()
    torch.manual_seed(3)
    step(fast)
    for again, grad in zip(fast.parameters(), plain, strict=True):
        torch.testing.assert_close(again.grad, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-9)


def test_autocast_runs_the_layers(native_calls):
    model = small_ffnet(channel_kernel=3)
    fast, double = optimized(model), copy.deepcopy(model).double()
    native_calls.clear()
    expected = step(double)
    with torch.autocast("cpu", torch.bfloat16):
        out, eager = step(fast), step(model)
    assert out.dtype == eager.dtype == torch.bfloat16
    assert native_calls == [] or {"branched_depthwise", "ffnified_attention"} <= set(native_calls)
    assert (out.double() - expected).abs().max() <= error_limit(expected, eager)
    for own, other, exact in zip(fast.parameters(), model.parameters(), gradients(double), strict=True):
        assert own.grad.dtype == other.grad.dtype == torch.float32
        error, plain = ((p.grad.double() - exact).norm() for p in (own, other))
        assert error <= 2 * plain + 1e-3 * max(g.norm() for g in gradients(double))


def test_other_dtypes_are_the_plain_model():
    model = small_ffnet(channel_kernel=3).double()
    fast = optimized(model)
    torch.testing.assert_close(step(fast), step(model))
    for own, other in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_a_stem_of_other_layers_runs_as_written():
    model = small_ffnet()
    model.patch_embed.append(torch.nn.ReLU())
    fast, x = optimized(model), batch()[0]
    fast.patch_embed(x)
    out = fast.patch_embed(x)
    assert out.min() == 0
    torch.testing.assert_close(out, model.patch_embed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
def test_fine_tuning_a_reparameterised_model(options):
    model = ffnet.reparameterize(small_ffnet(drop_path_rate=0.2, **options), extra_folds=False)
    fast, start = ffnet_kernels.optimize(copy.deepcopy(model)), copy.deepcopy(list(model.parameters()))
    for m in (fast, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9)
        for seed in range(4):
            torch.manual_seed(seed)
            step(m, seed)
            optimizer.step()
    assert {"depthwise_conv2d", "ffnified_attention", "projection"} <= fused(fast)
    for own, other, before in zip(fast.parameters(), model.parameters(), start, strict=True):
        moved = (other - before).norm()
        assert (own - other).norm() <= 1e-2 * moved + 1e-6
    x = batch(9)[0]
    with torch.no_grad():
        expected = model.eval()(x)
        for _ in range(2):
            torch.testing.assert_close(fast.eval()(x), expected, rtol=1e-3, atol=1e-3)
        expected = model.double()(x.double())
        assert (fast(x).double() - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("layer", "operators"),
    [
        (ffnet.layers.ConvBN(8, 16), {"projection", "batch_norm_training"}),
        (ffnet.layers.ConvBN(8, 16, 3, stride=2), {"batch_norm_training"}),
        (ffnet.layers.ConvBN(8, 16, 3, groups=2), {"batch_norm_training"}),
        (ffnet.layers.ConvBN(8, 16, 3, groups=8), {"branched_depthwise"}),
        (ffnet.layers.BNConv(8, 16), {"batch_norm_training", "projection"}),
    ],
)
def test_operators_of_a_layer(layer, operators, native_calls):
    layer = ffnet_kernels.optimize(layer)
    for _ in range(2):
        layer(torch.randn(2, 8, 6, 6))
    assert fused(layer) == operators
    if "cpu" in ffnet_kernels.available_backends():
        assert set(native_calls) == operators - {"projection", "batch_norm_training"}  # of which PyTorch is as fast
