"""Results that only look like the plain model's: of another kind, with other gradients, in another's memory, or of
attributes that somebody copied."""

import collections
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from contract import MODES, agree, autocast, depthwise, outcome, randomised, twins
from patterns_zoo import of_a_library
from torch import nn

import ffnet_kernels as fk
from ffnet import layers, mixers

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.GELU(), depthwise(bias=False), nn.BatchNorm2d(8))


def made(make):
    return lambda: randomised(make())


def alike(models, modes=("grad", "grad", "no_grad"), x=X, **options):
    for mode in modes:
        agree(*models, x, mode, **options)


def runs_a_program(model) -> bool:
    return fk.report(model).rows[0].runs_on.startswith("a program")


# ---- What a result is ----


Pair = collections.namedtuple("Pair", ["map", "mean"])


@of_a_library
class Results(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.body, self.kind = net(), pack

    def forward(self, x):
        y = self.body(x)
        if self.kind == "ordered":
            return collections.OrderedDict(out=y, aux=y.mean((2, 3)))
        if self.kind == "named":
            return Pair(y, y.mean((2, 3)))
        return {"twice": (y, y), "a view": (y, y.flatten(2)), "detached": (y, y.detach())}[self.kind]


@pytest.mark.parametrize("kind", ["ordered", "named", "twice", "a view", "detached"])
@pytest.mark.parametrize("training", [False, True])
def test_results_of_several_maps(kind, training):
    """Their containers, and which of them lie in one another's memory."""
    models = twins(made(lambda: Results(kind)))
    for model in models:
        model.train(training)
        model.body.append(nn.Sequential(nn.Identity(), layers.DropPath(0.0 if kind == "named" else 0.3)))
    alike(models, ("grad", "grad", "grad", *(["no_grad"] * 3 if not training else [])))
    shared = []
    for model in models:
        values = list(model(X).values()) if kind == "ordered" else list(model(X))
        shared.append((values[0] is values[1], values[0].data_ptr() == values[1].data_ptr()))
    assert shared[0] == shared[1]


@of_a_library
class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        y = self.body(x)
        y += x
        return y


def test_a_sum_in_place_keeps_its_dtype():
    models = twins(made(AddsInPlace))
    for training in (False, True):
        for model in models:
            model.train(training)
        alike(models, tolerance=0.05, context=autocast)
        alike(models)


@of_a_library
class ChangesWindows(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.body, self.cut = net(), cut

    def forward(self, x):
        y = self.body(x)
        cut = y.unfold(2, 3, 3) if self.cut == "unfold" else torch.einsum("nchw->nhwc", y)
        cut.mul_(2)
        return y


@pytest.mark.parametrize("cut", ["unfold", "einsum"])
def test_views_by_functions_that_also_copy(cut):
    models = twins(made(lambda: ChangesWindows(cut)))
    alike(models)
    assert not runs_a_program(models[0])


@pytest.mark.parametrize("change", [torch.relu_, lambda out: out.add_(1), lambda out: out.mul_(2)])
@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)), net, depthwise]
)
def test_results_of_training_steps_can_be_changed_in_place(make, change):
    models = twins(made(make))
    x = X.contiguous(memory_format=torch.channels_last)  # so that results need no other strides
    for _ in range(3):
        grads = []
        for model in models:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = change(model.train()(x))
            out.float().square().mean().backward()
            grads.append([p.grad for p in model.parameters()])
        scale = max(grad.abs().max().item() for grad in grads[1])
        torch.testing.assert_close(*grads, rtol=0.05, atol=0.05 * scale)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
def test_nested_tensors_raise_what_the_modules_raise(grad):
    models = twins(made(net))
    alike(models, ("grad", "no_grad"))
    nested = torch.nested.nested_tensor([X[0], X[0, :, 1:]])
    with torch.set_grad_enabled(grad):
        errors = [outcome(model, nested) for model in models]
    assert type(errors[0]) is type(errors[1]) is NotImplementedError


def test_strides_of_many_gradients_at_once():
    models = twins(made(net))
    for _ in range(2):
        found = []
        for model in models:
            x = X.clone().requires_grad_()
            out = model(x)
            found += torch.autograd.grad(out, x, torch.stack([out, out * 2]).detach(), is_grads_batched=True)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
        assert found[0].stride() == found[1].stride()


