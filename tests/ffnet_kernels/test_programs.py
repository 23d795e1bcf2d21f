"""What programs are made of: the operators that are found in a model, and that these compute what its layers do."""

import copy
import gc
import re
import weakref

import pytest
import torch
from contract import agree, depthwise, randomised, twins
from patterns_zoo import PATTERNS, Draws, Keeps, depthwise_norm
from torch import nn

import ffnet
import ffnet_kernels as fk
from ffnet import mixers
from ffnet_kernels import dynamo, kernels
from ffnet_kernels.backends import crossover
from ffnet_kernels.selftest import error_limit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


every_pattern = pytest.mark.parametrize("name", PATTERNS)


def tiny(**options):
    defaults = {"depths": (1, 2), "dims": (24, 48), "token_kernels": (3, 7), "stem_width": 10, "num_classes": 21}
    return randomised(ffnet.FFNet(**{**defaults, **options}))


def maps(*shape):
    return torch.randn(shape or (2, 8, 13, 11))


def steps(model):
    """What the program of a model runs, first to last; of all of it."""
    rows = fk.report(model).rows
    assert [row.runs_on.partition(",")[0] for row in rows if not row.is_step] == ["a program"], rows
    return [row.runs_on.partition(" (")[0] for row in rows if row.is_step]


# ---- What is found ----


@every_pattern
def test_operators_of_inference(name):
    model = fk.optimize(randomised(PATTERNS[name].make()))
    with torch.no_grad():
        model(maps())
    assert steps(model) == PATTERNS[name].steps


@every_pattern
def test_operators_of_training(name):
    model = fk.optimize(randomised(PATTERNS[name].make())).train()
    model(maps())
    assert steps(model) == PATTERNS[name].training


@pytest.mark.parametrize("kernel", [3, 7])
def test_operators_of_a_model(kernel):
    model = fk.optimize(tiny(channel_kernel=kernel, layer_scale_init=0.5))
    with torch.no_grad():
        model(maps(1, 3, 64, 64))
    block = ["conv2d", "ffnified_attention", "channel_mixer"]
    stem, downsample = ["conv2d_pair"], ["depthwise_conv2d", "conv2d"]
    assert steps(model) == [*stem, *block, *downsample, *block, *block, "torch: mean", "torch: linear"]


def test_the_report_names_the_layers_of_a_step():
    model = fk.optimize(tiny())
    with torch.no_grad():
        model(maps(1, 3, 64, 64))
    (row,) = [row for row in fk.report(model).rows if "stages.0.0.token_mixer.0.main.conv1" in row.layers]
    assert row.runs_on == "ffnified_attention"
    assert row.is_fused
    assert "stages.0.0.token_mixer.0.main.conv2" in row.layers


def test_the_report_says_that_calls_run_the_modules():
    model = fk.optimize(tiny()).train()
    x = maps(2, 3, 32, 32)
    assert "as it is" not in str(fk.report(model))
    model(x)
    with torch.autocast("cpu", torch.float16):
        model(x)
    assert "the last call ran it as it is: it was called under autocast to torch.float16" in str(fk.report(model))
    model(x)
    assert "as it is" not in str(fk.report(model))
    torch.func.vmap(lambda image: model.eval()(image[None]))(x)
    assert "not plain eager" in str(fk.report(model.train()))


# ---- What it computes ----


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_module_draws_is_drawn_anew(grad):
    model = fk.optimize(Draws())
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        found = [model(maps()) for _ in range(3)]
    torch.manual_seed(0)
    for got in found:
        torch.testing.assert_close(got, Draws.forward(model, maps()))
    assert "random" in str(fk.report(model))


@torch.no_grad()
def test_what_a_module_keeps_elsewhere_than_in_its_registries():
    x, plain = maps(), randomised(Keeps())
    model = fk.optimize(copy.deepcopy(plain))

    def same():
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x))
        steps(model)

    same()
    for change in (
        lambda m: m.bias.mul_(3),  # which it does not look at again
        lambda m: m.train().eval(),
        lambda m: m.kept["maps"][0].update(bias=torch.ones(8, 1, 1)),
        lambda m: m.kept["maps"][0]["bias"].mul_(5),
        lambda m: m.kept["maps"].__setitem__(0, {}),
        lambda m: m.kept.update(maps=[{"bias": torch.zeros(())}]),
    ):
        change(model), change(plain)
        same()


def assert_close(got, expected, plain):
    assert got.dtype == plain.dtype
    assert (got.double() - expected).abs().max().item() <= error_limit(expected, plain)


