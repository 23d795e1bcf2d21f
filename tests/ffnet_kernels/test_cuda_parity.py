"""The CUDA kernels, run on the processor, against the float64 reference: results and all gradients."""

import functools

import cuda_cases
import parity
import pytest
from cuda_cases import machine, one_thread  # noqa: F401  (a fixture)
from examples import example
from hypothesis import given, settings

from ffnet_kernels.backends import choice

pytestmark = cuda_cases.needs_host

SMALL = {"shape": (1, 3, 4, 5), "kernel": (3, 3)}


def check(case, **options):
    assert choice.BACKENDS["cuda"].refusal(case.operator, case.checked()) is None
    parity.check(case, "cuda")
    parity.check_gradients(case, "cuda", **options)


@functools.cache
def kernels_of_checked(name, dtype) -> frozenset[str]:
    """Checks a case of the tables; returns the kernels that it started."""
    case, layout, options = cuda_cases.made(name, dtype)
    cuda_cases.started_kernels()
    with machine(**options):
        check(case, layout=layout)
    return cuda_cases.started_kernels()


@pytest.mark.parametrize(("name", "dtype"), cuda_cases.CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_case(name, dtype):
    kernels_of_checked(name, dtype)


def test_the_cases_reach_every_kernel_of_the_library():
    started = frozenset().union(*(kernels_of_checked(*case) for case in cuda_cases.CASES))
    assert set(cuda_cases.kernels_by_address().values()) - started == set()


@settings(max_examples=25)
@given(case=parity.depthwise_cases(cuda_cases.SIZES), options=cuda_cases.MACHINES)
def test_drawn_depthwise_conv2d(case, options):
    with machine(**options):
        check(case)


@settings(max_examples=25)
@given(case=parity.attention_cases(cuda_cases.PAIRS), options=cuda_cases.MACHINES)
def test_drawn_ffnified_attention(case, options):
    with machine(**options):
        check(case)


@settings(max_examples=25)
@given(case=parity.channel_mixer_cases(cuda_cases.SIZES), options=cuda_cases.MACHINES)
def test_drawn_channel_mixer(case, options):
    with machine(**options):
        check(case)


@pytest.mark.parametrize("dtype", cuda_cases.DTYPES)
@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("layout", ["expanded_batch", "expanded_channels", "stepped", "channel_slice", "channels_last"])
def test_gradient_of_any_layout(operator, layout, dtype):
    case = example(operator, shape=(2, 8, 4, 5), kernel=(3, 3), dtype=dtype)
    parity.check_gradients(case, "cuda", layout=layout)


ALONE = [(name, {}, {i}) for name in parity.OPERATORS for i in parity.OPERATORS_BY_NAME[name].tensors]
ALONE += [("depthwise_conv2d", {"multiplier": 2}, {0}), ("depthwise_conv2d", {"stride": 2}, {1, 2})]
ALONE += [("ffnified_attention", {"value_kernel": (2, 4)}, {i}) for i in (0, 1, 2, 3, 4, 6)]
ALONE += [("channel_mixer", {}, wanted) for wanted in ({0, 4}, {1, 2, 8}, {3, 6})]


@pytest.mark.parametrize("dtype", [cuda_cases.F32, cuda_cases.BF16])
@pytest.mark.parametrize(("operator", "options", "wanted"), ALONE)
def test_some_gradients_alone(operator, options, wanted, dtype):
    parity.check_gradients(example(operator, **SMALL, dtype=dtype, **options), "cuda", wanted=wanted)


@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
@pytest.mark.parametrize("shape", [(20, 3, 19, 8), (2, 3, 40, 24), (1, 2, 33, 75)])
@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_any_number_of_multiprocessors(operator, shape, multiprocessors):
    with machine(multiprocessors=multiprocessors):
        check(example(operator, shape=shape, kernel=(5, 5), dtype=cuda_cases.F16))
