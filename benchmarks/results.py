"""Results as plain data, and their JSON form."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """One contender in one case; without ``samples_ms`` it did not run, and ``reason`` says why.

    Attributes:
        contender: its name.
        layout: of the maps it reads.
        detail: what is worth knowing of how it ran, e.g. the backend.
        samples_ms: milliseconds a call, each the mean of ``repeats`` calls.
        repeats: calls of a sample.
        disturbed: samples during which another process took a core from this one.
        error: largest error against float64, relative to the largest element; None where the output is not finite.
        passed: whether the error is within the limit.
        reason: why it did not run.
    """

    contender: str
    layout: str = ""
    detail: str = ""
    samples_ms: tuple[float, ...] = ()
    repeats: int = 0
    disturbed: int = 0
    error: float | None = None
    passed: bool = False
    reason: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.samples_ms) < 2:
            return self.median_ms, self.median_ms
        first, _, third = statistics.quantiles(self.samples_ms, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Row:
    """One case with all its contenders, ours first."""

    case: str
    flops: int
    bytes: int
    measurements: tuple[Measurement, ...]

    def measurement(self, contender: str) -> Measurement | None:
        """That of a contender, or None where it did not run."""
        return next((m for m in self.measurements if m.contender == contender and m.samples_ms), None)

    def ratio(self, contender: str, to: str) -> float | None:
        """Median time of a contender over that of another, or None where one of them did not run."""
        one, other = self.measurement(contender), self.measurement(to)
        return one.median_ms / other.median_ms if one and other else None

    def gflops(self, measurement: Measurement) -> float:
        return self.flops / measurement.median_ms / 1e6

    def gbytes(self, measurement: Measurement) -> float:
        """Unavoidable traffic per second, in GB/s."""
        return self.bytes / measurement.median_ms / 1e6


@dataclass
class Result:
    """A run: the machine and the rows it finished."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        plain = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        for row, plain_row in zip(self.rows, plain["rows"], strict=True):
            for measurement, entry in zip(row.measurements, plain_row["measurements"], strict=True):
                if measurement.samples_ms:  # derived, for readers of the file; not read back
                    first, third = measurement.quartiles_ms
                    entry |= {"median_ms": measurement.median_ms, "q1_ms": first, "q3_ms": third}
                    entry |= {"gflops": row.gflops(measurement), "gbytes": row.gbytes(measurement)}
        return json.dumps(plain, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError for another format."""
        plain = json.loads(text)
        if plain.get("format") != FORMAT_VERSION:
            raise ValueError(f"expected benchmark results of format {FORMAT_VERSION}, got {plain.get('format')!r}")
        rows = [
            Row(row["case"], row["flops"], row["bytes"], tuple(_measurement(m) for m in row["measurements"]))
            for row in plain["rows"]
        ]
        return cls(plain["machine"], rows, plain["interrupted"], plain["extra"])


def _measurement(plain: dict[str, Any]) -> Measurement:
    names = {f.name for f in dataclasses.fields(Measurement)}
    known = {name: value for name, value in plain.items() if name in names}
    return Measurement(**{**known, "samples_ms": tuple(plain["samples_ms"])})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, put in its place if the block succeeds: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(result: Result, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(result.to_json())


def peers_of(rows: Sequence[Row], ours: str) -> list[str]:
    """Names of the other contenders, in the order in which they appear."""
    return list(dict.fromkeys(m.contender for row in rows for m in row.measurements if m.contender != ours))