@every_pattern
@every_dtype
@every_format
@torch.no_grad()
def test_results(name, dtype, memory_format):
    """By the relative rule, in the first call and in those to come."""
    model = randomised(PATTERNS[name].make()).to(dtype)
    x = maps().to(dtype).contiguous(memory_format=memory_format)
    expected, plain = copy.deepcopy(model).double()(x.double()), model(x)
    fk.optimize(model)
    for _ in range(2):
        assert_close(model(x), expected, plain)
    steps(model)


@every_pattern
@every_format
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("backend", "size"), [("reference", 7), ("auto", 2)])
def test_results_where_no_kernel_runs(name, memory_format, grad, backend, size):
    """The reference in a program: asked for, or chosen for maps of a few pixels."""
    if name == "a dense layer" and size < 3:
        pytest.skip("its filter is larger")
    model = randomised(PATTERNS[name].make())
    model.train(grad)
    x = maps(3, 8, size, size).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(grad), fk.use_backend(backend):
        expected, plain = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model)(x)
        fk.optimize(model)
        for _ in range(2):
            assert_close(model(x), expected, plain)
    assert any(row.runs_on.startswith("a program") for row in fk.report(model).rows)


@every_dtype
@every_format
@pytest.mark.parametrize("options", [{}, {"channel_kernel": 3, "layer_scale_init": 0.5}, {"norm": "layer"}], ids=str)
@torch.no_grad()
def test_results_of_a_model(dtype, memory_format, options):
    model = tiny(**options).to(dtype)
    x = maps(3, 3, 37, 51).to(dtype).contiguous(memory_format=memory_format)
    expected, plain = copy.deepcopy(model).double()(x.double()), model(x)
    fk.optimize(model)
    for _ in range(2):
        # Twice the limit of one operator: layers round in a chain.
        assert (model(x).double() - expected).abs().max().item() <= 2 * error_limit(expected, plain)
    assert "torch: linear" in steps(model)


@pytest.mark.parametrize("size", [0, 1, 2, 31, 32, 33])
def test_batches_of_the_head(size):
    fast, plain = twins(tiny)
    agree(fast, plain, maps(2, 3, 32, 32))
    agree(fast, plain, maps(size, 3, 32, 32))


@pytest.mark.parametrize("threads", [1, 5])
@torch.no_grad()
def test_other_numbers_of_threads(threads):
    fast, plain = twins(tiny)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            agree(fast, plain, maps(2, 3, 61, 47))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (8, 8), (2, 8, 1, 1)])
@torch.no_grad()
def test_what_is_wrong_is_said_as_by_plain_pytorch(shape):
    fast, plain = twins(lambda: randomised(nn.Sequential(*depthwise_norm(3), nn.Conv2d(8, 4, 3))))
    agree(fast, plain, maps())
    texts = []
    for model in (fast, plain):
        with pytest.raises(RuntimeError) as raised:
            model(torch.ones(shape))
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
    agree(fast, plain, maps())


# ---- Training ----


@every_pattern
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_steps_with_gradients(name, training):
    """Results, gradients, running statistics and random state are those of the plain model."""
    fast, plain = twins(lambda: randomised(PATTERNS[name].make()).train(training))
    for _ in range(3):
        agree(fast, plain, maps().requires_grad_(), "grad")
    assert not training or steps(fast)


@pytest.mark.parametrize("kernel", [3, 7])
def test_drop_path_draws_as_the_plain_model(kernel):
    def make():
        token = mixers.ResidualMixer(mixers.ffnified_attention_mixer(8, kernel), 8, layer_scale_init=0.5, drop_path=0.5)
        return randomised(
            nn.Sequential(token, mixers.ResidualMixer(mixers.conv_ffn_mixer(8, kernel), 8, drop_path=0.3))
        )

    fast, plain = twins(make)
    for model in (fast, plain):
        model.train()
    for _ in range(3):
        agree(fast, plain, maps(6, 8, 9, 9), "grad")
    assert "feed_forward" in steps(fast)


def test_a_training_program_folds_nothing():
    """What an optimiser moves is what it reads, in eval mode as well."""
    fast, plain = twins(lambda: randomised(nn.Sequential(*depthwise_norm(act=nn.GELU()), nn.Conv2d(8, 4, 1))))
    for model in (fast, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8, 6, 6)).square().mean().backward()
            optimizer.step()
    agree(fast, plain, maps(), "grad")
    agree(fast, plain, maps())


# ---- Where there is none ----


def user_layer():
    class Own(nn.Module):
        def forward(self, x):
            return x

    return nn.Sequential(depthwise(), Own())


def hooked():
    model = nn.Sequential(depthwise(), nn.ReLU())
    model[1].register_forward_hook(lambda *args: None)
    return model


def patched():
    model = nn.Sequential(depthwise(), nn.ReLU())
    model[1].forward = lambda x: 2 * x
    return model


