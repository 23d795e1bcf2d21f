"""Random models, inputs and edits: what was optimised computes what its plain twin does, whatever is done to both.

``python -c "import test_optimize_fuzz as t; t.case(17)"`` in this folder repeats the case of seed 17.
"""

import collections
import copy
import random
import re
import types
import warnings
from collections.abc import Iterator

import edits
import pytest
import random_models
import torch
from contract import ZOO, agree, outcome
from torch import nn

import ffnet_kernels as fk

EDITS = {**edits.EDITS, **edits.FORGOTTEN}
#: Chosen more often, for they are what makes other edits matter.
COMMON = ["evaluated", "evaluated", "trained", "statistics_changed", "value_changed", "recorded", "float", "unhooked"]


pytestmark = pytest.mark.usefixtures("one_thread")


QUICK, LONG, CHUNK = range(64), range(64, 2304), 32
#: Normalise channels that are constant but for rounding, or a pixel or two: plain gradients, too, are as far from those
#: in float64.
ILL_CONDITIONED = {186, 242, 1986}


def steps(seed: int, optimize=None) -> Iterator[str]:
    """Compares an optimised model with its plain twin through a sequence of edits; yields what it does."""
    r = random.Random(seed)
    models = [random_models.model(seed)[0] for _ in range(2)]
    channels = random_models.model(seed)[1]
    plain, fast = models
    for i in range(r.choice([0, 0, 0, 1, 2])):
        name = r.choice(list(edits.EDITS))
        yield f"before: {name}: {edits.apply(EDITS[name], plain, seed + i)}"
        edits.apply(EDITS[name], fast, seed + i)
    fast = (optimize or fk.optimize)(fast)
    folds = any(isinstance(m, edits.NORMS) for m in plain.modules())
    for i in range(r.randrange(4, 9)):
        for _ in range(r.choice([1, 1, 2])):
            kinds = sorted({p.dtype for p in plain.parameters()}, key=str)
            mode = r.choice(["no_grad", "no_grad", "inference", "grad"])
            x = random_models.given(r, channels, r.choice(kinds) if kinds else torch.float32)
            yield f"{mode}, input {list(x.shape)} by {x.stride()}, {x.dtype}, requires_grad={x.requires_grad}"
            low = torch.bfloat16 in kinds or torch.float16 in kinds
            result = agree(fast, plain, x, mode, tolerance=0.15 if low else 2e-4)
            yield f"both raise {type(result).__name__}" if isinstance(result, Exception) else "both agree"
        for name in (r.choice([*EDITS, *COMMON * 2]), *r.choices(list(EDITS), k=5)):
            did = edits.apply(EDITS[name], plain, seed + 10 * i)
            if did is not None:
                break
        yield f"{name}: {did}"
        again = edits.apply(EDITS[name], fast, seed + 10 * i)
        assert again == did, f"the edit of the optimised model: {again}"
        if name in edits.FORGOTTEN and folds:
            fk.refresh(fast)
    parts = [[(n, type(m).__name__, m.training) for n, m in model.named_modules()] for model in (plain, fast)]
    assert parts[0] == parts[1]


def case(seed: int, optimize=None) -> None:
    done: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in steps(seed, optimize):
                done.append(step)
    except Exception as error:
        text = "\n  ".join(done)
        raise AssertionError(
            f"seed {seed}: {type(error).__name__}: {error}\nmodel: {random_models.model(seed)[0]}\nsteps:\n  {text}"
        ) from error


@pytest.mark.parametrize("seed", QUICK)
def test_random_models_and_edits(seed):
    case(seed)


@pytest.mark.long
@pytest.mark.parametrize("first", LONG[::CHUNK])
def test_many_random_models_and_edits(first):
    for seed in range(first, first + CHUNK):
        if seed not in ILL_CONDITIONED:
            case(seed)


def test_cases_are_the_same_in_every_run():
    for seed in range(8):
        assert list(steps(seed, lambda model: model)) == list(steps(seed, lambda model: model))


