"""Dense convolutions with their activation: every instruction set against the float64 reference."""

import parity
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ffnet_kernels as fk
from ffnet_kernels.backends import cpu, reference
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.ops._operator import Operator

_kernels = st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 3), (5, 1), (7, 7)])


@st.composite
def cases(draw: st.DrawFn) -> parity.Case:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels, outputs = draw(st.sampled_from([1, 3, 16, 18, 33, 64])), draw(st.sampled_from([1, 2, 7, 16, 31, 48]))
    kernel = draw(_kernels)
    shape = (draw(st.integers(0, 3)), channels, draw(st.integers(1, 20)), draw(st.integers(1, 40)))
    shape = (*shape[:2], max(shape[2], kernel[0]), max(shape[3], kernel[1]))
    stride = draw(st.sampled_from([1, 2, (1, 2), (2, 1)]))
    padding = draw(st.sampled_from(["same", "valid", 1, (2, 1)]))
    x = parity.laid_out(shape, draw(st.sampled_from(parity.LAYOUTS)), generator, dtype=dtype)
    gain = (channels * kernel[0] * kernel[1]) ** -0.5
    layout = draw(st.sampled_from(["nchw", "channels_last", "stepped", "transposed"]))
    weight = parity.laid_out((outputs, channels, *kernel), layout, generator, gain, dtype)
    bias = draw(st.sampled_from([None, torch.randn(outputs, generator=generator).to(dtype)]))
    options = {"stride": stride, "padding": padding, "activation": draw(st.sampled_from(ACTIVATIONS))}
    if draw(st.booleans()):
        options["scale"] = torch.randn(outputs, generator=generator).to(dtype)
    if draw(st.booleans()):
        size = fk.ops.conv2d.reference(
            *fk.ops.conv2d.checked(x, weight, bias, stride, padding, "none", None, None)
        ).shape
        options["residual"] = parity.laid_out(size, draw(st.sampled_from(parity.LAYOUTS)), generator, dtype=dtype)
    return parity.Case("conv2d", (x, weight, bias), options)


@parity.needs_native
@given(case=cases())
def test_parity(case):
    parity.check(case)


def example(dtype=torch.float32, requires_grad=False, **options):
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    return (values(2, 5, 7, 6), values(4, 5, 3, 3), values(4)), {
        "stride": 2,
        "padding": 1,
        "activation": "gelu",
        **options,
    }


def test_gradients():
    args, options = example(torch.float64, requires_grad=True)
    more = torch.randn(4).double().requires_grad_(), torch.randn(2, 4, 4, 3).double().requires_grad_()

    def run(x, weight, bias, scale, residual):
        return fk.conv2d(x, weight, bias, **options, scale=scale, residual=residual)

    assert torch.autograd.gradcheck(run, (*args, *more))
    assert torch.autograd.gradgradcheck(run, (*args, *more))


@parity.needs_native
def test_the_dispatcher_knows_it():
    args, options = example(requires_grad=True)
    for scale, residual in ((None, None), (torch.randn(4), torch.randn(2, 4, 4, 3, requires_grad=True))):
        call = fk.ops.conv2d.checked(*args, **options, scale=scale, residual=residual)
        torch.library.opcheck(torch.ops.ffnet_kernels.conv2d.default, call)


@pytest.fixture
def composed(monkeypatch):
    """The operators whose gradients were composed, in calls that no kernel takes."""
    names, fallback = [], Operator._fallback_gradients

    def recorded(self, backend, call):
        names.extend([self.name] if backend is cpu else [])
        return fallback(self, backend, call)

    monkeypatch.setattr(Operator, "_fallback_gradients", recorded)
    return names


def pointwise(shape, outputs, bias=True, layout="channels_last", kernel=1, **options):
    generator = torch.Generator().manual_seed(0)
    x = parity.laid_out(shape, layout, generator)
    weight = torch.randn(outputs, shape[1], kernel, kernel, generator=generator) / shape[1] ** 0.5
    return parity.Case("conv2d", (x, weight, torch.randn(outputs, generator=generator) if bias else None), options)