# ---- Contexts that code enters by itself ----


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("holder", "name"), [(nn.GELU, "forward"), (F, "gelu"), (nn.Sequential, "forward")])
@pytest.mark.parametrize("when", ["before", "later"])
def test_decorators_of_pytorch_that_switch_gradients(switch, holder, name, when, monkeypatch):
    models = twins(made(net))
    if when == "later":
        alike(models)
    monkeypatch.setattr(holder, name, switch()(getattr(holder, name)))
    for training in (False, True):
        for model in models:
            model.train(training)
        alike(models, ("grad", "grad", "no_grad", "no_grad"))
    for model in models:
        model.eval()
    monkeypatch.undo()
    alike(models)


@pytest.mark.parametrize("options", [{"enabled": False}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("outer", [False, True])
def test_functions_decorated_by_autocast(options, outer, monkeypatch):
    """Such a decorator, entered within itself, leaves autocast as it found it the second time."""
    models = twins(made(lambda: nn.Sequential(*net(), nn.SiLU(), nn.Conv2d(8, 8, 1))))
    monkeypatch.setattr(F, "silu", torch.autocast("cpu", **options)(F.silu))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            found = [model(X) for model in models]
            assert torch.is_autocast_enabled("cpu") == outer
        assert found[0].dtype == found[1].dtype


@pytest.mark.parametrize(
    ("holder", "name", "other"),
    [
        (nn.BatchNorm2d, "forward", nn.Softsign.forward),
        (nn.modules.batchnorm._BatchNorm, "forward", nn.Identity.forward),
        (nn.BatchNorm2d, "_check_input_dim", nn.BatchNorm3d._check_input_dim),
    ],
)
@pytest.mark.parametrize("when", ["before", "later"])
def test_methods_of_normalisation_taken_from_other_layers(holder, name, other, when, monkeypatch):
    models = twins(made(net))
    for training in (False, True):
        for model in models:
            model.train(training)
        if when == "later":
            alike(models, ("grad", "grad"))
        monkeypatch.setattr(holder, name, other, raising=False)
        alike(models, ("grad", "grad", "no_grad"))
        monkeypatch.undo()


@of_a_library
class DrawsFromSizes(nn.Module):
    """The numbers that it draws depend on the size of the map alone."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return x + torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.5)) * self.body(x)


def test_capture_draws_no_numbers_of_a_size():
    models = twins(made(DrawsFromSizes))
    for x in (X, X[..., :7]):
        alike(models, ("grad", "no_grad"), x)


# ---- Copied attributes ----


def with_attributes(attributes, module):
    copied = type(module).__new__(type(module))
    copied.__dict__.update(attributes)
    return copied


COPIES = {
    "deepcopy": copy.deepcopy,
    "one by one": lambda attributes: {name: copy.deepcopy(value) for name, value in attributes.items()},
    "pickle": lambda attributes: pickle.loads(pickle.dumps(attributes)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_attributes_are_plain_models(how):
    models = twins(made(net))
    alike(models)
    copied = [with_attributes(COPIES[how](vars(model)), model) for model in models]
    for model in copied:
        with torch.no_grad():
            model[0].weight.mul_(2)
    alike(copied)
    alike(models)
    assert not fk.report(copied[0]).rows
    alike((fk.optimize(copied[0]), copied[1]))
    assert runs_a_program(copied[0])


def test_a_layer_with_the_attributes_of_another_and_a_weight_of_its_own():
    models = twins(made(net))
    alike(models)
    for model in models:
        layer = with_attributes(vars(model[0]), model[0])
        layer._parameters = {**layer._parameters, "weight": nn.Parameter(layer.weight.detach() * 3)}
        model[0] = layer
    alike(models, list(MODES) * 2)
    exported = [torch.export.export(model, (X,)).module() for model in models]
    alike(exported, ["no_grad"])


def test_weights_of_another_shape_through_data():
    """Which changes what a mixer needs: filters that keep the map's size."""
    models = twins(made(lambda: nn.Sequential(mixers.ffnified_attention_mixer(8, 5), nn.AdaptiveAvgPool2d(3))))
    alike(models)
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (5, 5):
                layer.weight.data = layer.weight.data[..., 1:-1, 1:-1].clone()
    fk.refresh(models[0])
    alike(models)
