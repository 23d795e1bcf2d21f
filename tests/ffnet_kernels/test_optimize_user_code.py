"""`optimize` and user code: whatever reads, wraps, counts or changes maps and layers sees the plain model's."""

import collections
import functools
import random
import types
import warnings

import edits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import MODES, Block, agree, depthwise, randomised, twins
from torch import nn

import ffnet
import ffnet_kernels as fk

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def body() -> nn.Sequential:
    return nn.Sequential(
        depthwise(bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1), nn.ReLU(), depthwise()
    )


class WithBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body()


class KeepsPreActivation(WithBody):
    def forward(self, x):
        self.pre = self.body[1](self.body[0](x))
        y = self.body[2:](self.pre)
        return y, self.pre


class CutInTwo(WithBody):
    def forward(self, x):
        middle = self.body[:3](x)
        return self.body[3:](middle) + middle


class LoopsOverChildren(WithBody):
    def forward(self, x):
        kept = {}
        for name, layer in self.body.named_children():
            kept[name] = x = layer(x)
        return kept


class CountsDown(WithBody):
    def forward(self, x):
        for layer in reversed(self.body):
            x = layer(x)
        return x


class ReadsWeights(WithBody):
    def forward(self, x):
        conv = self.body[0]
        y = F.conv2d(x, conv.weight.flip(2), conv.bias, padding=1, groups=8)
        return self.body(y) * self.body[3].weight.norm()


class ThroughProperty(WithBody):
    @property
    def stem(self):
        return self.body[:2]

    def forward(self, x):
        return self.stem(x) - self.body(x)


class ThroughList(WithBody):
    def __init__(self):
        super().__init__()
        self.hidden = [self.body[0], self.body[2]]

    def forward(self, x):
        return self.body(x) + self.hidden[1](self.hidden[0](x))


class NestedFunction(WithBody):
    def forward(self, x):
        maps = []

        def step(layer, y):
            maps.append(y)
            return layer(y)

        return functools.reduce(lambda y, layer: step(layer, y), self.body, x), maps


class DependsOnData(WithBody):
    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body[5](self.body[0](x))


class DependsOnShape(WithBody):
    def forward(self, x):
        return self.body(x) if x.shape[-1] % 2 else F.interpolate(self.body(x), scale_factor=2)


class DependsOnGradMode(WithBody):
    def forward(self, x):
        return self.body(x) * (2 if torch.is_grad_enabled() else 3)


class Counts(WithBody):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls


class DrawsNoise(WithBody):
    def forward(self, x):
        return self.body(x) + torch.rand(())


class WritesWeights(WithBody):
    """The first layer's result sets the last one's weight, as hypernetworks do."""

    def forward(self, x):
        y = self.body[:3](x)
        with torch.no_grad():
            self.body[5].weight.copy_(y.detach().mean() + torch.arange(72.0).view(8, 1, 3, 3) / 72)
            self.body[1].running_mean.add_(0.125)
        return self.body(x)


class WritesByHook(WithBody):
    def __init__(self):
        super().__init__()
        self.body[2].register_forward_hook(self.write)

    def write(self, module, inputs, out):
        with torch.no_grad():
            self.body[3].weight.mul_(0.9)

    def forward(self, x):
        return self.body(x)


class EditsOnTheWay(WithBody):
    def forward(self, x):
        self.body[0].stride = (2, 2) if x.shape[-1] > 8 else (1, 1)
        return self.body(x)


class Views(WithBody):
    """Asks for maps by ``view``, which depends on strides."""

    def forward(self, x):
        y = self.body[0](x)
        rows = y.view(len(x), -1) if y.is_contiguous() else y.permute(0, 2, 3, 1).reshape(len(x), -1)
        return self.body(x).view(len(x), 8, -1), rows, y.stride()


class InPlace(WithBody):
    def forward(self, x):
        y = self.body[0](x)
        y += 1
        z = self.body(y)
        z.relu_()
        return z, y


class Decorated(WithBody):
    def noticed(function):
        @functools.wraps(function)
        def wrapper(self, x):
            self.size = x.shape[-1]
            return function(self, x) * 0.5

        return wrapper

    @noticed
    def forward(self, x):
        return self.body(x)


class OwnCall(WithBody):
    def __call__(self, x):
        return super().__call__(x) + 1

    def forward(self, x):
        return self.body(x)


class PassesAttributesOn(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or body()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        return iter(self.inner)

    def forward(self, x):
        return 2 * self.inner(x)


class OwnSequential(nn.Sequential):
    def __init__(self):
        super().__init__(*body())

    def forward(self, x):
        for layer in list(self)[::2]:
            x = layer(x) + x
        return x


class OwnConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.roll(1, 2))


