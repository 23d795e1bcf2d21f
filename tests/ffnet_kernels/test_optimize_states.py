"""States of an optimised model, and of PyTorch, that look like those its program was made of, and are not."""

import copy
import functools
import threading
from collections import OrderedDict
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from contract import agree
from patterns_zoo import of_a_library
from torch import nn

import ffnet_kernels as fk
from ffnet import layers
from ffnet.mixers import ResidualMixer

X = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def block(inputs, outputs, kernel, groups=1, act=nn.GELU):
    return [
        nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        act(),
    ]


def net():
    return nn.Sequential(*block(8, 16, 1), *block(16, 16, 7, 16), nn.Conv2d(16, 8, 1), nn.PReLU()).eval()


def pair(model):
    plain = copy.deepcopy(model)
    return fk.optimize(model), plain


def alike(models, mode="no_grad", x=X, times=3):
    for _ in range(times):
        agree(*models, x, mode)


def runs_a_program(model) -> bool:
    return fk.report(model).rows[0].runs_on.startswith("a program")


# ---- Changes that compare as equal ----


def reordered(model):
    first = model._modules.pop("1")
    model._modules["1"] = first


def one_value_replaced(model):
    model[7].weight = nn.Parameter(torch.tensor([0.25]))  # what PReLU begins with


def hooks_replaced(model):
    model[0]._forward_hooks = OrderedDict()


def registry_replaced(model):
    model._modules = dict(model._modules)


def stride_of_another_type(model):
    model[3].stride = (1.0, 1.0)


def rounded(model):
    model[3].bfloat16().float()


def half_converted(model):
    model[3].half()


def swapped(model):
    torch.manual_seed(1)
    torch.utils.swap_tensors(model[3].weight, nn.Conv2d(16, 16, 7, padding=3, groups=16, bias=False).weight)


def assigned_by_swapping(model):
    torch.manual_seed(1)
    state = net().state_dict()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state, assign=True)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def vectorised(model):
    torch.manual_seed(1)
    vector = nn.utils.parameters_to_vector(net().parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())


def nothing(model):
    pass


AFTERWARDS = {
    one_value_replaced: lambda model: nn.init.constant_(model[7].weight, 0.9),
    hooks_replaced: lambda model: model[0].register_forward_hook(lambda module, args, out: out * 2),
    registry_replaced: lambda model: model.__setitem__(2, nn.Sigmoid()),
}


@pytest.mark.parametrize("mode", ["no_grad", "grad"])
@pytest.mark.parametrize(
    "change",
    [
        reordered, one_value_replaced, hooks_replaced, registry_replaced, stride_of_another_type, rounded,
        half_converted, swapped, assigned_by_swapping, vectorised,
    ],
)  # fmt: skip
def test_changes_that_compare_as_equal(change, mode):
    models = pair(net())
    alike(models, mode)
    for model in models:
        change(model)
    alike(models, mode)
    for model in models:
        AFTERWARDS.get(change, nothing)(model)
    alike(models, mode)


