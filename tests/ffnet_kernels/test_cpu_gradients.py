"""The CPU's backward kernels where they take another path: strips, bands, strides, special numbers, other dtypes."""

import math

import parity
import pytest
import torch
from examples import example
from torch import Tensor

from ffnet_kernels.backends import activations
from ffnet_kernels.backends.activations import ACTIVATIONS

pytestmark = parity.needs_native
BACKWARD = ("depthwise_conv2d", "ffnified_attention")


LARGE = pytest.param((31, 5), marks=pytest.mark.long)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), LARGE, (4, 1)])
@pytest.mark.parametrize("options", [{}, {"value_kernel": (9, 2)}, {"value_kernel": (2, 31)}])
def test_strips_and_bands_of_the_token_mixer(layout, kernel, options):
    """Few tall images are cut into strips; a map of more rows than a band has moves through the rings."""
    for shape in ((1, 5, 97, 6), (3, 17, 45, 40)):
        parity.check_gradients(example("ffnified_attention", shape=shape, kernel=kernel, layout=layout, **options))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), LARGE, (4, 1), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1), (1, 2)])
@pytest.mark.parametrize("padding", ["same", "valid", (31, 2)])
def test_strips_and_bands_of_a_convolution(layout, kernel, stride, padding):
    for shape, multiplier in (((1, 5, 97, 7), 2), ((3, 17, 45, 40), 1)):
        options = {"stride": stride, "padding": padding, "multiplier": multiplier}
        parity.check_gradients(example("depthwise_conv2d", shape=shape, kernel=kernel, layout=layout, **options))


@pytest.mark.parametrize("width", [63, 64, 65, 129, 300])
def test_wide_maps(width):
    """Rows longer than one running sum takes."""
    for operator in BACKWARD:
        parity.check_gradients(example(operator, shape=(1, 3, 5, width), kernel=(3, 7)))


@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("layout", parity.LAYOUTS)
@pytest.mark.parametrize("batch", [0, 2])
def test_laid_out_as_the_fakes_say(operator, layout, batch):
    case = example(operator, shape=(batch, 19, 9, 11), layout=layout)
    args, definition = case.checked(), parity.OPERATORS_BY_NAME[operator]
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
    call = (grad, *args, [True] * len(definition.tensors))
    run = getattr(torch.ops.ffnet_kernels, f"{operator}_backward")
    for got, place in zip(run(*call), definition.tensors, strict=True):
        assert got.stride() == torch.empty_like(args[place]).stride()
        assert got.data_ptr() != grad.data_ptr() or not got.numel()


def input_gradients(x: Tensor, grad: Tensor, activation: str, isa: str | None) -> Tensor:
    """A 1×1 filter of ones: the incoming gradient times the derivative of the activation."""
    with parity.selected_isa(isa), parity.poisoned_memory():
        weight = torch.ones(x.shape[1], 1, 1, 1)
        call = (grad, x, weight, None, (1, 1), (0, 0, 0, 0), activation, [True, False, False])
        return parity.backward_of("cpu", "depthwise_conv2d")(*call)[0]


@parity.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_special_numbers(isa, activation):
    tiny = torch.finfo(torch.float32).tiny
    numbers = [math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny, tiny / 1024, 1e-20, -1e-20]
    numbers += [sign * x for x in (1e18, 1e4, 200, 104, 90, 88.8, 88, 50, 17, 10, 6.05, 5.6) for sign in (1, -1)]
    if activation in ("relu6", "hardswish", "hardsigmoid"):  # whose gradient at NaN depends on PyTorch's vectorisation
        numbers.remove(numbers[0])
    x = torch.tensor(numbers).reshape(1, 1, 1, -1).repeat(1, 17, 2, 1)
    derive = activations.ACTIVATE_BACKWARD[activation]
    got, expected = input_gradients(x, torch.ones_like(x), activation, isa), derive(torch.ones(()).double(), x.double())
    parity.assert_same_kinds(got, expected)
    finite = expected.isfinite()
    assert (got.double() - expected)[finite].abs().max() < 4 * torch.finfo(torch.float32).eps


