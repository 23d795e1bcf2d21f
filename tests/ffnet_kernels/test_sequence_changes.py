"""Whatever changes in a model after its first call, the next one sees it."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import parity
import patience
import pytest
import torch
from sequence_cases import calls, layers_of_a_sequential, one_by_one, optimized_sequential, tiny
from torch import nn
from torch.nn.utils import parametrize

import ffnet_kernels as fk
from ffnet.mixers import TokenMixer
from ffnet_kernels import sequence
from ffnet_kernels.sequence import Sequence

pytestmark = parity.needs_native


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def optimized():
    return optimized_sequential()


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))


def write_into_parameter(model):
    with torch.no_grad():
        model[0].weight.mul_(2)


def write_behind_its_back(model):
    model[0].bias.data.add_(1)


def set_data(model):
    model[3].weight.data = torch.randn_like(model[3].weight)


def drop_bias(model):
    model[0].bias = None


def load(model):
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def load_by_assignment(model):
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_layer(model):
    model[5] = nn.Sequential(nn.Conv2d(32, 8, 3, padding=1))


def replace_inner_layer(model):
    model[5][0] = nn.Conv2d(32, 8, 1)


def append_layer(model):
    model.append(nn.Conv2d(8, 4, 1))


def remove_layer(model):
    del model[6]


def hook_layer(model):
    model[3].register_forward_hook(lambda module, args, out: out * 2)


def hook_before_inner_container(model):
    model[5].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def compute_weight(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[0], "weight", Doubled())


def override_forward(model):
    forward = model[5].forward
    model[5].forward = lambda x: 2 * forward(x)


def change_stride(model):
    model[3].stride = (1, 1)


def change_activation(model):
    model[0].activation = "relu"


def change_class(model):
    class Louder(type(model[6])):
        def forward(self, x):
            return 2 * super().forward(x)

    model[6].__class__ = Louder


def fill_container(model):
    model[7].append(nn.Conv2d(8, 3, 1))


def replace_hooks(model):
    model[3]._forward_hooks = OrderedDict()
    model(torch.randn(2, 6, 15, 11))
    hook_layer(model)


def replace_registry(model):
    model[0]._parameters = dict(model[0]._parameters)
    model(torch.randn(2, 6, 15, 11))
    replace_parameter(model)


CHANGES = [
    change_stride, change_activation, change_class, fill_container, replace_hooks, replace_registry,
    replace_parameter, write_into_parameter, write_behind_its_back, set_data, drop_bias, load, load_by_assignment,
    replace_layer, replace_inner_layer, append_layer, remove_layer, hook_layer, hook_before_inner_container,
    compute_weight, override_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(optimized, change):
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        before = optimized(x)
        change(optimized)
        out = optimized(x)
    assert out.shape != before.shape or not torch.allclose(out, before, rtol=0.01)
    torch.testing.assert_close(out, one_by_one(optimized, x), rtol=1e-5, atol=1e-5)


def test_a_computed_weight_is_computed_in_each_call(optimized):
    compute_weight(optimized)
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        optimized(x)
        optimized[0].parametrizations.weight.original.add_(1)
        torch.testing.assert_close(optimized(x), one_by_one(optimized, x), rtol=1e-5, atol=1e-5)


def test_a_hook_that_is_removed_gives_the_call_back(optimized):
    x = torch.randn(2, 6, 15, 11)
    seen = []
    handle = optimized[3].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert len(calls(optimized, x)[0]) > 1
    assert len(seen) == 1
    handle.remove()
    assert calls(optimized, x)[0] == ["sequence"]


def test_a_hook_on_all_modules_is_called(optimized):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        calls(optimized, torch.randn(2, 6, 15, 11))
    finally:
        handle.remove()
    assert {Sequence, fk.DepthwiseConv2d, fk.ChannelMixer} <= set(seen)


@pytest.mark.parametrize("change", [lambda model: model.train(), lambda model: model[4].train()], ids=["all", "one"])
def test_dropout_in_training_mode_drops(optimized, change):
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        optimized(x)
        change(optimized)
        assert not torch.equal(optimized(x), optimized(x))
        optimized.eval()
    assert calls(optimized, x)[0] == ["sequence"]


def doubled(method):
    return lambda *args: 2 * method(*args)


class Louder(TokenMixer):
    def fused_forward(self, x, residual):
        return super().fused_forward(x, None)


MODEL_CHANGES = {
    "head": lambda model: model.reset_classifier(5),
    "no head": lambda model: model.reset_classifier(0),
    "mixer": lambda model: setattr(model.stages[1][1], "channel_mixer", nn.Identity()),
    "statistics": lambda model: model.norm.running_mean.add_(1),
    "replaced statistics": lambda model: setattr(model.norm, "running_var", torch.rand(48) + 1),
    "eps": lambda model: setattr(model.norm, "eps", 1.0),
    "norm": lambda model: setattr(model, "norm", nn.BatchNorm2d(48).eval()),
    "hook": lambda model: model.head.register_forward_hook(lambda module, args, result: result + 1),
    "head's forward": lambda model: setattr(model.head, "forward", doubled(model.head.forward)),
    "norm's forward": lambda model: setattr(model.norm, "forward", doubled(model.norm.forward)),
    "features": lambda model: setattr(model, "forward_features", doubled(model.forward_features)),
    "forward_head": lambda model: setattr(model, "forward_head", doubled(model.forward_head)),
    "class": lambda model: setattr(model.stages[1][1].token_mixer[0], "__class__", Louder),
}


@pytest.mark.parametrize("change", MODEL_CHANGES.values(), ids=MODEL_CHANGES.keys())
def test_a_change_in_a_model_is_seen(change):
    model, x = fk.optimize(tiny()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        change(model)
        out = model(x)
    assert out.shape != before.shape or not torch.allclose(out, before, rtol=0.01)
    torch.testing.assert_close(out, one_by_one(model, x), rtol=1e-4, atol=1e-4)


def test_kernels_that_are_switched_off_are_not_called():
    model, x = fk.optimize(tiny()), torch.randn(1, 3, 32, 32)
    assert calls(model, x)[0] == ["sequence"]
    model.stages[0][0].channel_mixer.kernels_enabled = False
    assert "channel_mixer" not in calls(model, x)[0][:3]
    assert calls(model, x)[0] != ["sequence"]


def test_a_refusal_is_remembered_until_something_changes():
    model, x = fk.optimize(tiny(num_classes=0)), torch.randn(1, 3, 32, 32)
    for _ in range(2):  # in the first the stages collect their own
        calls(model, x)
    layers = model.__dict__[sequence._COLLECTED].layers
    assert set(calls(model, x)[0]) == {"sequence"}
    assert model.__dict__[sequence._COLLECTED].layers is layers
    model.reset_classifier(3)
    model.eval()
    assert calls(model, x)[0] == ["sequence"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_stands_alone(optimized, copied):
    x = torch.randn(2, 6, 15, 11)
    with torch.no_grad():
        before = optimized(x)
        other = copied(optimized)
        assert torch.equal(other(x), before)
        other[0].weight.zero_()
        assert not torch.allclose(other(x), before)
        assert torch.equal(optimized(x), before)


def test_other_dtypes_follow(optimized):
    x = torch.randn(2, 6, 15, 11)
    calls(optimized, x)
    names, out = calls(optimized.bfloat16(), x.bfloat16())
    assert names == ["sequence"]
    assert out.dtype == torch.bfloat16
    assert calls(optimized.double(), x.double())[0] == []  # plain PyTorch


def test_threads_share_a_model():
    model, x = fk.optimize(tiny()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    barrier, interval = threading.Barrier(6, timeout=patience.LIMIT), sys.getswitchinterval()

    def work(_):
        same = True
        with torch.no_grad():
            for _ in range(20):
                barrier.wait()
                model.__dict__.pop(sequence._COLLECTED, None)
                same &= torch.equal(model(x), expected)
        return same

    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(6)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("reachable", [False, True], ids=["plain", "reachable from itself"])
def test_it_is_freed_with_its_module(reachable):
    model = fk.optimize(layers_of_a_sequential())
    calls(model, torch.randn(2, 6, 15, 11))
    if reachable:
        model.called = model.forward
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None
