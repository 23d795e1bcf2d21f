"""Measures the roofs of this machine, in the run that is held against them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ffnet_kernels import native

from .roofs import Roofs
from .sampling import wait_until_quiet

TRIALS = 7  # of which the best counts: a roof is what was reached at all
MULTIPLY_SECONDS, COPY_SECONDS = 1e-2, 4e-3
#: Bytes read and written by each copy: from the first cache to well beyond the last.
COPIES = tuple(4**power for power in range(8, 15))


def measure() -> Roofs:
    """In about two seconds, on torch's number of threads."""
    return Roofs(_multiply_adds(), tuple((size, _copy(size)) for size in COPIES))


def _multiply_adds() -> dict[str, float]:
    helper = None if native.cpu_library_error() else native.helper()
    if helper is None:
        return {}
    threads = torch.get_num_threads()
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for dtype in ("float32", "bfloat16"):

            def run(rounds: int, dtype: str = dtype) -> int:
                return sum(pool.map(lambda _: helper.multiply_adds(dtype, rounds), range(threads)))

            found[dtype] = 2 * _best_rate(run, MULTIPLY_SECONDS) / 1e9
    return found


def _copy(size: int) -> float:
    source = torch.zeros(size // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def run(rounds: int) -> int:
        for _ in range(rounds):
            target.copy_(source)
        return rounds * size

    return _best_rate(run, COPY_SECONDS) / 1e9


def _best_rate(run: Callable[[int], int], seconds: float) -> float:
    """The most per second of what ``run(rounds)`` says it did, in rounds that take about so long."""
    rounds, spent = 1, 0.0
    while True:
        begun = time.perf_counter()
        run(rounds)
        spent = time.perf_counter() - begun
        if spent > seconds / 2:
            break
        rounds *= 2
    best = 0.0
    for _ in range(TRIALS):
        wait_until_quiet()
        run(max(1, rounds // 4))
        begun = time.perf_counter()
        done = run(rounds)
        best = max(best, done / (time.perf_counter() - begun))
    return best
