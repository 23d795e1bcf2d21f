"""depthwise_conv1d: kernels against float64, kernels to 64, and what is its own: series, causal padding, its errors."""

from typing import Any, NamedTuple

import cuda_cases
import parity
import pytest
import torch
import torch.nn.functional as F
import triton_cases
from cuda_cases import one_thread  # noqa: F401  (a fixture)

import ffnet_kernels as fk
from ffnet_kernels.backends import cpu
from ffnet_kernels.ops import depthwise_conv1d as defined

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A call, as tests/ffnet_kernels/parity.py takes the cases of operators."""

    args: tuple
    kwargs: dict[str, Any]
    operator: str = defined.NAME

    def checked(self) -> tuple:
        return defined.checked(*self.args, **{"stride": 1, "padding": "same", "activation": "none", **self.kwargs})

    def run(self) -> torch.Tensor:
        return fk.depthwise_conv1d(*self.args, **self.kwargs).unsqueeze(2)


def case(
    kernel: int, *, shape=(2, 19, 70), outputs=1, dtype=torch.float32, bias=True, channels_last=False, **kwargs
) -> Case:
    generator = torch.Generator().manual_seed(kernel)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    n, c, length = shape
    x = normal(n, length, c).transpose(1, 2) if channels_last else normal(*shape)
    return Case((x, normal(outputs * c, 1, kernel), normal(outputs * c) if bias else None), kwargs)


KERNELS = {
    "one tap": case(1),
    "even": case(2, activation="relu"),
    "51": case(51, activation="gelu"),
    "51, longer than the series": case(51, shape=(2, 19, 24), padding="causal"),
    "63, stride 2": case(63, stride=2, activation="silu"),
    "64": case(64, channels_last=True),
    "64, causal": case(64, padding="causal", activation="gelu"),
    "64, valid": case(64, padding="valid", bias=False),
    "64, on each side": case(64, padding=40, stride=2),
    "64, two outputs": case(64, outputs=2, padding="causal", stride=2),
    "5, one channel": case(5, shape=(3, 1, 9), channels_last=True),
    "3, one value": case(3, shape=(2, 7, 1), padding="causal"),
    "51, no batch": case(51, shape=(0, 4, 60)),
}


@parity.needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_cpu_kernels_on_every_instruction_set(name, dtype):
    made = KERNELS[name]
    made = Case(tuple(None if t is None else t.to(dtype) for t in made.args), made.kwargs)
    assert cpu.refusal(made.operator, made.checked()) is None
    parity.check(made)
    parity.check_gradients(made)


@parity.needs_native
@pytest.mark.parametrize("padding", ["same", "causal"])
def test_every_kernel_to_64(padding):
    """On the kernels, with gradients; and series that are steps of a longer one, or turned around."""
    for kernel in range(1, 65):
        made = case(kernel, shape=(2, 3, 140), padding=padding, activation="gelu")
        x, weight, bias = made.args
        x = (x[..., ::2], x[..., :70], x[..., 70:].flip(2))[kernel % 3]
        sides = (kernel - 1, 0) if padding == "causal" else ((kernel - 1) // 2, kernel // 2)
        results = []
        for dtype in (torch.float32, torch.float64):
            leaves = [t.to(dtype).requires_grad_() for t in (x.detach(), weight, bias)]
            if dtype == torch.float32:
                y = fk.depthwise_conv1d(*leaves, **made.kwargs)
            else:
                y = F.gelu(F.conv1d(F.pad(leaves[0], sides), *leaves[1:], groups=3))
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert results[0][0].shape == (2, 3, 70)
        for found, exact in zip(*results, strict=True):
            assert (found - exact).abs().max() <= 1e-5 * exact.abs().max(), kernel


@cuda_cases.needs_host
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["51", "64, causal", "64, two outputs"])
def test_cuda_kernels(name, dtype):
    made = KERNELS[name]
    parity.check(Case(tuple(None if t is None else t.to(dtype) for t in made.args), made.kwargs), "cuda")


@pytest.mark.long
@triton_cases.needs_interpreter
@pytest.mark.parametrize("padding", ["same", "causal"])
def test_triton_kernels(padding):
    parity.check(case(64, shape=(1, 3, 20), padding=padding, activation="gelu"), "triton")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 4, 5])
def test_it_is_the_convolution_of_pytorch(stride, kernel):
    x, weight, bias = (t.double() for t in case(kernel, shape=(2, 3, 11)).args)
    for padding, sides in (("same", ((kernel - 1) // 2, kernel // 2)), ("causal", (kernel - 1, 0)), (6, (6, 6))):
        y = fk.depthwise_conv1d(x, weight, bias, stride=stride, padding=padding, activation="gelu")
        expected = F.gelu(F.conv1d(F.pad(x, sides), weight, bias, stride, groups=3))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_causal_results_see_no_later_value():
    x, weight, _ = case(51).args
    y = fk.depthwise_conv1d(x, weight, padding="causal")
    later = x.clone()
    later[..., 40:] = torch.nan
    assert torch.equal(fk.depthwise_conv1d(later, weight, padding="causal")[..., :40], y[..., :40])


def test_gradients_of_every_order():
    x, weight, bias = (t.double().requires_grad_() for t in case(4, shape=(1, 2, 6)).args)
    for padding in ("causal", "same"):

        def run(*tensors, padding=padding):
            return fk.depthwise_conv1d(*tensors, padding=padding, stride=2, activation="gelu")

        assert torch.autograd.gradcheck(run, (x, weight, bias))
        assert torch.autograd.gradgradcheck(run, (x, weight, bias))


def test_compiles_in_one_graph_and_honours_autocast():
    x, weight, bias = case(51).args
    torch._dynamo.reset()
    compiled = torch.compile(fk.depthwise_conv1d, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), fk.depthwise_conv1d(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.depthwise_conv1d(x, weight, bias).dtype == torch.bfloat16


def test_explain():
    decision = fk.explain("depthwise_conv1d", *KERNELS["64, causal"].args, padding="causal")
    assert decision.operator == "depthwise_conv2d"
    with fk.use_backend("reference"):
        assert fk.explain(fk.depthwise_conv1d, *KERNELS["51"].args).backend == "reference"


SERIES, FILTER, VECTOR = torch.ones(2, 4, 8), torch.ones(4, 1, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", None, TypeError, "x: expected a tensor, got NoneType"),
        ("x", SERIES[0], ValueError, r"x: expected series \[N, C, L\], got 2 dim.*\[4, 8\]"),
        ("x", SERIES[..., :0], ValueError, r"x: expected series of at least one value.*\[2, 4, 0\]"),
        ("x", SERIES[:, :0], ValueError, "x: expected at least one channel"),
        ("x", SERIES.int(), ValueError, "x: expected a floating-point dtype, got torch.int32"),
        ("weight", 3, TypeError, "weight: expected a tensor, got int"),
        ("weight", torch.ones(4, 3), ValueError, r"depthwise filter \[channels, 1, k\], got the shape \[4, 3\]"),
        ("weight", torch.ones(4, 4, 3), ValueError, r"depthwise filter.*\[4, 4, 3\]"),
        ("weight", torch.ones(4, 1, 0), ValueError, r"depthwise filter.*\[4, 1, 0\]"),
        ("weight", torch.ones(12, 1, 3), ValueError, "expected 4 or 8 filters.*got 12"),
        ("weight", FILTER.half(), ValueError, "weight: expected .* torch.float32, got torch.float16"),
        ("bias", torch.ones(3), ValueError, "bias: expected 4 elements, got 3"),
        ("stride", 3, ValueError, "stride: expected 1 or 2, got 3"),
        ("stride", (1, 1), ValueError, r"stride: expected 1 or 2, got \(1, 1\)"),
        ("padding", "full", ValueError, "padding: expected 'same', 'causal', 'valid' or .*got 'full'"),
        ("padding", -1, ValueError, "padding: expected no negative number, got -1"),
        ("padding", (1, 1), ValueError, r"padding: .*got \(1, 1\)"),
        ("activation", "tanh", ValueError, "activation: expected one of none.*got 'tanh'"),
    ],
)
def test_bad_input(name, value, error, message):
    arguments = {"x": SERIES, "weight": FILTER, "bias": VECTOR, name: value}
    with pytest.raises(error, match=message):
        fk.depthwise_conv1d(**arguments)


def test_a_kernel_longer_than_the_padded_series():
    with pytest.raises(ValueError, match="kernel of 9 is longer than the padded series of 8"):
        fk.depthwise_conv1d(SERIES, torch.ones(4, 1, 9), padding="valid")
