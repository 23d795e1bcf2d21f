"""What torch's FlopCounterMode counts: as much as for the convolutions of plain PyTorch."""

import subprocess
import sys

import operator_calls
import parity
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ffnet_kernels as fk

CALLS = operator_calls.calls()


def counted(function, tensors: list, wanted: slice) -> tuple[int, int]:
    """Of the forward and of the backward pass, for the gradients of some of the tensors."""
    leaves = [t.detach().clone() for t in tensors]
    for leaf in leaves[wanted]:
        leaf.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.ones_like(out))
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("wanted", [slice(None), slice(1), slice(1, 2), slice(-1, None)], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_as_many_as_plain_pytorch(call, wanted):
    if call.training and wanted != slice(None):
        pytest.skip("a training step's kernel computes all gradients of parameters, wanted or not")
    found, expected = (counted(function, call.tensors, wanted) for function in (call.ours, call.plain))
    assert found == expected


@pytest.mark.parametrize("namespace", ["ffnet_kernels", "ffnet_kernels_triton", "ffnet_kernels_cuda"])
@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_in_every_namespace(operator, namespace):
    args = operator_calls.example(operator).checked()
    counts = []
    for run in (getattr(getattr(torch.ops, namespace), operator), fk.ops.OPERATORS[operator].reference):
        with FlopCounterMode(display=False) as counter:
            run(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_counter_is_not_imported_before_it_is_wanted():
    code = """
import sys, ffnet_kernels, torch
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ffnet_kernels.depthwise_conv2d(torch.ones(1, 4, 8, 8), torch.ones(4, 1, 3, 3))
assert counter.get_total_flops() == 2 * 4 * 64 * 9
"""
    subprocess.run([sys.executable, "-c", code], check=True)
