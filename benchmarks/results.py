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

from .roofs import Roofs

FORMAT_VERSION = 2  # 1 had neither parameters nor memory; it is still read


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, method="inclusive")
    return first, third


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
        page_faults: of each sample, pages that the kernel had to supply.
        memory: bytes that the first call after the check took at most, its result among them; None where unknown.
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
    page_faults: tuple[int, ...] = ()
    memory: int | None = None

    def joined(self, later: Measurement) -> Measurement:
        """With the samples of a later one of the same case behind its own; the worse error of both counts, and one
        that did not run did not."""
        if not self.samples_ms or not later.samples_ms:
            return later if self.samples_ms else self
        errors = (self.error, later.error)
        scale = self.repeats / later.repeats  # a later sample may be of more calls
        return dataclasses.replace(
            self,
            samples_ms=self.samples_ms + later.samples_ms,
            disturbed=self.disturbed + later.disturbed,
            error=None if None in errors else max(errors),  # type: ignore[type-var]
            passed=self.passed and later.passed,
            page_faults=self.page_faults + tuple(round(faults * scale) for faults in later.page_faults),
        )

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def faults_per_call(self) -> float:
        """Median over the samples."""
        return statistics.median(self.page_faults) / self.repeats if self.page_faults else 0.0

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile."""
        return quartiles(self.samples_ms)


@dataclass(frozen=True)
class Row:
    """One case with all its contenders, ours first.

    Attributes:
        parameters: "kind", and the fields of the case.
        passes: of how many its samples are, one after the other.
    """

    case: str
    flops: int
    bytes: int
    measurements: tuple[Measurement, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    passes: int = 1

    def joined(self, later: Row) -> Row:
        """With the samples of a later pass behind its own."""
        others = {m.contender: m for m in later.measurements}
        measurements = tuple(m.joined(others[m.contender]) if m.contender in others else m for m in self.measurements)
        return dataclasses.replace(self, measurements=measurements, passes=self.passes + later.passes)

    def measurement(self, contender: str) -> Measurement | None:
        """That of a contender, or None where it did not run."""
        return next((m for m in self.measurements if m.contender == contender and m.samples_ms), None)

    def ratio(self, contender: str, to: str) -> float | None:
        """Median over the rounds of one's time over another's, or None where one did not run."""
        ratios = self._ratios(contender, to)
        return statistics.median(ratios) if ratios else None

    def ratio_quartiles(self, contender: str, to: str) -> tuple[float, float] | None:
        """First and third quartile of that."""
        ratios = self._ratios(contender, to)
        return quartiles(ratios) if ratios else None

    def _ratios(self, contender: str, to: str) -> list[float]:
        """Round by round: the machine's drift is in both times of a round."""
        one, other = self.measurement(contender), self.measurement(to)
        if one is None or other is None:
            return []
        return [a / b for a, b in zip(one.samples_ms, other.samples_ms, strict=False)]

    def gflops(self, measurement: Measurement) -> float:
        return self.flops / measurement.median_ms / 1e6

    def gbytes(self, measurement: Measurement) -> float:
        """Unavoidable traffic per second, in GB/s."""
        return self.bytes / measurement.median_ms / 1e6

    def least_ms(self, roofs: Roofs) -> float | None:
        """Milliseconds that the machine takes at least; None where its roof in this dtype is unknown."""
        return roofs.least_ms(self.flops, self.bytes, self.parameters.get("dtype", ""))


@dataclass
class Result:
    """A run: the machine and the rows it finished."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As in the JSON form."""
        plain = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        for row, plain_row in zip(self.rows, plain["rows"], strict=True):
            for measurement, entry in zip(row.measurements, plain_row["measurements"], strict=True):
                if measurement.samples_ms:  # derived, for readers of the file; not read back
                    first, third = measurement.quartiles_ms
                    entry |= {"median_ms": measurement.median_ms, "q1_ms": first, "q3_ms": third}
                    entry |= {"gflops": row.gflops(measurement), "gbytes": row.gbytes(measurement)}
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_plain(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_plain(cls, plain: Any) -> Result:
        """Raises ValueError for another format."""
        found = plain.get("format") if isinstance(plain, dict) else None
        if found not in (1, FORMAT_VERSION):
            raise ValueError(f"expected benchmark results of format {FORMAT_VERSION}, got {found!r}")
        try:
            return cls(plain["machine"], [_row(row) for row in plain["rows"]], plain["interrupted"], plain["extra"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"benchmark results lack {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError for another format."""
        return cls.from_plain(json.loads(text))


def _row(plain: dict[str, Any]) -> Row:
    measurements = tuple(_measurement(m) for m in plain["measurements"])
    return Row(
        plain["case"], plain["flops"], plain["bytes"], measurements, plain.get("parameters", {}), plain.get("passes", 1)
    )


def _measurement(plain: dict[str, Any]) -> Measurement:
    names = {f.name for f in dataclasses.fields(Measurement)}
    known = {name: value for name, value in plain.items() if name in names}
    lists = {"samples_ms": tuple(plain["samples_ms"]), "page_faults": tuple(plain.get("page_faults", ()))}
    return Measurement(**{**known, **lists})


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


#: What has to agree for rows of two runs to stand in one result.
IDENTITY = ("processor", "threads", "isa", "torch", "commit", "runtimes")


def different(one: dict[str, Any], other: dict[str, Any], names: Sequence[str] = IDENTITY) -> str | None:
    """What is not the same in two machines, or None."""
    for name in names:
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)!r} and {other.get(name)!r}"
    return None


def merge(parts: Sequence[Result]) -> Result:
    """One result of several runs; a case that is in more than one is taken from the last.

    Raises:
        ValueError: for runs on different machines, versions or numbers of threads.
    """
    first = parts[0]
    for part in parts:
        if reason := different(first.machine, part.machine):
            raise ValueError(f"parts of different runs: {reason}")
    rows = {row.case: row for part in parts for row in part.rows}
    return Result(first.machine, list(rows.values()), any(part.interrupted for part in parts), first.extra)


def write_json(result: Result, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(result.to_json())


def peers_of(rows: Sequence[Row], ours: str) -> list[str]:
    """Names of the other contenders, in the order in which they appear."""
    return list(dict.fromkeys(m.contender for row in rows for m in row.measurements if m.contender != ours))


def shared_words(rows: Sequence[Row]) -> str:
    """What the names of all cases end in, whole words with the blanks before them; a name keeps its first word."""
    words = [row.case.split(" ") for row in rows]
    shared = 0
    while len(rows) > 1 and all(len(w) > shared + 1 and w[-1 - shared] == words[0][-1 - shared] for w in words):
        shared += 1
    return "".join(f" {word}" for word in words[0][len(words[0]) - shared :]) if rows else ""


def best_peer(row: Row, ours: str, against: str | None = None) -> str | None:
    """The baseline whose time over ours is least, or the one named; None where it or ours did not run."""
    names = [against] if against else peers_of([row], ours)
    ratios = {name: ratio for name in names if (ratio := row.ratio(name, ours)) is not None}
    return min(ratios, key=lambda name: ratios[name], default=None)
