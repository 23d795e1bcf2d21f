"""Results as plain data with their JSON form, and the machine that they are of, with its roofs."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ffnet_kernels

from .memory import keep_freed_memory

FORMAT_VERSION = 2  # 1 had neither parameters nor memory; it is still read


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
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any] | None) -> Roofs | None:
        """Those in a result's machine; None where they were not measured."""
        if not plain:
            return None
        return cls(plain["gflops"], tuple((size, rate) for size, rate in plain["copies"]))

    def raised(self, other: Roofs) -> Roofs:
        """The higher of two of the same machine, which was disturbed while the lower was measured."""
        gflops = {dtype: max(rate, self.gflops.get(dtype, 0.0)) for dtype, rate in other.gflops.items()}
        copies = dict(self.copies)
        return Roofs(gflops, tuple((size, max(rate, copies.get(size, 0.0))) for size, rate in other.copies))


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

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Measurement:
        known = {f.name: plain[f.name] for f in dataclasses.fields(cls) if f.name in plain}
        lists = {"samples_ms": tuple(plain["samples_ms"]), "page_faults": tuple(plain.get("page_faults", ()))}
        return cls(**{**known, **lists})

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
            rows = []
            for row in plain["rows"]:
                measurements = tuple(map(Measurement.from_plain, row["measurements"]))
                counted = row["case"], row["flops"], row["bytes"]
                rows.append(Row(*counted, measurements, row.get("parameters", {}), row.get("passes", 1)))
            return cls(plain["machine"], rows, plain["interrupted"], plain["extra"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"benchmark results lack {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError for another format."""
        return cls.from_plain(json.loads(text))


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


def read(paths: Sequence[Path]) -> Result:
    """One result of several files. Raises ValueError and OSError, as `merge` and where one cannot be read."""
    return merge([Result.from_json(path.read_text()) for path in paths])


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


RUNTIMES = ("onnx", "onnxruntime", "openvino")


def machine() -> dict[str, Any]:
    """Processor, threads, instruction set, versions and commit, as plain data."""
    info = ffnet_kernels.info()
    kept = ("processor", "threads", "isa", "torch", "python", "platform", "backends", "environment")
    return {
        **{name: info[name] for name in kept},
        "ffnet_kernels": ffnet_kernels.__version__,
        "runtimes": {name: version for name in RUNTIMES if (version := _version(name))},
        "heap": {"kept": keep_freed_memory(), "tunables": os.environ.get("GLIBC_TUNABLES", "")},
        "commit": _commit() or info["build"].get("commit") or "unknown",
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same in one line."""
    return (
        f"{machine['processor']}, {machine['threads']} threads, isa {machine['isa'] or 'none (reference only)'}, "
        f"torch {machine['torch']}, Python {machine['python']}, ffnet-kernels {machine['ffnet_kernels']}, "
        f"commit {machine['commit']}"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the kernels' source tree, "+" behind it for local changes; None for an installed copy."""
    here = Path(ffnet_kernels.__file__).resolve()
    # An environment inside someone's repository is not under version control there: ask about this very file.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _git(here.parent, "rev-parse", "--short=12", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