def test_memory_that_somebody_else_holds():
    skip = layers.SkipConv(8)
    skip.conv.bn, skip.conv.c = nn.Identity(), nn.Conv2d(8, 8, 1)  # folded, and of no running statistics
    models = pair(nn.Sequential(skip, nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval())
    alike(models)
    held = [model.state_dict() for model in models]
    for model in models:
        model.bfloat16().float()
    alike(models)
    assert held[0].keys() == held[1].keys()


def test_functional_call_with_a_parameter_of_one_value():
    models = pair(net())
    alike(models, "grad")
    slope = torch.tensor([0.25], requires_grad=True)
    found = [torch.func.functional_call(model, {"7.weight": slope}, X).sum() for model in models]
    grads = [torch.autograd.grad(total, slope)[0] for total in found]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers_that_pytorch_does_not_see(kind):
    """Fused ones, between calls without gradients in eval mode: normalisations are frozen, and folded."""
    models = pair(net())
    alike(models)
    optimizers = [kind(model.parameters(), 1e-2, fused=True) for model in models]
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models[0].load_state_dict(models[1].state_dict())  # sizes of steps multiply rounding
        alike(models)


def test_a_fold_beyond_float16():
    models = pair(nn.Sequential(*block(8, 8, 3, 8)).half().eval())
    x = (X * 1e-3).half()
    alike(models, x=x)
    with torch.no_grad():
        for model in models:
            model[0].weight.fill_(300.0)
            model[1].running_var.fill_(1e-6)
    alike(models, x=x)


class Tenfold(torch.Tensor):
    """Kept at a tenth, and multiplied where a convolution reads it."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        cls.seen.append(name)
        with torch._C.DisableTorchFunctionSubclass():
            if name == "conv2d":
                args = [a.as_subclass(torch.Tensor) * 10 if isinstance(a, Tenfold) else a for a in args]
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["no_grad", "grad"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_weights_of_derived_classes(mode, when):
    models = pair(net())
    if when == "later":
        alike(models, mode)
    found = []
    for model in models:
        model[3]._parameters["weight"] = (model[3].weight.detach() / 10).as_subclass(Tenfold).requires_grad_()
        Tenfold.seen.clear()
        for _ in range(3):
            with torch.set_grad_enabled(mode == "grad"):
                out = model(X)
        found.append((out.detach(), list(Tenfold.seen)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_an_empty_map_first():
    models = pair(net())
    alike(models, x=X[:0])
    alike(models)
    assert runs_a_program(models[0])


# ---- Code from elsewhere ----


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("mode", ["no_grad", "grad"])
@pytest.mark.parametrize(
    ("holder", "name"),
    [
        (F, "gelu"), (F, "batch_norm"), (nn.Conv2d, "forward"), (nn.BatchNorm2d, "forward"), (torch, "conv2d"),
        (torch, "batch_norm"), (torch.Tensor, "__add__"), (layers.SkipConv, "forward"),
    ],
)  # fmt: skip
def test_patches_that_bear_another_name(holder, name, mode, when, monkeypatch):
    old, seen = getattr(holder, name), []

    @functools.wraps(old)
    def new(*args, **kwargs):
        seen.append([type(a).__name__ for a in args])
        return old(*args, **kwargs) * 2

    models = pair(nn.Sequential(*net(), layers.SkipConv(8)).train(mode == "grad"))
    if when == "later":
        alike(models, mode)
    monkeypatch.setattr(holder, name, new)
    called = []
    for model in models:
        for _ in range(3):
            seen.clear()
            with torch.set_grad_enabled(mode == "grad"):
                model(X)
            called.append(list(seen))
    assert called[:3] == called[3:]
    for model in models:
        model.load_state_dict(models[1].state_dict())
    alike(models, mode)


class Callable:
    def __init__(self, function):
        self.function = function

    def method(self, x, **kwargs):
        return self.function(x, **kwargs)


WRAPS = {
    "lru_cache": functools.lru_cache,
    "a mock": lambda function: Mock(wraps=function),
    "a partial": lambda function: functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False),
    "no_grad": torch.no_grad(),
    "a bound method": lambda function: Callable(function).method,
    "a method of a module": lambda function: type("Act", (nn.Module,), {"forward": staticmethod(function)})().__call__,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("when", ["before", "later"])
def test_functions_wrapped_by_objects_of_the_standard_library(wrap, when, monkeypatch):
    models, old, seen = pair(net()), F.gelu, []

    def new(x, **kwargs):
        seen.append(type(x).__name__)
        return old(x, **kwargs)

    if when == "later":
        alike(models)
    monkeypatch.setattr(F, "gelu", wrap(new))
    alike(models)
    assert set(seen) == {"Tensor"}
    assert len(seen) == 12


class Tripled(torch.autograd.Function):
    """A backward pass of the user's."""

    @staticmethod
    def forward(ctx, x):
        return x * 0.5

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("place", ["function", "partialmethod", "lru_cache", "singledispatchmethod"])
def test_functions_with_gradients_of_the_users(place, when, monkeypatch):
    models = pair(nn.Sequential(*block(8, 16, 1, act=nn.Softsign), *block(16, 16, 7, 16, act=nn.Softsign)).eval())
    if when == "later":
        alike(models, "grad")
    if place == "function":
        monkeypatch.setattr(F, "softsign", Tripled.apply)
    else:
        wrap = getattr(functools, place)
        monkeypatch.setattr(nn.Softsign, "forward", wrap(lambda module, x: Tripled.apply(x)))
    alike(models, "grad")


def test_what_pytorch_adds_to_itself_does_not_count(monkeypatch):
    models = pair(net())
    alike(models)
    program = models[0]._compiled_call_impl.ways[False].program
    monkeypatch.setattr(torch.Tensor, "something_new", 1, raising=False)
    monkeypatch.setattr(torch, "manual_seed", functools.wraps(torch.manual_seed)(lambda seed: None))
    alike(models)
    assert models[0]._compiled_call_impl.ways[False].program is program
    monkeypatch.setattr(torch.Tensor, "add", lambda a, b: torch.add(a, b), raising=False)
    models[0](X)
    assert not program.state.is_current(models[0])


def test_a_property_of_a_class_patched_later(monkeypatch):
    models = pair(nn.Sequential(*block(8, 8, 1), layers.DropPath(0.5), *block(8, 8, 7, 8)).eval())
    alike(models)
    monkeypatch.setattr(layers.DropPath, "active", property(lambda self: True))
    alike(models)


def test_a_function_of_a_library_patched(monkeypatch):
    models = pair(nn.Sequential(*block(8, 8, 1), layers.LayerNorm2d(8), *block(8, 8, 7, 8)).eval())
    alike(models)
    assert runs_a_program(models[0])
    monkeypatch.setattr(layers.F, "layer_norm", lambda x, *args: x)
    alike(models)


class Watched(nn.Module):
    log: ClassVar[list] = []

    def __del__(self):
        self.log.append("__del__")

    def __hash__(self):
        self.log.append("__hash__")
        return id(self)

    def named_modules(self, *args, **kwargs):
        self.log.append("named_modules")
        return super().named_modules(*args, **kwargs)

    def forward(self, x):
        return x


class Equal:
    def __eq__(self, other):
        Watched.log.append("__eq__")
        return True

    def __hash__(self):
        Watched.log.append("Equal.__hash__")
        return 1


def test_no_method_of_a_users_runs():
    model = nn.Sequential(*net(), Watched()).eval()
    model[3].tag, model[3].tags, model[3].by_tag = Equal(), {Equal()}, {Equal(): 1}
    Watched.log.clear()
    fk.optimize(model)
    with torch.no_grad():
        for _ in range(3):
            model(X)
        model[3].tag = Equal()
        model(X)
    assert Watched.log == []


def test_random_numbers_of_other_threads_are_theirs():
    drawn, done = [], threading.Event()

    def draw():
        while not done.is_set():
            drawn.append(torch.randint(0, 2**62, (1,)).item())

    thread = threading.Thread(target=draw)
    thread.start()
    with torch.no_grad():
        for _ in range(10):
            fk.optimize(net())(X)
    done.set()
    thread.join()
    assert len(set(drawn)) == len(drawn)


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_layer_made_of_anothers_attributes(when):
    models = pair(net())
    if when == "later":
        alike(models)
    kept = []
    for model in models:
        other = Twice.__new__(Twice)
        other.__dict__.update(model[3].__dict__)
        kept.append(model[3])
        model[3] = other
    alike(models)
    kept.clear()
    alike(models)
    alike((fk.optimize(models[0]), models[1]))


# ---- What is checked in the first call ----


@pytest.mark.parametrize("first", [torch.zeros_like(X), torch.full_like(X, torch.nan), torch.ones_like(X)])
def test_branches_that_do_not_fit_into_each_other(first):
    branches = layers.BranchedDepthwise(8, 8, 7, 3)
    branches.conv.c = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    branches.conv1.c = nn.Conv2d(8, 8, (4, 3), padding="same", groups=8, bias=False)
    models = pair(branches.eval())
    agree(*models, first)
    alike(models)


def test_a_wrong_program_is_found_in_a_map_of_zeros(monkeypatch):
    model = fk.optimize(nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False))
    monkeypatch.setattr(fk.program.Program, "run", lambda self, x: torch.zeros_like(x))
    with torch.no_grad():
        assert not model(torch.zeros_like(X)).any()
        assert model(X).any()