@parity.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_over_the_line(isa, activation):
    x = torch.linspace(-12, 12, 48 * 2001).reshape(1, 48, 1, -1)
    derive = activations.ACTIVATE_BACKWARD[activation]
    expected, eager = derive(torch.ones(()).double(), x.double()), derive(torch.ones_like(x), x)
    got = input_gradients(x, torch.ones_like(x), activation, isa)
    assert (got.double() - expected).abs().max() <= parity.error_limit(expected, eager)


@parity.every_isa
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "hardsigmoid"])
def test_a_derivative_of_zero_stops_infinite_gradients(isa, activation):
    """At NaN as PyTorch's vectors have it; its code for the rest of a row lets the gradient through in all four."""
    x = torch.tensor([-4.0, -3.0, 2.0, math.nan]).repeat(64).reshape(1, 1, 16, 16)
    grad = torch.full_like(x, math.inf)
    expected = activations.ACTIVATE_BACKWARD[activation](grad, x)
    got = input_gradients(x, grad, activation, isa)
    assert expected.flatten()[:3].tolist() == [0, 0, math.inf]
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operator", BACKWARD)
def test_float64_goes_to_the_reference(operator):
    dtype = torch.float64
    args = example(operator, dtype=dtype).checked()
    mask = [True] * len(parity.OPERATORS_BY_NAME[operator].tensors)
    call = (torch.randn(args[0].shape).to(dtype), *args, mask)
    expected = parity.backward_of("reference", operator)(*call)
    for got, exact in zip(getattr(torch.ops.ffnet_kernels, f"{operator}_backward")(*call), expected, strict=True):
        assert torch.equal(got, exact)


def test_four_outputs_a_channel_go_to_the_reference():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(12, 1, 3, 3)
    call = (torch.randn(2, 12, 8, 8), x, weight, None, (1, 1), (1, 1, 1, 1), "none", [True, True, False])
    expected = parity.backward_of("reference", "depthwise_conv2d")(*call)
    for got, exact in zip(torch.ops.ffnet_kernels.depthwise_conv2d_backward(*call), expected, strict=True):
        assert torch.equal(got, exact)


def test_huge_and_tiny_gradients():
    for gain in (1e-38, 1e-30, 1e15, 1e30):
        for operator in BACKWARD:
            args = example(operator, activation="relu").checked()
            grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)) * gain
            call = (grad, *args, [True] * len(parity.OPERATORS_BY_NAME[operator].tensors))
            expected, eager = parity.reference_of(f"{operator}_backward", call)
            for got, exact, plain in zip(parity.backward_of("cpu", operator)(*call), expected, eager, strict=True):
                assert (got.double() - exact).abs().max() <= parity.error_limit(exact, plain)


BAD = [
    ("depthwise_conv2d", 0, torch.ones(2, 19, 9, 10), "grad must have"),
    ("depthwise_conv2d", 0, torch.ones(2, 19, 9, 11).double(), "grad must be"),
    ("depthwise_conv2d", 1, torch.ones(19, 9, 11), "x must be"),
    ("depthwise_conv2d", 2, torch.ones(19), "weight must be"),
    ("depthwise_conv2d", 3, torch.ones(20), "bias must have"),
    ("depthwise_conv2d", 3, None, "missing tensor"),
    ("depthwise_conv2d", -1, [True, True], "mask must have 3"),
    ("ffnified_attention", 0, torch.ones(1, 19, 9, 11), "grad must have"),
    ("ffnified_attention", 4, torch.ones(20, 1, 3, 3), "key and value"),
    ("ffnified_attention", 7, torch.ones(18), "scale must have"),
    ("ffnified_attention", 7, None, "missing tensor"),
    ("ffnified_attention", 8, torch.ones(2, 19, 9, 10), "residual must have"),
    ("ffnified_attention", -1, [True] * 8, "mask must have 7"),
]


@pytest.mark.parametrize(("operator", "place", "value", "message"), BAD)
def test_bad_arguments_are_refused(operator, place, value, message):
    args = example(operator).checked()
    call = [torch.ones(2, 19, 9, 11), *args, [True] * len(parity.OPERATORS_BY_NAME[operator].tensors)]
    call[place] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.ffnet_kernels, f"{operator}_backward")(*call)
