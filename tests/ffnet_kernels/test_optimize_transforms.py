"""Derivatives, transforms and modes of torch see of an optimised model what they see of the plain one."""

import pytest
import torch
from contract import MODES, agree, compare, every_model, outcome, quiet, sample, used
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# ---- Derivatives and transforms ----


def call_with(model):
    """The model as a function of its parameters and of its input."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    return parameters, lambda values, x: torch.func.functional_call(model, values, (x,))


def scaled(parameters):
    return {k: 1.5 * p for k, p in parameters.items()}


def with_parameters(model, x):
    parameters, call = call_with(model)
    return call(scaled(parameters), x)


def batches(model, x):
    return torch.func.vmap(model, randomness="same")(torch.stack([x, 2 * x]))


def ensemble(model, x):
    parameters, call = call_with(model)
    stacked = {k: torch.stack([p, 2 * p]) for k, p in parameters.items()}
    return torch.func.vmap(call, in_dims=(0, None))(stacked, x)


def gradient_of_parameters(model, x):
    parameters, call = call_with(model)
    return torch.func.grad(lambda values: call(values, x).square().sum())(parameters)


def dual(model, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))))


def total(model):
    return lambda x: model(x).square().mean((-1, -2)).sum() if model(x).dim() == 4 else model(x).square().sum()


TRANSFORMS = {
    "functional_call": with_parameters,
    "vmap": batches,
    "vmap over models": ensemble,
    "grad": lambda model, x: torch.func.grad(total(model))(x),
    "grad of parameters": gradient_of_parameters,
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: model(x).flatten()[:3])(x),
    "jacfwd": lambda model, x: torch.func.jacfwd(lambda s: model(s * x))(torch.tensor(1.0)),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "dual numbers": dual,
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
    "jacobian": lambda model, x: torch.autograd.functional.jacobian(lambda s: model(s * x), torch.ones(2, 1, 1, 1)),
    "vectorized jacobian": lambda model, x: torch.autograd.functional.jacobian(
        lambda s: model(s * x).flatten()[:4], torch.ones(2, 1, 1, 1), vectorize=True
    ),
    "forward jacobian": lambda model, x: torch.autograd.functional.jacobian(
        lambda s: model(s * x), torch.ones(2, 1, 1, 1), vectorize=True, strategy="forward-mode"
    ),
    "vectorized hessian": lambda model, x: torch.autograd.functional.hessian(
        lambda s: total(model)(s * x), torch.ones(2, 1, 1, 1), vectorize=True
    ),
}


@every_model
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", ["no_grad", "grad"])
def test_transforms(name, transform, mode):
    fast, plain = used(name)
    x = sample(name)[..., :16, :16] if name != "FFNet" else sample(name)
    with quiet(), MODES[mode]():
        got, expected = (outcome(TRANSFORMS[transform], model, x.clone()) for model in (fast, plain))
    compare(got, expected, tolerance=1e-3)
    agree(fast, plain, sample(name))


# ---- Modes that watch ----


class CountsFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class CountsOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class CountsWork:
    def __enter__(self):
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()
        return self

    def __exit__(self, *error):
        self.counter.__exit__(*error)
        self.seen = {key: str(value) for key, value in self.counter.get_flop_counts().items()}
        self.seen["total"] = str(self.counter.get_total_flops())


class ReplacesConvolutions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.conv2d else out


class SavesTensors:
    def __enter__(self):
        self.seen = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: self.seen.append(t.shape) or t, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


WATCHERS = {
    "functions": CountsFunctions,
    "operators": CountsOperators,
    "work": CountsWork,
    "replaced functions": ReplacesConvolutions,
    "saved tensors": SavesTensors,
    "default device": lambda: torch.device("meta"),
    "this device": lambda: torch.device("cpu"),
    "anomalies": torch.autograd.detect_anomaly,
    "deterministic": lambda: torch.backends.mkldnn.flags(enabled=False),
}


@every_model
@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("mode", MODES)
def test_modes_see_what_they_see_of_the_plain_model(name, watcher, mode):
    fast, plain = used(name)
    with quiet():
        agree(fast, plain, sample(name), mode, context=WATCHERS[watcher])
    agree(fast, plain, sample(name), mode)


@every_model
def test_fake_tensors(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fast, plain = used(name)
    outs = []
    for model in (fast, plain):
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            outs.append(outcome(model, fake.from_tensor(sample(name))))
    assert type(outs[0]) is type(outs[1])
    assert outs[0].shape == outs[1].shape
    assert outs[0].stride() == outs[1].stride()
    agree(fast, plain, sample(name))


class Noisy(torch.Tensor):
    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Silent(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


@every_model
@pytest.mark.parametrize("cls", [Noisy, Silent])
@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_weights_of_derived_classes(name, cls, mode):
    fast, plain = used(name)
    outs, calls = [], []
    for model in (plain, fast):
        Noisy.calls.clear()
        with MODES[mode]():
            outs.append(model(sample(name).as_subclass(cls)))
        calls.append(list(Noisy.calls))
    assert calls[0] == calls[1]
    assert type(outs[0]) is type(outs[1])
    compare(*(out.as_subclass(torch.Tensor) for out in reversed(outs)))
    for model in (plain, fast):
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        conv.weight = nn.Parameter(conv.weight.detach().as_subclass(cls) * 2)
    Noisy.calls.clear()
    agree(fast, plain, sample(name), mode)
