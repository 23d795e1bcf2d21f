"""Programs under autocast: what autocast gives the plain modules, with statistics and parameters in float32."""

import copy
import functools

import parity
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from contract import ZOO, agree, autocast, compare, depthwise, every_model, randomised, sample, twins
from torch import nn

import ffnet
import ffnet_kernels as fk
from ffnet_kernels import autocast as lists
from ffnet_kernels import capture, normalize, training
from ffnet_kernels.selftest import error_limit

NARROW = [torch.bfloat16, torch.float16]
TOLERANCE = 0.05  # of bfloat16, in which results of float32 were computed


def tiny(**options):
    defaults = {"depths": (1, 2), "dims": (24, 48), "token_kernels": (3, 7), "stem_width": 10, "num_classes": 21}
    return randomised(ffnet.FFNet(**{**defaults, **options}))


def maps(*shape, seed=0):
    return torch.randn(shape or (4, 3, 64, 64), generator=torch.Generator().manual_seed(seed))


def rows(model):
    return [row.runs_on.partition(" (")[0] for row in fk.report(model).rows]


# ---- Which functions are cast ----


def test_every_function_that_autocast_changes_is_known():
    """By the dispatcher's word: what has no kernel of autocast's is left as it is."""
    changed = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU")
    }
    named = {target if isinstance(target, str) else target.__name__ for target in lists.LOWER}
    promoted = {"cat", "stack"}
    assert normalize._PURE & changed <= named | lists.OTHER | promoted


