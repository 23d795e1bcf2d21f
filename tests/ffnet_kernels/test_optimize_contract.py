"""An optimised model computes what the plain one does, whatever it is given and whatever is changed about it later."""

import functools
import itertools
import random
import threading

import edits
import pytest
import torch
from contract import (
    MODES,
    TOLERANCE,
    ZOO,
    Block,
    agree,
    autocast,
    depthwise,
    every_model,
    outcome,
    randomised,
    sample,
    twins,
)
from torch import nn
from torch.nn.modules import module as module_hooks

import ffnet
import ffnet_kernels as fk

every_mode = pytest.mark.parametrize("mode", MODES)
X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


# ---- Inputs ----


def negative_view(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag  # its memory holds -x


def subnormal(x):
    return x * 1e-39


def with_nonfinite(x):
    x = x.clone()
    x[0, 1, 2, 3], x[-1, 0, 0, 0] = float("inf"), float("nan")
    return x


INPUTS = {
    "as it is": lambda x: x.clone(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 3)[::2, ..., ::2],
    "a slice of channels": lambda x: torch.cat([x, x], 1)[:, x.shape[1] // 2 : x.shape[1] // 2 + x.shape[1]],
    "at an odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "one map": lambda x: x[:1].clone(),
    "one map, channels last": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
    "without a batch": lambda x: x[0].clone(),
    "no map": lambda x: x[:0].clone(),
    "of no height": lambda x: x[:, :, :0].clone(),
    "of one pixel": lambda x: x[..., :1, :1].clone(),
    "narrow": lambda x: x[..., :2].clone(),
    "fewer channels": lambda x: x[:, :2].clone(),
    "half the channels": lambda x: x[:, : x.shape[1] // 2].clone(),
    "twice the channels": lambda x: torch.cat([x, x], 1),
    "one channel": lambda x: x[:, :1].clone(),
    "five dimensions": lambda x: x[None].clone(),
    "two dimensions": lambda x: x[0, 0].clone(),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "complex": lambda x: x.to(torch.complex64),
    "integers": lambda x: (x * 5).long(),
    "meta": lambda x: x.to("meta"),
    "negated view": negative_view,
    "a parameter": lambda x: nn.Parameter(x.clone()),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "infinite and NaN": with_nonfinite,
    "subnormal": subnormal,
    "large": lambda x: x * 1e18,
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "a list": lambda x: [x.clone()],
    "nothing": lambda x: None,
    "numpy": lambda x: x.numpy(),
}


@every_model
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(name, kind):
    fast, plain = twins(ZOO[name].make)
    make = functools.partial(INPUTS[kind], sample(name))
    for mode in ("no_grad", "inference", "grad", "no_grad"):
        agree(fast, plain, make, mode)
    agree(fast, plain, sample(name))


@every_model
def test_sizes_and_layouts_in_turn(name):
    fast, plain = twins(ZOO[name].make)
    r, x = random.Random(0), sample(name)
    for _ in range(12):
        shape = (r.randrange(1, 4), x.shape[1], r.randrange(7, 14), r.randrange(7, 14))
        x = torch.randn(shape).contiguous(memory_format=r.choice([torch.contiguous_format, torch.channels_last]))
        agree(fast, plain, x, r.choice(list(MODES)))


@every_model
def test_an_inference_tensor_outside_inference_mode(name):
    fast, plain = twins(ZOO[name].make)
    with torch.inference_mode():
        x = sample(name)
    for mode in MODES:
        agree(fast, plain, lambda: x, mode)


def test_arguments_by_name():
    fast, plain = twins(ZOO["blocks"].make)
    for call in (
        lambda m: m(input=X),
        lambda m: m[0](x=X),
        lambda m: m(X, X),
        lambda m: m(),
        lambda m: m(x=X),
        lambda m: m.forward(X),
        lambda m: m[0].forward(X),
        lambda m: m[1](m[0](X)),
        lambda m: m[0].proj(m[0].act(m[0].bn(m[0].conv(X)))),
        lambda m: m[:1](X),
        lambda m: nn.Module.__call__(m, X),
    ):
        for mode in MODES:
            agree(Calling(fast, call), Calling(plain, call), X, mode)


class Calling(nn.Module):
    """A model called in a way of its own."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(self.model)


# ---- Results are the caller's ----


@every_model
def test_results_belong_to_the_caller(name):
    fast, plain = twins(ZOO[name].make)
    with torch.no_grad():
        kept = [fast(sample(name, seed)) for seed in range(3)]
        copies = [out.clone() for out in kept]
        for _ in range(2):
            fast(sample(name, 9)).fill_(7)
    assert all(map(torch.equal, kept, copies))
    agree(fast, plain, sample(name))


@every_model
def test_threads(name):
    fast, plain = twins(ZOO[name].make)
    shapes = [(n, *ZOO[name].shape[1:-1], ZOO[name].shape[-1] + n) for n in (1, 2, 3, 4)]
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    results: list = [None] * len(inputs)

    def work(i):
        with torch.no_grad() if i % 2 else torch.inference_mode():
            results[i] = [outcome(fast, inputs[i]) for _ in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, x in zip(results, expected, strict=True):
        for result in out:
            torch.testing.assert_close(result, x, rtol=1e-3, atol=1e-4)


# ---- What is changed counts ----


def state_agrees(fast, plain, x):
    dtypes = {p.dtype for p in plain.parameters()} | {x.dtype}
    for mode, dtype in itertools.product(MODES, dtypes):
        agree(fast, plain, x.detach().to(dtype), mode)
    for (name, p), (other, q) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert p.requires_grad == q.requires_grad
        assert p.stride() == q.stride()


@every_model
@pytest.mark.parametrize("change", edits.EDITS)
def test_a_model_that_is_changed_later(name, change):
    did = False
    for seed in (1, 2, 3):
        fast, plain = twins(ZOO[name].make)
        agree(fast, plain, sample(name))  # so that what it has collected is of before
        done = [edits.apply(edits.EDITS[change], m, seed) for m in (plain, fast)]
        assert done[0] == done[1]
        state_agrees(fast, plain, sample(name))
        plain.eval(), fast.eval()
        agree(fast, plain, sample(name))
        did |= done[0] is not None
    if not did:
        pytest.skip("nothing of the kind in this model")


@pytest.mark.long
@every_model
@pytest.mark.parametrize("change", edits.EDITS)
def test_a_model_that_was_changed_before(name, change):
    fast, plain = twins(ZOO[name].make, lambda m: edits.apply(edits.EDITS[change], m, 4))
    state_agrees(fast, plain, sample(name))


@every_model
@pytest.mark.parametrize("change", edits.FORGOTTEN)
def test_what_pytorch_cannot_see(name, change):
    fast, plain = twins(ZOO[name].make)
    for seed in (1, 2, 3):
        agree(fast, plain, sample(name))
        for model in (plain, fast):
            edits.apply(edits.FORGOTTEN[change], model, seed)
        if any(isinstance(m, edits.NORMS) for m in fast.modules()):
            fk.refresh(fast)
        state_agrees(fast, plain, sample(name))


@every_model
def test_weights_that_are_inference_tensors(name):
    with torch.inference_mode():
        fast, plain = twins(ZOO[name].make)
        agree(fast, plain, sample(name), "inference")
        for model in (plain, fast):
            next(model.parameters()).mul_(3)  # unseen: such tensors have no version
        if any(isinstance(m, edits.NORMS) for m in fast.modules()):
            fk.refresh(fast)
    for mode in ("inference", "no_grad"):
        agree(fast, plain, sample(name), mode)


@every_model
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_optimised_inside_a_context(name, context):
    torch.manual_seed(0)
    plain = ZOO[name].make()
    torch.manual_seed(0)
    fast = ZOO[name].make()
    with context():
        fast = fk.optimize(fast)
        fast(sample(name))
    state_agrees(fast, plain, sample(name))
    for model in (plain, fast):
        model.train()
        edits.apply(edits.EDITS["stepped"], model, 1)
        model.eval()
    state_agrees(fast, plain, sample(name))


# ---- Hooks and patches ----


@every_model
@pytest.mark.parametrize("change", ["forward_hook", "forward_pre_hook", "in_place_hook", "method_patched"])
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.long), "later"])
def test_every_layer_can_be_hooked(name, change, when):
    fast, plain = twins(ZOO[name].make)
    for path in dict(plain.named_modules()):
        if when == "before":
            fast = fk.restore(fast)
        for model in (plain, fast):
            edits.apply(edits.EDITS[change], Only(model.get_submodule(path)), 0)
        if when == "before":
            fast = fk.optimize(fast)
        agree(fast, plain, sample(name), "inference")
        for model in (plain, fast):
            for edit in ("unhooked", "unpatched"):
                edits.apply(edits.EDITS[edit], Only(model.get_submodule(path)), 0)
        agree(fast, plain, sample(name))


class Only(nn.Module):
    """What edits choose from: one module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def named_modules(self, *args, **kwargs):
        return [("it", self.module)]


GLOBAL_HOOKS = {
    "forward": lambda: module_hooks.register_module_forward_hook(edits.plus_half),
    "forward_pre": lambda: module_hooks.register_module_forward_pre_hook(edits.halved_input),
    "backward": lambda: module_hooks.register_module_full_backward_hook(edits.doubled_gradient),
}


@every_model
@pytest.mark.parametrize("place", GLOBAL_HOOKS)
def test_hooks_on_all_modules(name, place):
    fast, plain = twins(ZOO[name].make)
    agree(fast, plain, sample(name))
    handle = GLOBAL_HOOKS[place]()
    try:
        state_agrees(fast, plain, sample(name))
    finally:
        handle.remove()
    agree(fast, plain, sample(name))


PATCHES = [
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.BatchNorm2d, "forward"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (nn.ReLU, "forward"),
    (nn.GELU, "forward"),
    (nn.SiLU, "forward"),
    (nn.Linear, "forward"),
    (nn.Sequential, "forward"),
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (Block, "forward"),
    (ffnet.FFNet, "forward"),
    (ffnet.FFNet, "forward_head"),
    (ffnet.mixers.MetaMixer, "forward"),
    (ffnet.mixers.ResidualMixer, "forward"),
    (ffnet.layers.ConvBN, "forward"),
    (ffnet.layers.BranchedDepthwise, "forward"),
    (ffnet.layers.DropPath, "forward"),
]


@every_model
@pytest.mark.parametrize(("cls", "method"), PATCHES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("when", ["before", "later"])
def test_methods_patched_on_a_class(name, cls, method, when, monkeypatch):
    forward = getattr(cls, method)

    def patched(*args, **kwargs):
        return forward(*args, **kwargs) * 1.5

    if when == "before":
        monkeypatch.setattr(cls, method, patched)
    fast, plain = twins(ZOO[name].make)
    agree(fast, plain, sample(name))
    monkeypatch.setattr(cls, method, patched)
    state_agrees(fast, plain, sample(name))
    monkeypatch.undo()
    agree(fast, plain, sample(name))


@every_model
@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_comes_and_goes(name, mode, dtype):
    fast, plain = twins(ZOO[name].make)
    for _ in range(2):
        agree(fast, plain, sample(name), mode)
        agree(fast, plain, sample(name), mode, TOLERANCE[dtype], context=functools.partial(autocast, dtype))


# ---- Training ----


@every_model
@pytest.mark.parametrize("optimiser", ["SGD", "AdamW", "LBFGS"])
def test_training(name, optimiser):
    """Steps in training mode equal the plain model's, and so does what the trained model computes then."""
    fast, plain = twins(ZOO[name].make)
    agree(fast, plain, sample(name))
    for model in (plain, fast):
        torch.manual_seed(1)
        model.train()
        # A larger eps: of gradients that are zero but for rounding, AdamW would make whole steps of either sign.
        options = {"LBFGS": {"max_iter": 3}, "AdamW": {"eps": 1e-3}}.get(optimiser, {})
        optimizer = getattr(torch.optim, optimiser)(model.parameters(), lr=0.02, **options)
        for step in range(3):

            def closure(model=model, step=step, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (model(sample(name, step)) - 0.5).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    for (key, got), expected in zip(fast.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    plain.load_state_dict(fast.state_dict())  # rounding grows over steps
    plain.eval(), fast.eval()
    state_agrees(fast, plain, sample(name))


@every_model
def test_evaluation_between_steps(name):
    fast, plain = twins(ZOO[name].make)
    for step in range(3):
        for model in (plain, fast):
            torch.manual_seed(step)
            model.train()
            model(sample(name, step))  # batch statistics alone
            model.eval()
        agree(fast, plain, sample(name))
        for model in (plain, fast):
            edits.apply(edits.EDITS["stepped"], model, step)
        agree(fast, plain, sample(name))


def test_a_lazy_layer():
    fast, plain = twins(lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), depthwise(), nn.LazyBatchNorm2d()).eval())
    for model in (plain, fast):
        torch.manual_seed(2)
        model(X)
    assert type(fast[0]) is nn.Conv2d
    state_agrees(fast, plain, X)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(), lambda: nn.ReLU(), lambda: nn.Identity(), nn.ModuleList])
def test_models_without_layers(make):
    fast, plain = twins(make)
    state_agrees(fast, plain, X)


@pytest.mark.parametrize("part", ["", "0", "0.conv", "1"])
def test_parts_of_an_optimised_model_called_alone(part):
    fast, plain = twins(ZOO["blocks"].make)
    agree(fast, plain, X)
    state_agrees(fast.get_submodule(part), plain.get_submodule(part), X)
    edits.apply(edits.EDITS["method_patched"], plain.get_submodule(part), 1)
    edits.apply(edits.EDITS["method_patched"], fast.get_submodule(part), 1)
    state_agrees(fast, plain, X)


def test_a_part_optimised_by_itself():
    models = []
    for optimised in (True, False):
        torch.manual_seed(0)
        block = randomised(Block())
        if optimised:
            block = fk.optimize(block)
        models.append(nn.Sequential(block, randomised(depthwise()), block))
    fast, plain = models
    state_agrees(fast, plain, X)
    fast = fk.optimize(fast)
    state_agrees(fast, plain, X)
    for model in models:
        edits.apply(edits.EDITS["forward_hook"], model[0].bn, 1)
    state_agrees(fast, plain, X)
