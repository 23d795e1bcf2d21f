"""The same bits in every run, on any number of threads; arguments stay as they are."""

from concurrent.futures import ThreadPoolExecutor

import parity
import pytest
import torch
from examples import example

import ffnet_kernels as fk

pytestmark = parity.needs_native

SHAPES = {"small": (2, 19, 9, 11), "tall": (1, 40, 61, 13), "many": (3, 130, 14, 14)}
every_operator = pytest.mark.parametrize("operator", parity.OPERATORS)
every_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def on_cpu_backend(case, isa):
    with parity.selected_isa(isa), fk.use_backend("cpu"):
        return case.run()


@parity.every_isa
@every_operator
@every_layout
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_bits_on_any_number_of_threads(operator, isa, layout, shape, threads):
    case = example(operator, shape=shape, layout=layout)
    threads(1)
    first = on_cpu_backend(case, isa)
    for count in (1, 2, 3, 4):
        threads(count)
        for _ in range(2):
            assert torch.equal(on_cpu_backend(case, isa), first), f"{count} threads"


@parity.every_isa
@pytest.mark.parametrize("operator", ["depthwise_conv2d", "ffnified_attention"])  # the others' products are torch's
@every_layout
@pytest.mark.parametrize("shape", [(2, 19, 9, 11), (1, 5, 70, 13), (5, 40, 14, 14)])
def test_same_bits_of_gradients_on_any_number_of_threads(operator, isa, layout, shape, threads):
    args = example(operator, shape=shape, layout=layout).checked()
    backward = parity.backward_of("cpu", operator)
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
    mask = [True] * len(parity.OPERATORS_BY_NAME[operator].tensors)
    threads(1)
    with parity.selected_isa(isa):
        first = backward(grad, *args, mask)
        for count in (1, 2, 3, 4):
            threads(count)
            for got, expected in zip(backward(grad, *args, mask), first, strict=True):
                assert torch.equal(got, expected), f"{count} threads"


@parity.every_isa
@every_operator
def test_several_python_threads_at_once(operator, isa):
    """Threads share no scratch: calls of different sizes at the same time give what they give alone."""
    cases = [example(operator, shape=(1, 3 + 7 * i, 5 + 4 * i, 8 + i), seed=i) for i in range(6)] * 5
    alone = [on_cpu_backend(case, isa) for case in cases]

    def run(case):
        with fk.use_backend("cpu"):
            return case.run()

    with parity.selected_isa(isa), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, cases))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@parity.every_isa
@every_operator
@pytest.mark.parametrize("layout", parity.LAYOUTS)
def test_arguments_stay_as_they_are(operator, isa, layout):
    """Including what lies in memory around a view."""
    case = example(operator, layout=layout)

    def bits(t):
        return torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()).clone()

    before = [bits(t) for t in case.tensors()]
    versions = [t._version for t in case.tensors()]
    on_cpu_backend(case, isa)
    assert all(torch.equal(bits(t), b) for t, b in zip(case.tensors(), before, strict=True))
    assert [t._version for t in case.tensors()] == versions


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processors_instruction_sets_differ_in_rounding_only(operator, dtype):
    """A check of the tests: `select_isa` does change the code that runs."""
    case = example(operator, shape=(2, 64, 20, 20), dtype=dtype)
    outputs = {isa: on_cpu_backend(case, isa) for isa in parity.ISAS}
    expected, eager = parity.reference_of(operator, case.checked())
    limit = parity.error_limit(expected, eager)
    assert all((out - expected).abs().max() <= limit for out in outputs.values())
    different = {out.float().numpy().tobytes() for out in outputs.values()}
    if dtype == torch.float32:  # avx512bf16 is avx512 there
        code = {isa.removesuffix("bf16") for isa in outputs}
    else:  # rounding hides the order of sums, but not of products in pairs
        code = {isa == "avx512bf16" for isa in outputs}
    assert len(different) >= len(code)