class OwnWeight(nn.Conv2d):
    """Weight standardisation."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class WeightAsProperty(nn.Conv2d):
    @property
    def bias(self):
        return self.shift * 2

    @bias.setter
    def bias(self, value):
        self.shift = value


class OwnActivation(nn.GELU):
    pass


class OwnNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        if input.shape[-1] == 5:
            raise LookupError("five")


def around(layer):
    return nn.Sequential(depthwise(), layer, nn.GELU(), nn.Conv2d(8, 8, 1))


def same_activation_twice():
    act = nn.GELU()
    return nn.Sequential(depthwise(), act, depthwise(), act, act)


def same_conv_twice():
    conv = depthwise()
    return nn.Sequential(conv, nn.ReLU(), conv, nn.GELU(), nn.Sequential(conv, nn.BatchNorm2d(8)))


def one_norm_behind_two():
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(depthwise(), norm, nn.GELU(), nn.Conv2d(8, 8, 1), norm)


def tied_weights():
    model = body()
    model[5].weight = model[0].weight
    return model


def parameter_as_buffer():
    model = body()
    weight = model[5]._parameters.pop("weight")
    model[5].register_buffer("weight", weight.detach())
    return model


def weight_as_attribute():
    model = body()
    weight = model[0]._parameters.pop("weight")
    model[0].weight = weight.detach() * 2
    return model


def module_none():
    model = Block()
    model.downsample = None
    return model


USER_CODE = (
    {
        cls.__name__: cls
        for cls in (
            KeepsPreActivation,
            CutInTwo,
            LoopsOverChildren,
            CountsDown,
            ReadsWeights,
            ThroughProperty,
            ThroughList,
        )
    }
    | {
        cls.__name__: cls
        for cls in (NestedFunction, DependsOnData, DependsOnShape, DependsOnGradMode, Counts, DrawsNoise, WritesWeights)
    }
    | {
        cls.__name__: cls
        for cls in (WritesByHook, EditsOnTheWay, Views, InPlace, Decorated, OwnCall, PassesAttributesOn, OwnSequential)
    }
)
USER_CODE |= {
    "OwnConvolution": lambda: around(OwnConvolution(8, 8, 3, groups=8)),
    "OwnWeight": lambda: around(OwnWeight(8, 8, 3, groups=8)),
    "WeightAsProperty": lambda: around(WeightAsProperty(8, 8, 3, groups=8)),
    "OwnActivation": lambda: around(OwnActivation()),
    "OwnNorm": lambda: around(OwnNorm(8)),
    "SyncBatchNorm": lambda: around(nn.SyncBatchNorm(8)),
    "NoAffine": lambda: around(nn.BatchNorm2d(8, affine=False)),
    "NoStatistics": lambda: around(nn.BatchNorm2d(8, track_running_stats=False)),
    "NormOfOtherChannels": lambda: around(nn.BatchNorm2d(1)),
    "NormFirst": lambda: nn.Sequential(nn.BatchNorm2d(8), depthwise(padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)),
    "InstanceNorm": lambda: around(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "Transposed": lambda: around(nn.ConvTranspose2d(8, 8, 3, groups=8)),
    "InPlaceFirst": lambda: nn.Sequential(nn.ReLU(inplace=True), body()),
    "InPlaceInside": lambda: nn.Sequential(depthwise(), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), depthwise()),
    "Complex": lambda: nn.Sequential(depthwise(dtype=torch.complex64)),
    "MixedTypes": lambda: nn.Sequential(depthwise(), depthwise().double()),
    "MixedNorm": lambda: nn.Sequential(depthwise().bfloat16(), nn.BatchNorm2d(8)),
    "NumpyGeometry": lambda: nn.Sequential(depthwise(stride=np.int64(2), padding=(np.int32(1), np.int64(2)))),
    "ListGeometry": lambda: nn.Sequential(depthwise(stride=[2, 1], padding=[1, 0], dilation=[1, 2])),
    "WrongChannels": lambda: nn.Sequential(nn.Conv2d(8, 4, 1), depthwise()),
    "same_activation_twice": same_activation_twice,
    "same_conv_twice": same_conv_twice,
    "one_norm_behind_two": one_norm_behind_two,
    "tied_weights": tied_weights,
    "parameter_as_buffer": parameter_as_buffer,
    "weight_as_attribute": weight_as_attribute,
    "module_none": module_none,
    "FFNet": lambda: ffnet.FFNet((1, 1), (8, 16), (3, 7), 7, 2, 8, num_classes=3, in_chans=8),
    "WrappedFFNet": lambda: nn.Sequential(PassesAttributesOn(USER_CODE["FFNet"]()), nn.Softmax(1)),
}
every_code = pytest.mark.parametrize("make", USER_CODE.values(), ids=USER_CODE)


def made(make):
    return lambda: randomised(make())


@every_code
def test_user_code(make):
    fast, plain = twins(made(make))
    inputs = [X, X.contiguous(memory_format=torch.channels_last), -X[:1, :, :6, :8], X[..., :5], X[:, :4], X.bfloat16()]
    inputs += [X.to(torch.complex64)]
    for x in inputs:
        for mode in MODES:
            agree(fast, plain, x, mode)
    assert vars(fast).get("calls") == vars(plain).get("calls")
    for model in (plain, fast):
        model.train()
    agree(fast, plain, X, "grad")
    for model in (plain, fast):
        model.eval()
    agree(fast, plain, X)


@every_code
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))])
def test_user_code_edited(make, seed):
    """Some edits one after another."""
    fast, plain = twins(made(make))
    r = random.Random(seed)
    for step in range(4):
        agree(fast, plain, X, r.choice(list(MODES)))
        name = r.choice(list(edits.EDITS))
        done = [edits.apply(edits.EDITS[name], model, 10 * seed + step) for model in (plain, fast)]
        assert done[0] == done[1]
        agree(fast, plain, X, r.choice(list(MODES)))


def test_user_code_is_not_called_by_optimize():
    calls = collections.Counter()

    class Watchful(WithBody):
        def __init__(self):
            super().__init__()
            self.maps: list = []

        @property
        def depth(self):
            calls["property"] += 1
            return 3

        def __getattr__(self, name):
            if name not in ("body",):
                calls[name] += 1
            return super().__getattr__(name)

        def __iter__(self):
            calls["iter"] += 1
            return iter(self.body)

        def __len__(self):
            calls["len"] += 1
            return 6

        def __bool__(self):
            calls["bool"] += 1
            return False

        def __eq__(self, other):
            calls["eq"] += 1
            return self is other

        def __hash__(self):
            return id(self)

        def __deepcopy__(self, memo):
            calls["deepcopy"] += 1
            return self

        def extra_repr(self):
            calls["repr"] += 1
            return ""

        def forward(self, x):
            calls["forward"] += 1
            self.maps.append(x)
            return self.body(x)

    model = randomised(nn.Sequential(Watchful(), body(), Watchful()))
    calls.clear()
    fk.optimize(model)
    assert not {name: n for name, n in calls.items() if not name.startswith("__")}
    with torch.no_grad():
        model(X)
    assert model[0].maps[0] is X
    assert len(model[2].maps) == calls["forward"] - 1 == 1


def states():
    """Of all that may draw random numbers, and the settings of the process."""
    settings = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
    )
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy_state, random.getstate(), settings


@pytest.mark.parametrize("make", [body, Block, DrawsNoise, USER_CODE["FFNet"]])
@pytest.mark.parametrize("function", ["optimize", "refresh", "report", "restore"])
def test_nothing_else_is_touched(make, function):
    model = randomised(make())
    if function != "optimize":
        fk.optimize(model)
    before = states()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fk, function)(model)
    assert states() == before


def test_patched_on_an_instance_before_and_after():
    def tripled(self, x):
        return 3 * type(self).forward(self, x)

    def patch(model):
        for module in model.modules():
            module.forward = types.MethodType(tripled, module)

    fast, plain = twins(made(body), patch)
    for mode in MODES:
        agree(fast, plain, X, mode)
    for model in (plain, fast):
        for module in model.modules():
            del module.forward
    for mode in MODES:
        agree(fast, plain, X, mode)
    for model in (plain, fast):
        patch(model)
    for mode in MODES:
        agree(fast, plain, X, mode)


@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "gelu", "hardswish"])
def test_patched_functions_of_pytorch(name, monkeypatch):
    """Tools that count or rewrite patch them; they see every call, on tensors."""
    original, seen = getattr(F, name), []

    def doubled(x, *args, **kwargs):
        seen.append(type(x))
        return 2 * original(x, *args, **kwargs)

    fast, plain = twins(made(lambda: nn.Sequential(body(), nn.Hardswish())))
    for patch in (None, doubled, original, doubled):
        if patch is not None:
            monkeypatch.setattr(F, name, patch)
        for mode in MODES:
            agree(fast, plain, X, mode)
    assert set(seen) == {torch.Tensor}
    fk.optimize(plain)
    with torch.no_grad():
        before = len(seen)
        plain(X)
        assert len(seen) - before == {"conv2d": 3}.get(name, 1)


EXECUTED = """
class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x * 2

class Twice:
    calls = 0

    def __call__(self, x, *args, **kwargs):
        self.calls += 1
        return x * 2
"""


def executed():
    """Classes that have no module but Python's own."""
    scope = {"nn": nn}
    exec(EXECUTED, scope)
    assert scope["Counting"].__module__ == "builtins"
    return scope["Counting"], scope["Twice"]


def test_classes_without_a_module():
    counting, _ = executed()
    optimised, plain = twins(lambda: nn.Sequential(depthwise(), counting()).eval())
    for _ in range(3):
        agree(optimised, plain, X, "no_grad")
    assert counting.calls == 6  # three of each
    assert not fk.report(optimised).rows[0].runs_on.startswith("a program")


def test_patches_of_classes_without_a_module(monkeypatch):
    patch = executed()[1]()
    monkeypatch.setattr(F, "gelu", patch)
    models = twins(lambda: body().eval())
    for _ in range(3):
        agree(*models, X, "no_grad")
    assert patch.calls == 6  # three of each