def test_cases_mostly_compute_and_reach_most_edits():
    done = [step for seed in QUICK for step in steps(seed, lambda model: model)]
    results = [step for step in done if step.startswith("both")]
    assert results.count("both agree") > 0.7 * len(results)
    text = "\n".join(done)
    reached = [name for name in EDITS if re.search(rf"^(before: )?{name}: (?!None|.* raised)", text, re.MULTILINE)]
    assert len(reached) > 0.8 * len(EDITS)


@pytest.mark.parametrize("name", sorted(EDITS.keys() - {"unhooked", "unpatched", "unparametrised"}))
def test_every_edit_is_one_of_some_model(name):
    did = [str(edits.apply(EDITS[name], zoo.make(), seed)) for zoo in ZOO.values() for seed in range(2)]
    assert any(text != "None" and "raised" not in text for text in did)


# ---- Faults that must be found ----


def attached(model: nn.Module, twin: nn.Module) -> nn.Module:
    """The model, computed without gradients by another."""
    plain = type(model).forward

    def forward(self, *args):
        if torch.is_grad_enabled() or self.training:
            return plain(self, *args)
        return twin.eval()(*args)

    model.forward = types.MethodType(forward, model)
    return model


def sharing(model: nn.Module, *classes: type) -> nn.Module:
    """A copy of today's state that shares parameters, and modules of the classes."""
    memo = {id(p): p for p in model.parameters()}
    memo |= {id(m): m for m in model.modules() if isinstance(m, classes)} if classes else {}
    return copy.deepcopy(model, memo)


def stale_weights(model):
    return attached(model, copy.deepcopy(model))


def ignored_structure(model):
    """Values in place are seen; hooks, patches, swapped layers and new statistics are not."""
    return attached(model, sharing(model))


def stale_statistics(model):
    """All but normalisation is the model's own, as of today."""
    return attached(model, sharing(model, nn.Conv2d, nn.GELU, nn.ReLU, nn.SiLU, nn.Linear))


def attach_map(change):
    def optimize(model):
        plain = model.forward

        def forward(self, *args):
            out = plain(*args)
            return change(out) if isinstance(out, torch.Tensor) and not torch.is_grad_enabled() else out

        model.forward = types.MethodType(forward, model)
        return model

    return optimize


def ignored_hooks(model):
    """Hooks on layers are not called in inference."""
    plain = model.forward

    def forward(self, *args):
        if torch.is_grad_enabled():
            return plain(*args)
        kept = [(m, m._forward_hooks) for m in self.modules()]
        try:
            for m, _ in kept:
                m._forward_hooks = collections.OrderedDict()
            return plain(*args)
        finally:
            for m, hooks in kept:
                m._forward_hooks = hooks

    model.forward = types.MethodType(forward, model)
    return model


def other_channels_taken(model):
    plain = model.forward

    def forward(self, x):
        try:
            return plain(x)
        except RuntimeError:
            return x

    model.forward = types.MethodType(forward, model)
    return model


def draws_numbers(model):
    torch.rand(1)
    return attach_map(lambda out: out + 0 * torch.rand(1, dtype=out.dtype))(model)


FAULTS = {
    "stale weights": stale_weights,
    "ignored structure": ignored_structure,
    "stale statistics": stale_statistics,
    "ignored hooks": ignored_hooks,
    "errors swallowed": other_channels_taken,
    "other strides": attach_map(lambda out: out.mT.contiguous().mT),
    "slightly off": attach_map(lambda out: out * 1.001),
    "a plane off": attach_map(lambda out: out.index_fill(-1, torch.tensor([0]), 0) if out.numel() else out),
    "random numbers": draws_numbers,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzz_finds(fault):
    for seed in QUICK:
        text = str(outcome(case, seed, FAULTS[fault]))
        if text.startswith(f"seed {seed}: AssertionError"):
            assert "steps:" in text
            return
    pytest.fail(f"{fault}: not found by {len(QUICK)} cases")
