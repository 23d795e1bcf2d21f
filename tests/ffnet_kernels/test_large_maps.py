"""Maps beyond what csrc/cpu/layout.h takes to be in cache, in each dtype: rows are asked for and gathered ahead."""

import parity
import pytest
import torch
from examples import example

import ffnet_kernels as fk

pytestmark = parity.needs_native

LARGE = (2, 40, 190, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_large_maps(operator, layout, dtype):
    parity.check(example(operator, shape=LARGE, kernel=(3, 3), layout=layout, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_maps_with_strides(dtype):
    shape, geometry = (2, 40, 270, 261), {"kernel": (5, 4), "stride": (2, 1), "padding": (1, 3)}
    for multiplier in (1, 2):
        case = example(
            "depthwise_conv2d", shape=shape, layout="channels_last", dtype=dtype, multiplier=multiplier, **geometry
        )
        parity.check(case)


@pytest.mark.parametrize("kernel", [(4, 4), (6, 3)])
@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_large_maps_do_not_show_what_ran_before(operator, kernel):
    """Rows that were not gathered would be those of an earlier call: pairs of an even filter reach one row further."""
    case = example(operator, shape=LARGE, kernel=kernel, layout="channels_last", dtype=torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        with fk.use_backend("cpu"):
            for before in (0.0, float("nan")):
                fk.depthwise_conv2d(torch.full((1, 64, 200, 200), before), torch.ones(64, 1, 3, 3))
                found.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
