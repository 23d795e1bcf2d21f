"""The quick suite under pytest-benchmark: ``pytest benchmarks/bench_operators.py --benchmark-only``.

Correctness is asserted, speed never.
"""

from __future__ import annotations

import pytest
import torch

from .cases import suite
from .contenders import CONTENDERS, DEFAULT_CONTENDERS
from .work import build


@pytest.mark.parametrize("contender", [CONTENDERS[name] for name in DEFAULT_CONTENDERS], ids=lambda c: c.name)
@pytest.mark.parametrize("case", suite("ops", quick=True), ids=lambda case: case.name)
def test_operator(benchmark, case, contender):
    if reason := contender.unavailable():
        pytest.skip(f"{contender.name}: {reason}")
    benchmark.group = case.name
    with torch.inference_mode():
        work = build(case)
        expected = work.expected()
        limit = work.error_limit(expected, work.plain("nchw").outputs())
        output = benchmark(contender.prepare(work))
        assert (output.double() - expected).abs().max().item() <= limit
