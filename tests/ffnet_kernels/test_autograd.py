"""Gradients of every argument, first and second, against float64 and against finite differences."""

import itertools

import operator_calls
import parity
import pytest
import torch
from examples import example
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import ffnet_kernels as fk
from ffnet_kernels.backends import cpu
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.selftest import error_limit

BY_NAME = parity.OPERATORS_BY_NAME
TINY = {"shape": (2, 3, 4, 5), "kernel": (3, 3)}
DEPTHWISE_OPTIONS = (
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": "valid", "multiplier": 2},
    {"kernel": (2, 4), "padding": "same"},
)
CASES = [
    *(("depthwise_conv2d", options) for options in DEPTHWISE_OPTIONS),
    ("ffnified_attention", {}),
    ("ffnified_attention", {"kernel": (2, 5)}),
    ("channel_mixer", {}),
    ("channel_mixer", {"kernel": (4, 3)}),
]
every_case = pytest.mark.parametrize(("operator", "options"), CASES)
every_operator = pytest.mark.parametrize("operator", parity.OPERATORS)


@pytest.fixture(scope="module")
def registered():
    """The operators' registrations in a scratch namespace, where no backend is: their own formulas run."""
    library = torch.library.Library("ffnet_kernels_under_test", "DEF")
    for operator in parity.OPERATORS:
        BY_NAME[operator].define(library, cpu)
    yield torch.ops.ffnet_kernels_under_test
    library._destroy()


def differentiable(args: tuple) -> tuple[list[int], list[Tensor]]:
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    return places, [args[i].detach().clone().requires_grad_() for i in places]


def with_tensors(args: tuple, places: list[int], tensors) -> list:
    args = list(args)
    for i, tensor in zip(places, tensors, strict=True):
        args[i] = tensor
    return args


def native_operator(name: str):
    return getattr(torch.ops.ffnet_kernels, name)


def gradients(function, args: tuple, wanted: set[int], seed: int = 1) -> list[Tensor]:
    """Of the arguments at ``wanted``, for a random gradient of the output."""
    args = [a.detach().requires_grad_(i in wanted) if isinstance(a, Tensor) else a for i, a in enumerate(args)]
    out = function(*args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return list(torch.autograd.grad(out, [args[i] for i in sorted(wanted)], grad))


@parity.needs_native
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_case
def test_gradients_against_float64(operator, options, activation, layout):
    args = example(operator, layout=layout, activation=activation, **{"shape": (2, 19, 9, 11), **options}).checked()
    wanted = set(BY_NAME[operator].tensors)
    double = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    run_reference = fk.ops.OPERATORS[operator].reference
    expected = gradients(run_reference, double, wanted)
    eager = gradients(run_reference, args, wanted)
    got = gradients(native_operator(operator), args, wanted)
    for place, g, e, f in zip(sorted(wanted), got, expected, eager, strict=True):
        assert g.shape == args[place].shape
        error = (g.double() - e).abs().max().item()
        assert error <= error_limit(e, f), f"argument {place}"


@every_operator
def test_every_subset_of_gradients(registered, operator):
    """Asking for some gates the others' work, and never changes the values."""
    args = example(operator, dtype=torch.float64, **TINY).checked()
    places = BY_NAME[operator].tensors
    run = getattr(registered, operator)
    full = dict(zip(sorted(places), gradients(run, args, set(places)), strict=True))
    sizes = range(1, len(places) + 1) if len(places) < 5 else (1, 2, len(places) - 1)
    for wanted in itertools.chain(*(itertools.combinations(places, size) for size in sizes)):
        for place, grad in zip(sorted(wanted), gradients(run, args, set(wanted)), strict=True):
            torch.testing.assert_close(grad, full[place], rtol=1e-12, atol=1e-12)


@every_operator
def test_optional_tensors_may_be_missing(registered, operator):
    args = list(example(operator, dtype=torch.float64, **TINY).checked())
    optional = [i for i in BY_NAME[operator].tensors if "Tensor?" in BY_NAME[operator].arguments.split(", ")[i]]
    assert optional
    for i in optional:
        args[i] = None
    wanted = set(BY_NAME[operator].tensors) - set(optional)
    got = gradients(getattr(registered, operator), tuple(args), wanted)
    expected = gradients(fk.ops.OPERATORS[operator].reference, tuple(args), wanted)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@every_case
def test_gradcheck_through_the_public_functions(operator, options):
    case = example(operator, dtype=torch.float64, **{**TINY, **options})
    names = [k for k, v in case.kwargs.items() if isinstance(v, Tensor)]
    tensors = [t.detach().requires_grad_() for t in case.tensors()]

    def run(*tensors):
        args, named = tensors[: len(case.args)], tensors[len(case.args) :]
        return getattr(fk, operator)(*args, **{**case.kwargs, **dict(zip(names, named, strict=True))})

    assert gradcheck(run, tensors, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@every_case
def test_gradcheck_of_the_registered_formulas(registered, operator, options, activation):
    args = example(operator, dtype=torch.float64, activation=activation, **{**TINY, **options}).checked()
    places, tensors = differentiable(args)

    def run(*tensors):
        return getattr(registered, operator)(*with_tensors(args, places, tensors))

    assert gradcheck(run, tensors, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True)


@every_operator
def test_gradcheck_of_the_backward_operators(registered, operator):
    args = example(operator, dtype=torch.float64, **TINY).checked()
    places, tensors = differentiable(args)
    grad = torch.randn_like(getattr(registered, operator)(*args)).requires_grad_()
    mask = [True] * len(BY_NAME[operator].tensors)

    def run(grad, *tensors):
        backward = getattr(registered, f"{operator}_backward")
        return tuple(backward(grad, *with_tensors(args, places, tensors), mask))

    assert gradcheck(run, (grad, *tensors), fast_mode=True)


@parity.needs_native
@every_operator
def test_second_derivatives_through_the_kernels(operator):
    """The float32 kernels' second derivatives against the float64 reference."""
    args = example(operator, **TINY).checked()

    def penalty(function, args):
        places, tensors = differentiable(args)
        out = function(*with_tensors(args, places, tensors))
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    run_reference = fk.ops.OPERATORS[operator].reference
    expected = penalty(run_reference, tuple(a.double() if isinstance(a, Tensor) else a for a in args))
    eager = penalty(run_reference, args)
    for g, e, f in zip(penalty(native_operator(operator), args), expected, eager, strict=True):
        assert (g.double() - e).abs().max().item() <= error_limit(e, f)


@every_operator
def test_no_graph_where_no_gradient_is_wanted(operator):
    case = example(operator, **TINY)
    assert case.run().grad_fn is None
    case.args[0].requires_grad_()
    with torch.no_grad():
        assert case.run().grad_fn is None
    with torch.inference_mode():
        assert not case.run().requires_grad
    assert case.run().requires_grad


@pytest.mark.parametrize("call", operator_calls.calls().values(), ids=operator_calls.calls())
def test_checkpointing(call):
    """The second forward pass ends by an exception out of the operator, when all tensors are there again."""
    found = []
    for run in (call.ours, lambda *tensors: checkpoint(call.ours, *tensors, use_reentrant=False)):
        leaves = [t.detach().requires_grad_() for t in call.tensors]
        found.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *found))