def two_kinds():
    return nn.Sequential(depthwise(), nn.Sequential(nn.BatchNorm2d(8))[0].double())


def compiled():
    model = nn.Sequential(depthwise(), nn.ReLU())
    model[1].compile(backend="eager")
    return model


REFUSED = {
    "a class of the user's": (user_layer, r"1 \(Own\) is of a class whose code may do more"),
    "a hook": (hooked, r"1 \(ReLU\) has a hook"),
    "a patched method": (patched, r"1 \(ReLU\) has a patched method"),
    "a compiled layer": (compiled, r"1 \(ReLU\) is compiled"),
    "parameters of two dtypes": (two_kinds, "2 kinds"),
    "nothing to gain": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()), "nothing in it is for an op"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_refusal_is_reported(refused):
    make, reason = REFUSED[refused]
    fast, plain = twins(lambda: randomised(make()))
    torch._dynamo.reset()
    for _ in range(2):
        agree(fast, plain, maps())
    first = fk.report(fast).rows[0]
    assert not first.is_fused
    assert first.runs_on.startswith("as it is: ")
    assert re.search(reason, first.runs_on), first.runs_on


def test_classes_of_the_users_are_named():
    assert fk.report(fk.optimize(user_layer().eval())).own_classes == ()  # whose class has no layer to optimise

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(depthwise(), nn.Conv2d(8, 8, 3, dilation=2, groups=8))

        def forward(self, x):
            return self.layers(x)

    found = fk.report(fk.optimize(nn.ModuleList([Own(), Own()]).eval()))
    assert found.own_classes == ("Own",)
    assert str(found).splitlines()[-1].startswith("Own: your code")
    assert "nothing" in str(fk.report(Own()))


def test_the_reasons_of_a_refusal_are_those_of_its_layers():
    model = fk.optimize(nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2, groups=8), nn.Conv2d(8, 24, 3, groups=8)).eval())
    (row, *_) = fk.report(model).rows
    assert row.runs_on.endswith("(a dilation of 2×2, depthwise with 3 outputs a channel)")


def test_layers_below_a_refusal_have_programs():
    model = fk.optimize(hooked().eval())
    with torch.no_grad():
        model(maps())
    assert ("0", "a program") in [row[:2] for row in fk.report(model).rows]


def test_a_hook_that_is_removed_gives_the_program_back():
    model = fk.optimize(randomised(nn.Sequential(depthwise(), nn.ReLU())))
    seen = []
    with torch.no_grad():
        model(maps())
        handle = model[1].register_forward_hook(lambda module, args, out: seen.append(out))
        model(maps())
        assert len(seen) == 1
        handle.remove()
        for _ in range(8):  # made anew, in one of the next calls
            model(maps())
    assert len(seen) == 1
    assert steps(model) == ["depthwise_conv2d"]


def test_dropout_of_maps_in_training_mode_is_left_to_its_layers():
    model = fk.optimize(nn.Sequential(depthwise(), nn.Dropout2d(0.5))).train()
    model(maps())
    assert "draws random numbers" in fk.report(model).rows[0].runs_on


# ---- Its life ----