def captured(model, x):
    """The graph of modules whose classes are taken for a library's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "is_library", lambda kind: True)
        return capture._Capture(model, x, (False, False)).graph


CALLS = {
    "conv2d": lambda x: torch.conv2d(x, x[:4, :4, :3, :3]),
    "conv1d": lambda x: torch.conv1d(x[0], x[0, :, :, :3]),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, x[:, :4, :3, :3]),
    "linear": lambda x: F.linear(x, x[0, 0]),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "bmm": lambda x: torch.bmm(x[0], x[0]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(1),
    "mean": lambda x: x.mean((2, 3)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "normalize": F.normalize,
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "cat": lambda x: torch.cat([x, x.bfloat16()]),
    "stack": lambda x: torch.stack([x.bfloat16(), x]),
    "sum": lambda x: x.bfloat16() + x,
    "where": lambda x: torch.where(x > 0, x.bfloat16(), x),
    "cumsum": lambda x: x.bfloat16().cumsum(1),
    "var": lambda x: x.var(1),
}


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_of_calls_are_those_of_autocast(name):
    """Of float32 and of 16 bits, as nodes and as autocast has them."""

    class Calls(nn.Module):
        def forward(self, x):
            return CALLS[name](x)

    for dtype in (torch.float32, torch.bfloat16):
        x = maps(4, 4, 8, 8).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            expected = CALLS[name](x)
            graph = captured(nn.Sequential(Calls()), x)
        (output,) = next(iter(reversed(graph.nodes))).all_input_nodes
        assert output.meta["value"].dtype == expected.dtype
        assert output.meta["value"].shape == expected.shape


@pytest.mark.parametrize("change", [{"enabled": False}, {"dtype": torch.float16}])
def test_a_forward_that_switches_autocast_runs_as_it_is(change):
    class Switches(nn.Conv2d):
        def forward(self, x):
            with torch.autocast("cpu", **{"dtype": torch.bfloat16, **change}):
                return super().forward(x)

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(capture.NotCapturable, match="switches autocast"):
        captured(nn.Sequential(Switches(8, 8, 3)), maps(2, 8, 8, 8))


# ---- What runs ----


@parity.needs_native
def test_operators_under_autocast():
    model = fk.optimize(tiny(channel_kernel=7))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(maps())
        model(maps())
    block, downsample = ["conv2d", "ffnified_attention", "channel_mixer"], ["depthwise_conv2d", "conv2d"]
    first, *steps = rows(model)
    assert first == "a program, under autocast to torch.bfloat16"
    cast = ["torch: to"]  # of the image
    assert steps == [*cast, "conv2d_pair", *block, *downsample, *block, *block, "torch: mean", "torch: linear"]
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(maps())
    first, *steps = rows(model)
    assert first == "a program, with gradients, under autocast to torch.bfloat16"
    assert {"branched_depthwise", "feed_forward", "projection", "batch_norm_training"} <= set(steps)


def test_what_programs_do_not_know_runs_the_modules():
    model, x = fk.optimize(tiny()), maps(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert model(x).dtype == torch.float16
    assert "the last call ran it as it is: it was called under autocast to torch.float16" in str(fk.report(model))
    with torch.no_grad():
        model(x)
    assert "as it is" not in str(fk.report(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maps_of_other_dtypes(dtype):
    fast, plain = twins(tiny)
    for _ in range(3):
        agree(fast, plain, maps(2, 3, 32, 32).to(dtype), "no_grad", TOLERANCE, context=autocast)
    if dtype != torch.float64:
        assert_as_precise(fast.train(), plain.train(), maps().to(dtype))


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_is_left_as_it_was(cache):
    model = fk.optimize(tiny()).train()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        for _ in range(2):
            model(maps()).sum().backward()
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert torch.is_autocast_cache_enabled() == cache
        with pytest.raises(RuntimeError):
            model(maps(2, 4, 8, 8))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_a_layer_scale_widens_maps_as_in_plain_pytorch():
    """A scale of float32 makes the residual stream float32, which no operator may narrow."""
    fast, plain = twins(lambda: nn.Sequential(*tiny(layer_scale_init=0.5).stages))
    x = maps(2, 24, 16, 16)
    for _ in range(2):
        found = agree(fast, plain, x, "no_grad", TOLERANCE, context=autocast)
    assert found.dtype == torch.float32
    assert_as_precise(*(model.train() for model in twins(functools.partial(tiny, layer_scale_init=0.5))), maps())


# ---- What it computes ----


@every_model
def test_training_mode(name):
    fast, plain = (model.train() for model in twins(ZOO[name].make))
    for seed in range(3):
        agree(fast, plain, sample(name, seed), "grad", TOLERANCE, context=autocast)
    agree(fast.eval(), plain.eval(), sample(name), "no_grad", TOLERANCE, context=autocast)


def gradients(model, x, amp):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = model(x)
    F.cross_entropy(logits.float() if amp else logits, torch.arange(len(x))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_as_precise(fast, plain, x, amp=True):
    """The gradient of every parameter by the relative rule, against float64."""
    expected = gradients(copy.deepcopy(plain).double(), x.double(), False)
    eager = gradients(plain, x, amp)
    for _ in range(2):  # the first step runs the modules
        found = gradients(fast, x, amp)
    assert "as it is" not in str(fk.report(fast))
    largest, rounding = max(grad.norm() for grad in expected.values()), 4 * torch.finfo(torch.bfloat16).eps
    for name, exact in expected.items():
        own, other = found[name], eager[name]
        assert own.dtype == other.dtype, name
        error, limit = ((grad.double() - exact).norm() for grad in (own, other))
        # What is zero but for rounding, as of biases before a normalisation, is held against the others.
        assert error <= 2 * limit + rounding * max(exact.norm(), 0.01 * largest), name


@pytest.mark.long
def test_gradients_of_a_whole_model():
    """Of every parameter of FFNet-1, in training mode."""
    torch.manual_seed(0)
    plain = ffnet.create_model("ffnet_1", drop_path_rate=0.0).train()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    fast = fk.optimize(copy.deepcopy(plain))
    assert_as_precise(fast, plain, maps(8, 3, 96, 96))
    assert all(parameter.grad.dtype == torch.float32 for parameter in fast.parameters())
    assert rows(fast)[0] == "a program, with gradients, under autocast to torch.bfloat16"


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
def test_optimizer_steps_and_averaged_weights(optimiser, scaled):
    """Where a few steps lead is where autocast leads the plain model, as far as its precision goes."""
    fast, plain = (model.train() for model in twins(tiny))
    start, x = [p.detach().clone() for p in plain.parameters()], maps()
    averaged = []
    for model in (fast, plain):
        optimizer = getattr(torch.optim, optimiser)(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model), multi_avg_fn=None)
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), torch.arange(4))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
        averaged.append(average)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            evaluated = model.eval()(x)
            torch.testing.assert_close(evaluated, copy.deepcopy(model)(x), rtol=0.05, atol=0.05)
    pairs = zip(fast.parameters(), plain.parameters(), start, strict=True)
    apart, moved = (
        sum(values) for values in zip(*[((a - b).norm(), (b - c).norm()) for a, b, c in pairs], strict=True)
    )
    assert apart <= 0.3 * moved
    compare(*(dict(average.named_parameters()) for average in averaged), "averaged weights", TOLERANCE)


def test_weights_are_cast_anew_when_they_change():
    fast, plain = twins(
        lambda: randomised(nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1)))
    )
    x = maps(2, 8, 9, 9)
    for mode in ("no_grad", "grad"):
        agree(fast, plain, x, mode, TOLERANCE, context=autocast)
        for model in (fast, plain):
            with torch.no_grad():
                model[0].weight.mul_(2)
                model[3].weight.mul_(-1)
        agree(fast, plain, x, mode, TOLERANCE, context=autocast)


def test_checkpointing():
    fast, plain = (nn.Sequential(model[0], model[1]).train() for model in twins(lambda: ZOO["blocks"].make()))

    class Checkpointed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    for _ in range(3):
        x = sample("blocks").requires_grad_()
        agree(Checkpointed(fast), Checkpointed(plain), x, "grad", TOLERANCE, context=autocast)


@pytest.mark.long
@pytest.mark.parametrize("train", [False, True])
def test_compiled_under_autocast(train):
    model = ZOO["blocks"].make()[0].train(train)
    compiled = torch.compile(copy.deepcopy(model), backend="ffnet_kernels")
    with torch.set_grad_enabled(train):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                expected, found = model(sample("blocks")), compiled(sample("blocks"))
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_a_model_of_bfloat16_trains_on_the_operators():
    fast, plain = (model.train() for model in twins(tiny, lambda model: model.bfloat16()))
    assert_as_precise(fast, plain, maps().bfloat16(), amp=False)
    assert {"branched_depthwise", "feed_forward"} <= set(rows(fast))
    for own, other in zip(fast.buffers(), plain.buffers(), strict=True):
        assert own.dtype == other.dtype


@pytest.mark.parametrize("amp", [False, True])
def test_frozen_normalisations(amp):
    fast, plain = (model.train() for model in twins(tiny))
    for model in (fast, plain):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    assert_as_precise(fast, plain, maps(), amp)
    assert {"depthwise_conv2d", "feed_forward"} <= set(rows(fast))


# ---- The operators of training steps on maps of 16 bits ----


def branch(channels, outputs, kernel, stride, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=channels, bias=False)
    norm = nn.BatchNorm2d(outputs)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) / kernel)
        norm.weight.copy_(torch.rand(outputs, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(outputs, generator=generator))
    return nn.ModuleList([conv.to(dtype), norm.double() if dtype == torch.float64 else norm])


def step(function, x, layers):
    """The result, the gradients and the running statistics."""
    layers = copy.deepcopy(layers)
    x = x.detach().requires_grad_()
    out = function(x, layers)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    found = torch.autograd.grad(out, [x, *layers.parameters()], grad)
    return [out.detach(), *found], [buffer for buffer in layers.buffers() if buffer.dim()]


def check(found, expected, eager):
    for i, (own, exact, plain) in enumerate(zip(found, expected, eager, strict=True)):
        assert own.dtype == plain.dtype, i
        assert own.shape == plain.shape, i
        # Eager PyTorch is rounded to 16 bits on the way to what it gives in float32.
        limit = error_limit(exact, plain if plain.dtype != torch.float32 else plain.to(NARROW[0]))
        assert (own.double() - exact).abs().max().item() <= limit, f"result {i}"


LAYERS = {"7x7 and 3x3": ((7, 3), 1, 1), "one 3x3": ((3,), 1, 1), "stride 2, two outputs": ((7, 3), 2, 2)}


@parity.needs_native
@parity.every_isa
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (3, 21, 9, 7)])
def test_branched_depthwise(layers, dtype, shape, isa):
    kernels, stride, multiplier = layers
    x = parity.laid_out(shape, "channels_last", torch.Generator().manual_seed(1)).to(dtype)

    def make(dtype):
        sizes = (shape[1], shape[1] * multiplier)
        return nn.ModuleList(branch(*sizes, k, stride, dtype, seed) for seed, k in enumerate(kernels))

    def plain(x, layers):
        outputs = [norm(conv(x)) for conv, norm in layers]
        return F.gelu(sum(outputs[1:], outputs[0]))

    def fused(x, layers):
        convs, norms = zip(*layers, strict=True)
        own = [training.Norm.of(norm) for norm in norms]
        return training.branched_depthwise(x, [conv.weight for conv in convs], own, convs[0].stride, "gelu")

    narrow = make(dtype)
    double = copy.deepcopy(narrow).double()
    (expected, statistics), (eager, eager_statistics) = step(plain, x.double(), double), step(plain, x, narrow)
    with parity.selected_isa(isa), parity.poisoned_memory(), fk.use_backend("cpu"):
        found, own_statistics = step(fused, x, narrow)
    check(found, expected, eager)
    check(own_statistics, statistics, eager_statistics)


@parity.needs_native
@parity.every_isa
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (3, 21, 9, 7)])
def test_batch_norm(dtype, shape, isa):
    x = parity.laid_out(shape, "channels_last", torch.Generator().manual_seed(1)).to(dtype) + 1
    narrow = nn.ModuleList([branch(shape[1], shape[1], 1, 1, dtype, 0)[1]])
    double = copy.deepcopy(narrow).double()

    def plain(x, layers):
        return F.gelu(layers[0](x))

    def fused(x, layers):
        return training.batch_norm(x, training.Norm.of(layers[0]), "gelu")

    (expected, statistics), (eager, eager_statistics) = step(plain, x.double(), double), step(plain, x, narrow)
    with parity.selected_isa(isa), parity.poisoned_memory(), fk.use_backend("cpu"):
        found, own_statistics = step(fused, x, narrow)
    check(found, expected, eager)
    check(own_statistics, statistics, eager_statistics)


@parity.needs_native
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"scale": True, "residual": True}], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_feed_forward(dtype, options):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 10, 5, 6), (24, 10), (24,), (12, 24), (12,), (12,), (2, 12, 5, 6)]
    x, *weights = (torch.randn(size, generator=generator).mul_(0.5).to(dtype) for size in sizes)
    given = [x, *weights]
    if not options.get("bias", True):
        given[2] = given[4] = None
    if "scale" not in options:
        given[5:] = [None, None]

    def run(function, dtype):
        tensors = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
        *arguments, scale, residual = tensors
        out = function(*arguments, scale, residual)
        wanted = [t for t in tensors if t is not None]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    def plain(x, expand, expand_bias, project, project_bias, scale, residual):
        hidden = F.gelu(F.conv2d(x, expand[:, :, None, None], expand_bias))
        out = F.conv2d(hidden, project[:, :, None, None], project_bias)
        out = out if scale is None else out * scale[:, None, None]
        return out if residual is None else residual + out

    def fused(*arguments):
        *arguments, scale, residual = arguments
        return training.feed_forward(*arguments, scale=scale, residual=residual)

    expected, eager, found = run(plain, torch.float64), run(plain, dtype), run(fused, dtype)
    check(found, expected, eager)


@parity.needs_native
def test_second_derivatives_of_16_bits():
    x = maps(2, 8, 5, 5).bfloat16().requires_grad_()
    expand, project = maps(6, 8, seed=1).bfloat16(), maps(8, 6, seed=2).bfloat16()

    def norm_of_gradient(function):
        (grad,) = torch.autograd.grad(function(x).float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.float().square().sum(), x)
        return second

    found = norm_of_gradient(lambda x: training.feed_forward(x, expand, None, project, None))

    def plain(x):
        return F.conv2d(F.gelu(F.conv2d(x, expand[..., None, None])), project[..., None, None])

    expected = norm_of_gradient(plain)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


@parity.needs_native
def test_little_is_kept_for_the_backward_pass():
    """Of a block's training step under autocast: what the graph holds on to, against plain modules."""

    def kept(model):
        sizes = {}
        with torch.autocast("cpu", torch.bfloat16):
            out = model(maps(2, 64, 32, 32).contiguous(memory_format=torch.channels_last))
        waiting, seen = [out.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            names = [name for name in dir(node) if name.startswith("_saved") and not name.startswith("_saved_self_sym")]
            found = [getattr(node, name) for name in names if name != "_saved_tensors"]
            found += getattr(node, "saved_tensors", ())
            for tensor in found:
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(sizes.values())

    plain = nn.Sequential(*(ffnet.layers.ConvBN(64, 64, 7, groups=64) for _ in range(2)), nn.GELU()).train()
    fast = fk.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        fast(maps(2, 64, 32, 32).contiguous(memory_format=torch.channels_last))
    assert kept(fast) <= 0.65 * kept(plain)