@parity.needs_native
@pytest.mark.parametrize("wanted", [None, {0}, {1}, {1, 2}], ids=["all", "x", "weight", "weight and bias"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), [((2, 32, 16, 16), 64), ((3, 21, 5, 3), 9), ((1, 200, 40, 41), 33)])
def test_gradients_of_pointwise_convolutions(shape, outputs, bias, wanted, composed):
    parity.check_gradients(pointwise(shape, outputs, bias), layout="channels_last", wanted=wanted)
    assert not composed


WITHOUT_KERNEL = {
    "an NCHW map": {"layout": "nchw"},
    "a map with gaps": {"layout": "channel_slice"},
    "a 3x3 filter": {"kernel": 3},
    "a stride": {"stride": 2},
    "padding": {"padding": 1},
    "an activation": {"activation": "relu"},
    "a scale": {"scale": torch.linspace(-1, 1, 20)},
    "a residual": {"residual": torch.linspace(-1, 1, 2 * 20 * 8 * 9).reshape(2, 20, 8, 9)},
}


@parity.needs_native
@pytest.mark.parametrize("options", WITHOUT_KERNEL.values(), ids=WITHOUT_KERNEL)
def test_gradients_without_a_kernel(options, composed):
    parity.check_gradients(pointwise((2, 18, 8, 9), 20, **options), layout="channels_last")
    assert set(composed) == {"conv2d"}


@parity.needs_native
@pytest.mark.parametrize(("layout", "wanted"), [("nchw", None), ("channels_last", {2})])
def test_incoming_gradients_and_masks_without_a_kernel(layout, wanted, composed):
    parity.check_gradients(pointwise((2, 18, 8, 9), 20), layout=layout, wanted=wanted)
    assert set(composed) == {"conv2d"}


@parity.needs_native
def test_gradients_behind_the_composed_path_are_torchs():
    args, options = example(requires_grad=True)
    with fk.use_backend("cpu"):
        fk.conv2d(*args, **options).square().sum().backward()
    twins = [a.detach().clone().requires_grad_() for a in args]
    F.gelu(F.conv2d(*twins, stride=2, padding=1)).square().sum().backward()
    for tensor, twin in zip(args, twins, strict=True):
        torch.testing.assert_close(tensor.grad, twin.grad, rtol=1e-4, atol=1e-4)


@parity.needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_show(dtype):
    x = torch.randn(3, 18, 17, 33).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(20, 18, 3, 3).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with fk.use_backend("cpu"):
                results.append(fk.conv2d(x, weight, stride=2, padding=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@parity.needs_native
@parity.every_isa
def test_threads_do_not_show_in_gradients(isa):
    case, results = pointwise((1, 200, 40, 41), 33), []
    args = [a.requires_grad_() for a in case.args]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with parity.selected_isa(isa), fk.use_backend("cpu"):
                results.append(torch.autograd.grad(case.run().square().sum(), args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(4, 3, 3, 3)}, r"weight: expected the shape \[out, 5, kh, kw\], got \[4, 3, 3, 3\]"),
        ({"weight": torch.ones(4, 5, 9, 9)}, "larger than the padded map"),
        ({"bias": torch.ones(5)}, "bias: expected 4 elements, got 5"),
        ({"stride": 3}, "stride: expected 1 or 2, got 3"),
        ({"activation": "tanh"}, "activation: expected one of"),
    ],
)
def test_bad_arguments(changes, message):
    (x, weight, bias), options = example()
    with pytest.raises(ValueError, match=message):
        fk.conv2d(**{"x": x, "weight": weight, "bias": bias, **options, **changes})


@parity.needs_native
@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_raw_operator_checks_what_it_reads(position):
    args, options = example()
    call = list(fk.ops.conv2d.checked(*args, **options, scale=None, residual=None))
    call[position] = call[position].double()
    with torch.no_grad(), pytest.raises(RuntimeError, match="must be"):
        torch.ops.ffnet_kernels.conv2d.default(*call)