@pytest.mark.parametrize("reachable", [False, True], ids=["plain", "reachable from itself"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_model_dies_with_its_last_reference(mode, reachable):
    """Without the garbage collector where plain PyTorch needs none."""
    model = fk.optimize(tiny())
    with mode():
        for _ in range(2):
            model(maps(1, 3, 32, 32))
    assert steps(model)
    if reachable:
        model.called = model.forward
    found = [weakref.ref(model), weakref.ref(model.head), weakref.ref(model.head.weight)]
    gc.disable()
    try:
        del model
        if reachable:
            gc.collect()
        assert [one() is None for one in found] == [True] * 3
    finally:
        gc.enable()


# ---- torch.compile ----


@pytest.fixture
def own_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Own(nn.Module):
    """Of no library: only torch.compile looks into it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*depthwise_norm(act=nn.GELU()))
        self.mixer = mixers.ResidualMixer(mixers.conv_ffn_mixer(8, 7, 2), 8, layer_scale_init=0.5)

    def forward(self, x):
        return self.mixer(self.first(x)).relu()


@pytest.mark.long
@torch.no_grad()
def test_compiled(own_dynamo):
    model = randomised(Own())
    compiled = torch.compile(model, backend=dynamo.backend, fullgraph=True)
    for memory_format in FORMATS.values():
        x = maps().contiguous(memory_format=memory_format)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    for change in (
        lambda: model.first[0].weight.mul_(2),
        lambda: model.first[1].running_mean.add_(1),
        lambda: model.mixer.main.conv.conv1.bn.running_var.mul_(3),
        lambda: model.mixer.layer_scale.fill_(0.7),
        lambda: model.mixer.main.fc1.bias.add_(0.5),
        lambda: setattr(model.first[0], "weight", nn.Parameter(torch.randn(8, 1, 3, 3))),
        lambda: model.load_state_dict(randomised(Own()).state_dict()),
        lambda: (model.train(), model(x), model.eval()),  # moves statistics, and none of their versions
    ):
        before = model(x)
        change()
        assert not torch.allclose(model(x), before, rtol=1e-3)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_what_a_compiled_model_runs(own_dynamo, monkeypatch, training, cast):
    """The operators of training and of inference, autocast or not, in whatever comes after."""
    graphs = []
    monkeypatch.setattr(dynamo, "lookup_backend", lambda _: lambda graph, *_, **__: graphs.append(graph) or graph)
    model = randomised(Own()).train(training)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=dynamo.backend, fullgraph=True)
    for x in (maps(), maps()):
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, expected = compiled(x), plain(x)
            assert torch.is_autocast_enabled("cpu") == cast
        rounding = 0.02 if cast else 1e-4
        torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding * expected.abs().max().item())
        for own, other in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(own, other, rtol=rounding, atol=rounding)
    (graph,) = graphs
    found = [node.target for node in graph.graph.nodes if node.target in kernels.FUSED]
    fused = [kernels.branched_depthwise, kernels.branched_depthwise, kernels.feed_forward]
    assert found == (fused if training else [kernels.depthwise_conv2d, kernels.channel_mixer])


def test_compiled_where_the_graph_switches_autocast(own_dynamo, monkeypatch):
    graphs = []
    monkeypatch.setattr(dynamo, "lookup_backend", lambda _: lambda graph, *_, **__: graphs.append(graph) or graph)
    layer = randomised(depthwise())

    def without(x):
        with torch.autocast("cpu", enabled=False):
            return layer(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(without, backend=dynamo.backend)(maps())
    assert out.dtype == torch.float32
    assert [graph for graph in graphs if any("autocast" in str(node.target) for node in graph.graph.nodes)]


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_compiled_model_trains(own_dynamo, training):
    models = [randomised(Own()).train(training)]
    models.append(copy.deepcopy(models[0]))
    runs = [torch.compile(models[0], backend=dynamo.backend, fullgraph=True), models[1]]
    for step in range(3):
        outs = []
        for model, run in zip(models, runs, strict=True):
            torch.manual_seed(step)
            outs.append(run(maps()))
            model.zero_grad()
            outs[-1].square().mean().backward()
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-4)
        for (name, own), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(
                own.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    parameter.sub_(0.01 * parameter.grad)
    for own, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(depthwise(64), nn.ReLU())

    def forward(self, x):
        y = self.layer(x)
        pooled = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        return torch.cat([y.mean((2, 3)), y.mean((-2, -1), keepdim=True).flatten(1), pooled], 1)


@pytest.mark.long
@torch.no_grad()
def test_compiled_means_of_many_pixels(own_dynamo):
    """Inductor alone adds the pixels of a channels-last map one by one."""
    model = randomised(Means())
    compiled = torch.compile(model, backend=dynamo.backend, fullgraph=True)
    x = torch.rand(1, 64, 112, 112).contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(compiled(x).double(), expected, rtol=0, atol=4e-7 * expected.abs().max().item())


# ---- Single layers, in models of other classes ----


class Layers(nn.Module):
    """Of nobody's library, so that its layers have programs of their own."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        strides = []
        for layer in self.layers:
            x = layer(x)
            strides.append(x.stride())
        return x, strides


@every_format
@torch.no_grad()
def test_layers_of_other_models_keep_the_format_of_the_map(memory_format, monkeypatch):
    monkeypatch.setattr(crossover, "now", crossover.now._replace(little_work=0))
    layers = depthwise(64, 5), nn.Conv2d(64, 48, 1), nn.Sequential(depthwise(48), nn.ReLU6()), nn.Conv2d(48, 64, 1)
    model = randomised(Layers(*layers)).to(memory_format=memory_format)
    x = maps(1, 64, 30, 32).contiguous(memory_format=memory_format)
    expected, plain = copy.deepcopy(model).double()(x.double())[0], model(x)
    fk.optimize(model)
    for _ in range(3):
        out, strides = model(x)
        assert_close(out, expected, plain[0])
        assert strides == plain[1]
    assert len([row for row in fk.report(model).rows if row.runs_on == "a program"]) == 4


@torch.no_grad()
def test_a_layer_of_little_work_stays_with_its_module(caplog):
    model, x = fk.optimize(randomised(Layers(nn.Conv2d(8, 8, 1)))), maps()
    for _ in range(3):
        model(x)
    assert "so small" in str(fk.report(model))
    assert not caplog.records
