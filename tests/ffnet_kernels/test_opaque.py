"""``torch.compile`` of an optimised model: its graph calls the model's program, in every later state of the model."""

import copy

import pytest
import torch
from contract import MODES, agree, autocast, randomised, twins
from torch import nn

import ffnet
import ffnet_kernels as fk

RUN = torch.ops.ffnet_kernels_modules.run


@pytest.fixture(autouse=True)
def own_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Kept:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module.graph)
        return module

    def calls(self):
        """Of the operator, by the graph."""
        return [[node.target for node in graph.nodes].count(RUN) for graph in self.graphs]

    def pair(self, fast, plain, **options):
        """Both compiled."""
        return tuple(torch.compile(model, backend=self, fullgraph=True, **options) for model in (fast, plain))


def small():
    """A model of a class that is not torch's own, for several sizes of maps."""
    return randomised(ffnet.FFNet((1,), (8,), token_kernels=(3,), stem_width=8, num_classes=5))


def maps(*shape):
    return torch.randn(shape or (2, 3, 16, 16))


def changed(model, change):
    torch.manual_seed(0)
    with torch.no_grad():
        change(model)


@pytest.mark.parametrize("mode", MODES)
def test_graph_calls_the_program(mode):
    fast, plain = twins(small)
    kept = Kept()
    pair = kept.pair(fast, plain)
    for _ in range(2):
        agree(*pair, maps(), mode)
    assert kept.calls() == [0, int(mode != "grad")]
    if mode != "grad":
        assert fast._compiled_call_impl.ways[0].program is not None
        nodes = [node.op for node in kept.graphs[1].nodes]
        assert nodes == ["placeholder", "placeholder", "call_function", "output"]  # nothing of the modules


def test_later_changes():
    fast, plain = twins(small)
    kept = Kept()
    pair, x = kept.pair(fast, plain), maps()
    seen = []
    for change in (
        lambda model: model.head.weight.mul_(2),
        lambda model: model.norm.running_mean.add_(1),
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8))),
        lambda model: model.reset_classifier(3) or randomised(model.head),
        lambda model: setattr(model.head, "bias", nn.Parameter(torch.ones(3))),
        lambda model: model.stages[0].insert(0, nn.ReLU()),
        lambda model: model.double(),
        lambda model: model.float(),
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: setattr(model, "norm", nn.Identity()),
        lambda model: model.norm.register_forward_hook(lambda *_: seen.append(0)),
    ):
        for model in (fast, plain):
            changed(model, change)
        x = x.to(fast.head.weight.dtype)
        agree(*pair, x)


def test_hooks_see_one_call():
    """What runs beside the result runs once: the modules are traced, too."""
    fast, _ = twins(small)
    seen = []
    fast.norm.register_forward_hook(lambda *_: seen.append(0))
    kept = Kept()
    with torch.no_grad():
        kept.pair(fast, fast)[0](maps())
    assert len(seen) == 1
    assert set(kept.calls()) == {0}


def test_statistics_move_once():
    fast, plain = twins(small)
    fast.train(), plain.train()
    kept = Kept()
    agree(*kept.pair(fast, plain), maps())
    assert set(kept.calls()) == {0}
    assert plain.norm.num_batches_tracked == fast.norm.num_batches_tracked == 1


@pytest.mark.long
def test_any_size():
    """Dynamic shapes stay dynamic."""
    fast, plain = twins(small)
    kept = Kept()
    pair = kept.pair(fast, plain, dynamic=True)
    for shape in ((2, 3, 16, 16), (3, 3, 24, 17), (5, 3, 33, 12)):
        agree(*pair, maps(*shape))
        agree(*pair, maps(*shape).contiguous(memory_format=torch.channels_last))
    assert kept.calls().count(1) == kept.calls().count(0)  # as many graphs as of the plain model


def test_a_model_whose_program_is_given_up_is_compiled_as_it_is():
    kept, pair = Kept(), twins(small)
    compiled = kept.pair(*pair)
    agree(*compiled, maps())
    pair[0]._compiled_call_impl.ways[0].refuse("it is not what the modules are")
    agree(*compiled, maps())
    assert sorted(kept.calls()) == [0, 0, 1]  # of the plain model, and twice of the other


def test_restored():
    fast, plain = twins(small)
    kept = Kept()
    pair, x = kept.pair(fast, plain), maps()
    agree(*pair, x)
    fk.restore(fast)
    agree(*pair, x)


def test_autocast():
    kept, pair = Kept(), twins(small)
    for dtype in (torch.bfloat16, torch.float16):
        agree(*kept.pair(*pair), maps(), context=lambda dtype=dtype: autocast(dtype))
    assert set(kept.calls()) == {0}


def test_models_of_one_class_share_a_graph():
    """Else the tenth would meet torch.compile's limit; each calls its own module."""
    kept = Kept()
    for seed in range(10):
        torch.manual_seed(seed)
        model = small()
        agree(*kept.pair(fk.optimize(copy.deepcopy(model)), model), maps())
        fk.optimize(fk.restore(model))
    assert kept.calls() == [0, 1] or kept.calls() == [1, 0]


@pytest.mark.parametrize(
    "layer", [nn.SiLU(inplace=True), nn.FractionalMaxPool2d(2, output_size=(12, 12))], ids=["in place", "draws"]
)
def test_effects_happen_once(layer):
    """On the map itself, and of random numbers drawn in eval mode, too."""
    fast, plain = twins(small)
    for model in (fast, plain):
        model.patch_embed[0].c = nn.Sequential(copy.deepcopy(layer), model.patch_embed[0].c)
    kept = Kept()
    pair = kept.pair(fast, plain)
    for _ in range(2):
        agree(*pair, maps())
    assert set(kept.calls()) == {0}


def test_a_function_that_changes_the_model():
    """What is traced before a call takes effect after it: the model is computed as it is traced."""
    fast, plain = twins(small)

    def step(model, x):
        model.head.weight.mul_(3.0)
        return model.__call__(x)

    x = maps()
    with torch.no_grad():
        found, expected = (torch.compile(step, backend="aot_eager")(model, x) for model in (fast, plain))
    torch.testing.assert_close(found, expected)


def test_meta_device():
    fast, plain = twins(lambda: small().to("meta"))
    agree(*Kept().pair(fast, plain), maps().to("meta"))


def test_copies_are_plain():
    fast, plain = twins(small)
    kept = Kept()
    agree(*kept.pair(copy.deepcopy(fast), plain), maps())
    assert set(kept.calls()) == {0}


def test_a_graph_of_another_process():
    """Its modules have other keys here."""
    with pytest.raises(RuntimeError, match="compile the model again"):
        RUN(torch.ones(1, 8, 4, 4), torch.tensor(1), [1, 5], [5, 1])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["ffnet_kernels", "inductor"])
def test_backends(backend):
    fast, plain = twins(small)
    pair = torch.compile(fast, backend=backend, fullgraph=True), torch.compile(plain, backend="eager")
    agree(*pair, maps())
    agree(*pair, maps(), "grad")