@parity.needs_native
@pytest.mark.parametrize("bias", [torch.ones(8), torch.ones(9).double(), torch.ones(9, 1)])
def test_the_raw_gradients_check_what_they_write(bias):
    x, weight, _ = pointwise((2, 8, 5, 4), 9).args
    grad = torch.ones(2, 9, 5, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="bias must"):
        torch.ops.ffnet_kernels.conv2d_backward(
            grad, x, weight, bias, [1, 1], [0] * 4, "none", None, None, [True] * 3 + [False] * 2
        )


def test_an_optimised_model():
    """Which convolutions run on the operator: pointwise ones, and those of few channels in inference."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 3)).eval()
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected = model(x)
        fk.optimize(model)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        found = [row[:2] for row in fk.report(model).rows]
    assert found[1:] == [
        ("0, 1", "conv2d"), ("2", "conv2d"), ("3", "torch: convolution (dense, and not 1×1)")
    ]  # fmt: skip


def test_a_planted_infinity_stays_where_it_belongs():
    x = torch.randn(1, 16, 9, 9)
    x[0, 3, 4, 4] = torch.inf
    weight = torch.randn(6, 16, 3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        expected = reference.convolve(x.to(dtype).double(), weight.to(dtype).double(), None, (1, 1), (1, 1, 1, 1), 1)
        assert torch.equal(fk.conv2d(x.to(dtype), weight.to(dtype)).isfinite(), expected.isfinite())


@parity.needs_native
def test_a_row_with_more_padding_than_a_task_is_wide():
    x, weight = torch.randn(1, 64, 1, 8), torch.randn(24, 64, 1, 3) / 14
    parity.check(parity.Case("conv2d", (x, weight, None), {"padding": (0, 3000)}))


@parity.needs_native
@pytest.mark.parametrize("shape", [(4, 3, 2, 4), (4, 3, 2, 2)], ids=["16 lanes", "8 lanes"])
def test_rows_that_repeat(shape):
    """Ends of a run of pixels may lie as far apart as those of adjacent ones, with other pixels between them."""
    one_row = torch.randn(shape[0], shape[1], 1, shape[3])
    x, weight = one_row.expand(shape), torch.randn(5, shape[1], 1, 1)
    parity.check(parity.Case("conv2d", (x, weight, None), {}))
    filters = {
        "expand_weight": torch.randn(7, shape[1]),
        "expand_bias": None,
        "project_weight": torch.randn(shape[1], 7),
    }
    args = (x.contiguous(), torch.randn(shape[1], 1, 3, 3), None, *filters.values(), None)
    parity.check(parity.Case("channel_mixer", args, {"residual": x}))


@parity.needs_native
def test_uneven_padding_of_the_raw_operator():
    """A 1×1 filter that reaches a row below the map; the public function cannot ask for it."""
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 1, 1)
    out = torch.ops.ffnet_kernels.conv2d(x, weight, None, [1, 1], [0, 1, 0, 2], "none", None, None)
    torch.testing.assert_close(out, F.conv2d(F.pad(x, (0, 2, 0, 1)), weight), rtol=1e-5, atol=1e-5)


@parity.needs_native
@pytest.mark.parametrize("size", [(7, 7), (15, 17), (16, 16), (3, 48)])
def test_planes_of_any_size(size):
    x, weight = torch.randn(3, 20, *size), torch.randn(33, 20, 1, 1) / 4
    parity.check(parity.Case("conv2d", (x, weight, torch.randn(33)), {"activation": "gelu"}))


@parity.needs_native
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pair_is_known_without_data(memory_format):
    x = torch.randn(2, 3, 17, 19).contiguous(memory_format=memory_format)
    first = torch.randn(8, 3, 3, 3), torch.randn(8), [2, 2], [1, 1, 1, 1], "relu6"
    second = torch.randn(12, 8, 3, 3), None, [2, 2], [0, 1, 0, 1], "gelu"
    pair = torch.ops.ffnet_kernels.conv2d_pair.default
    torch.library.opcheck(pair, (x, *first, *second), test_utils=("test_schema", "test_faketensor"))
