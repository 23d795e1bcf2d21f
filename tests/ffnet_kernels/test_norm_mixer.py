"""ConvNeXt's block as one operator of programs: a channel mixer with a LayerNorm behind its depthwise convolution."""

import math

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ffnet_kernels import kernels, use_backend
from ffnet_kernels.backends.activations import ACTIVATE, ACTIVATIONS
from ffnet_kernels.selftest import error_limit

pytestmark = parity.needs_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(
    shape=(2, 19, 9, 11), *, hidden=37, outputs=None, kernel=(7, 7), dtype=torch.float32, activation="gelu", eps=1e-6,
    affine=True, biases=True, ends=True, layout="channels_last",
) -> list:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    channels, outputs = shape[1], outputs or shape[1]

    def normal(*size: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * gain).to(dtype)

    x = parity.laid_out(shape, layout, generator, dtype=dtype)
    return [
        x, normal(channels, 1, *kernel, gain=1 / math.sqrt(math.prod(kernel))), normal(channels) if biases else None,
        normal(channels) if affine else None, normal(channels) if affine else None, eps,
        normal(hidden, channels, gain=channels**-0.5), normal(hidden) if biases else None,
        normal(outputs, hidden, gain=hidden**-0.5), normal(outputs) if biases else None, activation,
        normal(outputs) if ends else None, normal(shape[0], outputs, *shape[2:]) if ends else None,
    ]  # fmt: skip


def plain(x, weight, bias, norm_weight, norm_bias, eps, expand, expand_bias, *following) -> Tensor:
    project, project_bias, activation, scale, residual = following
    y = F.conv2d(x, weight, bias, padding="same", groups=x.shape[1]).permute(0, 2, 3, 1)
    y = F.layer_norm(y, (x.shape[1],), norm_weight, norm_bias, eps)
    y = F.linear(ACTIVATE[activation](F.linear(y, expand, expand_bias)), project, project_bias)
    y = (y if scale is None else y * scale).permute(0, 3, 1, 2)
    return y if residual is None else residual + y


def wide(args: list) -> list:
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def run(args: list, isa: str | None) -> Tensor:
    with parity.selected_isa(isa), parity.poisoned_memory():
        return torch.ops.ffnet_kernels.norm_mixer.default(*args)


def check(args: list, isa: str | None) -> None:
    with parity.convolutions_in_time(tuple(args)):
        expected, eager = plain(*wide(args)), plain(*args)
    out = run(args, isa)
    assert out.shape == expected.shape
    assert out.dtype == eager.dtype
    assert (out.double() - expected).abs().max() <= error_limit(expected, eager)


@parity.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shape": (1, 40, 14, 14), "hidden": 160},
        {"shape": (3, 5, 7, 7), "hidden": 6},
        {"shape": (2, 1, 4, 3), "hidden": 5},
        {"shape": (1, 130, 8, 8), "hidden": 1030, "layout": "nchw"},
        {"shape": (5, 16, 3, 1), "affine": False, "biases": False, "ends": False, "eps": 1e-3},
        {"kernel": (4, 3), "outputs": 50, "activation": "leaky_relu", "layout": "stepped"},
        {"shape": (2, 33, 16, 16), "kernel": (3, 3), "outputs": 3, "activation": "hardsigmoid"},
    ],
    ids=str,
)
def test_parity(isa, dtype, options):
    check(arguments(dtype=dtype, **options), isa)


@parity.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(isa, activation):
    check(arguments(activation=activation), isa)


@parity.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_larger_than_the_deviations(isa, dtype):
    args = arguments((1, 96, 9, 11), dtype=dtype)
    args[2] = args[2] + 300
    check(args, isa)


@parity.every_isa
@pytest.mark.parametrize("mean", [0, 2**16, -(2**20)])
def test_no_mean_costs_a_digit(isa, mean):
    """Of values that float32 has exactly, by a 1×1 filter of ones and products that hand them on."""
    values = torch.randint(-8, 9, (1, 72, 5, 7), generator=torch.Generator().manual_seed(0)) + float(mean)
    eye = torch.eye(72)
    args = [values, torch.ones(72, 1, 1, 1), None, None, None, 1e-5, eye, None, eye, None, "none", None, None]
    expected = plain(*wide(args))
    assert (run(args, isa).double() - expected).abs().max() < 16 * torch.finfo(torch.float32).eps


@parity.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_special_number_spoils_the_pixels_that_read_it(isa, dtype, special):
    args = arguments((2, 19, 25, 22), kernel=(7, 7), dtype=dtype, activation="none")
    args[0][0, 7, 11, 12] = args[0][1, 18, 24, 21] = special
    parity.assert_same_kinds(run(args, isa), plain(*wide(args)))


@parity.every_isa
@pytest.mark.parametrize("place", [3, 4, 6, 7, 8, 9, 11])
def test_a_special_number_in_another_tensor(isa, place):
    args = arguments(activation="none")
    args[place].view(-1)[:1] = math.inf
    parity.assert_same_kinds(run(args, isa), plain(*wide(args)))


@parity.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(isa, dtype):
    args, before = arguments((3, 70, 14, 13), hidden=140, dtype=dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(args, isa)
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            assert torch.equal(run(args, isa), first), f"{count} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_it_is_known_without_data(layout):
    args = arguments(layout=layout)
    overload = torch.ops.ffnet_kernels.norm_mixer.default
    torch.library.opcheck(overload, tuple(args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_no_kernel_runs_it_is_plain_pytorch(dtype):
    args = [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments()]
    with use_backend("reference"):
        torch.testing.assert_close(kernels.norm_mixer(*args), plain(*args))
    torch.testing.assert_close(kernels.norm_mixer(*args), plain(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(19, 9, 11), "x must be"),
        (1, torch.ones(18, 1, 3, 3), "weight"),
        (3, torch.ones(18), "norm_weight must have 19"),
        (3, torch.ones(19).double(), "norm_weight must be"),
        (4, torch.ones(19, 1), "norm_bias must be"),
        (6, torch.ones(5, 18), "expand_weight"),
        (10, "tanh", "unknown activation"),
        (12, torch.ones(1, 19, 9, 11), "residual"),
    ],
)
def test_a_bad_argument_is_refused(place, value, message):
    args = arguments()
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ffnet_kernels.norm_mixer.default(*args)
