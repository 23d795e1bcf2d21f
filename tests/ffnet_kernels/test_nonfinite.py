"""NaN, infinities, huge and denormal numbers come out where the float64 reference has them.

Not where float32 has them: torch's vectorised float32 GELU turns +inf into NaN, its scalar and its float64 one do not.
"""

import itertools
import math

import parity
import pytest
import torch
from examples import example
from parity import assert_same_kinds, kinds

import ffnet_kernels as fk
from ffnet_kernels.backends import reference
from ffnet_kernels.backends.activations import ACTIVATE, ACTIVATIONS

pytestmark = parity.needs_native

SPECIAL = (math.nan, math.inf, -math.inf)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def run(case, isa):
    with parity.selected_isa(isa), fk.use_backend("cpu"), parity.poisoned_memory():
        return case.run()


@parity.every_isa
@every_activation
@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), (5, 4)])
def test_planted_in_the_map(operator, isa, activation, special, kernel):
    case = example(operator, kernel=kernel, activation=activation, shape=(2, 19, 21, 22))
    x = case.args[0]
    x[0, 0, 0, 0] = x[0, 7, 10, 12] = x[1, 18, 20, 21] = special
    expected, _ = parity.reference_of(operator, case.checked())
    assert kinds(expected).any() or (activation in ("relu6", "hardsigmoid") and math.isinf(special))  # bounded
    assert not kinds(expected).all()
    assert_same_kinds(run(case, isa), expected)


@parity.every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_planted_in_a_16_bit_map(operator, isa, dtype, special, layout):
    """Only where a filter reaches it, although pairs of rows are multiplied at once."""
    case = example(operator, kernel=(7, 7), activation="none", shape=(2, 19, 25, 22), dtype=dtype, layout=layout)
    x = case.args[0]
    x[0, 7, 11, 12] = x[1, 18, 24, 21] = special
    expected, _ = parity.reference_of(operator, case.checked())
    assert_same_kinds(run(case, isa), expected)


def convolve_inside(x, weight, bias, stride, padding):
    """A depthwise convolution whose taps on padding are not there. Plain PyTorch multiplies them by zero on some
    processors and leaves them out on others, which tells where a weight is NaN or infinite; kernels leave them out."""
    extents = zip(x.shape[2:], weight.shape[2:], stride, (padding[:2], padding[2:]), strict=True)
    sizes = [(extent + sum(pads) - k) // step + 1 for extent, k, step, pads in extents]
    out = x.new_zeros(x.shape[0], x.shape[1], *sizes) + (0 if bias is None else bias[:, None, None])
    for ky, kx in itertools.product(*map(range, weight.shape[2:])):
        places = []  # of outputs that the tap serves, and of pixels that it reads
        for size, extent, step, before in zip(
            sizes, x.shape[2:], stride, (ky - padding[0], kx - padding[2]), strict=True
        ):
            served = [i for i in range(size) if 0 <= i * step + before < extent]
            places.append((served, [i * step + before for i in served]))
        (rows, from_rows), (columns, from_columns) = places
        pixels = x[:, :, from_rows][..., from_columns] * weight[:, 0, ky, kx, None, None]
        out[:, :, torch.tensor(rows)[:, None], columns] += pixels
    return out


@parity.every_isa
@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("special", SPECIAL)
def test_planted_in_any_other_tensor(operator, isa, special, monkeypatch):
    case = example(operator, activation="none")
    plain, _ = parity.reference_of(operator, case.checked())
    monkeypatch.setattr(reference, "convolve", convolve_inside)
    torch.testing.assert_close(parity.reference_of(operator, case.checked())[0], plain)
    for tensor in case.tensors()[1:]:
        planted = tensor.view(-1)[:1]
        before = planted.clone()
        planted.fill_(special)
        expected, _ = parity.reference_of(operator, case.checked())
        assert kinds(expected).any()
        assert_same_kinds(run(case, isa), expected)
        planted.copy_(before)


@parity.every_isa
@pytest.mark.parametrize("special", SPECIAL)
def test_taps_on_padding_do_not_count(isa, special):
    """A NaN in a weight that only ever meets padding leaves the result finite."""
    case = example("depthwise_conv2d", shape=(1, 5, 3, 3), activation="none")
    case.args[1][:, :, 0, 0] = special
    assert run(case, isa).isfinite().all()


@parity.every_isa
@every_activation
def test_activations_of_special_numbers(isa, activation):
    """A 1×1 filter of ones hands its input to the activation."""
    tiny = torch.finfo(torch.float32).tiny
    numbers = [*SPECIAL, 0.0, -0.0, tiny, -tiny, tiny / 1024, -tiny / 1024, 1e-20, -1e-20]
    numbers += [sign * x for x in (1e30, 3e38, 1e4, 200, 104, 90, 88.8, 88, 50, 17, 10) for sign in (1, -1)]
    x = torch.tensor(numbers).reshape(1, 1, 1, -1).repeat(1, 17, 2, 1)
    expected = ACTIVATE[activation](x.double())
    eager = ACTIVATE[activation](x)
    out = run(parity.Case("depthwise_conv2d", (x, torch.ones(17, 1, 1, 1)), {"activation": activation}), isa)
    assert_same_kinds(out, expected)
    # Element by element. Activations of x round by the size of x, in their tails too.
    finite = expected.isfinite() & eager.isfinite()
    error = (out.double() - expected).abs()[finite]
    roundings = 4 * torch.finfo(torch.float32).eps * x.double().abs()[finite] + 2 * torch.finfo(torch.float32).tiny
    limit = 2 * (eager.double() - expected).abs()[finite] + roundings
    worst = (error - limit).argmax()
    assert error[worst] <= limit[worst], f"{activation}({x[finite][worst]}) = {out[finite][worst]}"


@parity.every_isa
@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("gain", [1e-38, 1e-30, 1e15, 1e30])
def test_huge_and_tiny_maps(operator, isa, gain):
    case = example(operator, activation="relu")
    args = (case.args[0] * gain, *case.args[1:])
    case = case._replace(args=args)
    expected, eager = parity.reference_of(operator, case.checked())
    error = (run(case, isa).double() - expected).abs().max()
    assert error <= parity.error_limit(expected, eager)
