"""Where plain PyTorch is faster than the CPU kernels: rules from tables that were measured, one per instruction set.

``python -m benchmarks crossover`` measures calls on both sides of every rule and writes ``crossovers/<isa>.json``;
nothing is measured in a user's call.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .. import native

FOLDER = Path(__file__).parent / "crossovers"
#: Whose table holds for an instruction set that has none: that of the closest code. Any other takes the default.
NEIGHBOURS = {"avx512": "avx512bf16", "baseline": "avx2"}
DEFAULT = "avx2"


class Rules(NamedTuple):
    """Calls that are left to PyTorch: those up to a number, or of certain kinds. By default none is."""

    few_channels: int = 0  # of a channels-last map, for depthwise operators
    few_pixels: int = 0  # of each of several images, for depthwise operators
    nchw_values: int = 0  # of one NCHW map, for a 1×1 convolution with nothing fused behind it
    nchw_batch_values: int = 0  # the same, of each of several maps
    few_rows: int = 0  # of a linear layer's input
    little_work: int = 0  # multiplications of a 1×1 convolution that is all there is to a program
    norm: tuple[str, ...] = ()  # of `kind_of_norm`: batch normalisations in training
    projection: tuple[str, ...] = ()  # of `kind_of_threads`: 1×1 convolutions with gradients


#: Why calls are left to PyTorch that a user can ask about, and what their number counts.
_REASONS = {
    "few_channels": ("slower on a channels-last map of up to {} channels, mostly idle lanes of a vector", " channels"),
    "few_pixels": ("slower on several images of up to {} pixels", " pixels"),
    "nchw_values": ("slower on one NCHW map of up to {} values", " values"),
    "nchw_batch_values": ("slower on several NCHW maps of up to {} values", " values"),
    "little_work": ("it is so small that PyTorch takes as long", " multiplications"),
    "norm": ("no faster", ""),
}


class Slower(NamedTuple):
    """Why a call is left to PyTorch: the rule, and the call's number or kind by which it applies. As text, it quotes
    the row of the table whose number is closest."""

    rule: str
    value: int | str

    def __str__(self) -> str:
        reason, unit = _REASONS[self.rule]
        row = min((row for row in _table["rows"] if row["rule"] == self.rule and is_left(now, row)), key=self._distance)
        where = f"{_table['isa']}, {_table['threads']} threads"
        quoted = f"{row['at']}{unit}: {row['ratio']:.2f} times PyTorch's time, {where}"
        return f"{reason.format(getattr(now, self.rule))} ({quoted})"

    def _distance(self, row: dict[str, Any]) -> float:
        if isinstance(self.value, str):
            return float(row["at"] != self.value)
        return abs(math.log(row["at"] / max(self.value, 1)))


def kind_of_norm(activation: str, is_channels_last: bool) -> str:
    kind = activation if activation in ("none", "relu") else "other"
    return f"activation {kind}, {'channels-last' if is_channels_last else 'NCHW'}"


def kind_of_threads(threads: int) -> str:
    return "one thread" if threads == 1 else "several threads"


def is_left(rules: Rules, row: dict[str, Any]) -> bool:
    """Whether the calls of a row are left to PyTorch."""
    limit = getattr(rules, row["rule"])
    return row["at"] in limit if isinstance(limit, tuple) else row["at"] <= limit


def follow(isa: str) -> None:
    """Uses the table of an instruction set, or of its neighbour."""
    names = isa, NEIGHBOURS.get(isa, DEFAULT), DEFAULT
    use(read(next(name for name in names if (FOLDER / f"{name}.json").exists())))


def use(table: dict[str, Any]) -> None:
    """Makes the rules those of a table."""
    global now, _table
    now, _table = rules_of(table), table


def rules_of(table: dict[str, Any]) -> Rules:
    rules: Any = table["rules"].items()
    known: dict[str, Any] = {name: tuple(r) if isinstance(r, list) else r for name, r in rules if name in Rules._fields}
    return Rules(**known)


@functools.cache
def read(name: str) -> dict[str, Any]:
    """A table: instruction set, threads, machine, rules, the rows that are ``against`` them, and all rows. A row has
    its rule, the number or kind ``at`` which it was measured, and the time of the kernels over PyTorch's: ``ratio``,
    the geometric mean over its ``calls``."""
    return json.loads((FOLDER / f"{name}.json").read_text())


#: The rules in use, which every call reads.
now: Rules
_table: dict[str, Any]
native.when_isa_changes.append(follow)
follow(native.isa() if native.cpu_library_error() is None else DEFAULT)
