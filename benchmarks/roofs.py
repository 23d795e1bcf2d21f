"""What a machine can do at most: multiply–adds and copies. Plain data; `roof_measurement` measures it."""

from __future__ import annotations

import bisect
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Roofs:
    """Of this machine, on as many threads as torch uses.

    Attributes:
        gflops: multiply–adds on registers, two operations each, by dtype; none where the instrument was not built.
        copies: (bytes read and written, GB/s) of a copy by torch, its call included, by size.
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
    gflops = {dtype: max(rate, one.gflops.get(dtype, 0.0)) for dtype, rate in other.gflops.items()}
    copies = dict(one.copies)
    return Roofs(gflops, tuple((size, max(rate, copies.get(size, 0.0))) for size, rate in other.copies))