def test_a_gate_of_one_pixel_captured_on_a_map_of_one():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.GELU(), nn.Conv2d(16, 16, 1))
    for training in (False, True):
        models = pair(nn.Sequential(*block(8, 16, 1), ResidualMixer(copy.deepcopy(gate), 16)).train(training))
        for size in (1, 16, 16, 5):
            alike(models, "grad" if training else "no_grad", torch.randn(4, 8, size, size), times=2)
        assert runs_a_program(models[0])


# ---- Training ----


def test_a_step_that_fails_is_not_done_twice(monkeypatch):
    models = pair(nn.Sequential(*block(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3)).train())
    alike(models, "grad")

    def fail(*args):
        torch.randn(3)
        raise RuntimeError("as a kernel may")

    program = models[0]._compiled_call_impl.ways[True].program
    steps = program.code
    monkeypatch.setattr(program, "code", lambda *args: fail(steps(*args)))
    alike(models, "grad")


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_head_with_one_dimensional_normalisation(drop):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.BatchNorm1d(8), nn.Linear(8, 4)
    models = pair(nn.Sequential(*block(8, 8, 3, 8), *head).train())
    alike(models, "grad")
    assert runs_a_program(models[0])


def test_dropout_of_pixels_in_the_order_of_memory():
    models = pair(
        nn.Sequential(*block(8, 16, 1), nn.AdaptiveAvgPool2d((1, 6)), nn.Flatten(0, 2), nn.Dropout(0.5)).train()
    )
    alike(models, "grad", X[:1])


