"""What the machine can do at most, measured in the run that is held against it: multiply–adds and copies."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ffnet_kernels import native

from .sampling import wait_until_quiet

TRIALS = 7  # of which the best counts: a roof is what was reached at all
MULTIPLY_SECONDS, COPY_SECONDS = 1e-2, 4e-3
#: Bytes read and written by each copy: from the first cache to well beyond the last.
COPIES = tuple(4**power for power in range(8, 15))


@dataclass(frozen=True)
class Roofs:
    """Of this machine, on as many threads as torch uses.

    Attributes:
        gflops: multiply–adds on registers, two operations each, by dtype; none where the instrument was not built.
        copies: (bytes read and written, GB/s) of torch's copy, by size.
    """

    gflops: dict[str, float]
    copies: tuple[tuple[int, float], ...]

    def least_ms(self, flops: int, moved: int, dtype: str) -> float | None:
        """Milliseconds below which nobody can do so many operations and move so many bytes: the longer of both, for
        they may overlap. None where a roof is unknown."""
        peak = self.gflops.get(dtype)
        return None if peak is None else max(flops / peak, moved / self.copy_rate(moved)) / 1e6

    def copy_rate(self, moved: int) -> float:
        """GB/s of a copy of that size, between those that were measured."""
        sizes = [math.log(size) for size, _ in self.copies]
        rates = [rate for _, rate in self.copies]
        at = math.log(max(1, moved))
        right = bisect.bisect_left(sizes, at)
        if right in (0, len(sizes)):
            return rates[min(right, len(sizes) - 1)]
        share = (at - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return rates[right - 1] * (1 - share) + rates[right] * share

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any] | None) -> Roofs | None:
        """Those in a result's machine; None where they were not measured."""
        if not plain:
            return None
        return cls(plain["gflops"], tuple((size, rate) for size, rate in plain["copies"]))


def best(one: Roofs, other: Roofs) -> Roofs:
    """The higher of two of the same machine, which was disturbed while the lower was measured."""
    gflops = {dtype: max(rate, other.gflops[dtype]) for dtype, rate in one.gflops.items()}
    copies = zip(one.copies, other.copies, strict=True)
    return Roofs(gflops, tuple((size, max(rate, rate_too)) for (size, rate), (_, rate_too) in copies))


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