def test_inference_mode_with_gradients():
    models = pair(net().train())
    for _ in range(3):
        with torch.inference_mode(), torch.enable_grad():
            found = [model(X) for model in models]
        torch.testing.assert_close(*found)
        assert models[0][1].num_batches_tracked == models[1][1].num_batches_tracked


@of_a_library
class Unread(nn.Sequential):
    """A branch that only moves its running statistics."""

    def forward(self, x):
        self[0](x)
        return self[1](x)


def test_statistics_of_a_branch_that_nobody_reads():
    models = pair(Unread(nn.Sequential(*block(8, 8, 3, 8)), nn.Sequential(*block(8, 8, 1))).train())
    alike(models, "grad")
    assert runs_a_program(models[0])
    assert models[0][0][1].num_batches_tracked == models[1][0][1].num_batches_tracked > 1


def test_statistics_that_are_infinite():
    models = pair(nn.Sequential(*block(8, 8, 3, 8)).train())
    for model in models:
        model[1].running_var.fill_(torch.inf)
    for _ in range(2):
        for model in models:
            model(X)
    assert torch.equal(models[0][1].running_var, models[1][1].running_var)


@pytest.mark.parametrize("vector", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [False, True])
def test_norms_of_strided_vectors(vector, training):
    model = nn.Sequential(*block(8, 16, 1), *block(16, 16, 3, 16))
    strided = (torch.rand(32) + 0.5)[::2]
    setattr(model[1], vector, nn.Parameter(strided) if vector in ("weight", "bias") else strided)
    found = []
    for one in pair(model.train(training)):
        for _ in range(2):
            (grad,) = torch.autograd.grad(one(X).square().sum(), one[0].weight)
        found.append(grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_bias_may_change_before_the_backward_pass():
    models = pair(nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)).train())
    for _ in range(3):
        grads = []
        for model in models:
            out = model(X)
            with torch.no_grad():
                model[0].bias.add_(0.5)
            grads.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_second_derivatives_by_a_bias():
    models = pair(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GELU()).train())
    for _ in range(2):
        found = []
        for model in models:
            (grad,) = torch.autograd.grad(model(X).square().sum(), model[0].weight, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), model[0].bias)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("lay_out", [torch.Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_strides_of_the_gradient(weights, lay_out, kernel):
    model = nn.Sequential(*block(8, 8, kernel, 8 if kernel > 1 else 1), nn.Conv2d(8, 8, 1))
    models = pair(model.to(memory_format=weights).train())
    for _ in range(3):
        seen = []
        for one in models:
            x = lay_out(X.clone()).requires_grad_() * 1.0
            x.register_hook(lambda grad, seen=seen: seen.append(grad.stride()))
            one(x).sum().backward()
        assert seen[0] == seen[1]
