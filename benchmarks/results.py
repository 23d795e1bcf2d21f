"""Results as plain data and JSON, and the machine they were measured on, with its roofline."""

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

#: The contender that all others, its baselines, are compared with.
OURS = "ours"
FORMAT_VERSION = 2  # 1 had neither parameters nor memory; it is still read


@dataclass(frozen=True)
class Roofs:
    """The roofline of this machine, on as many threads as torch uses.

    Attributes:
        gflops: multiply–adds on registers, two operations each, by dtype; none if the native helper was not built.
        copies: (bytes read and written, GB/s) of a copy by torch, its call included, by size.
    """

    gflops: dict[str, float]
    copies: tuple[tuple[int, float], ...]

    def least_ms(self, flops: int, moved: int, dtype: str) -> float | None:
        """Milliseconds that so many operations and bytes take at least: the longer of both, as they may overlap. None
        where the roofline of the dtype is unknown."""
        peak = self.gflops.get(dtype)
        return None if peak is None else max(flops / peak, moved / self.copy_rate(moved)) / 1e6

    def copy_rate(self, moved: int) -> float:
        """GB/s of a copy of that size, interpolated between those that were measured."""
        sizes = [math.log(size) for size, _ in self.copies]
        rates = [rate for _, rate in self.copies]
        at = math.log(max(1, moved))
        right = bisect.bisect_left(sizes, at)
        if right in (0, len(sizes)):
            return rates[min(right, len(sizes) - 1)]
        share = (at - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return rates[right - 1] * (1 - share) + rates[right] * share

    @classmethod
    def of(cls, machine: dict[str, Any]) -> Roofs | None:
        """The roofline stored with a result's machine; None if it was not measured."""
        plain = machine.get("roofs")
        return cls(plain["gflops"], tuple((size, rate) for size, rate in plain["copies"])) if plain else None

    def raised(self, other: Roofs) -> Roofs:
        """The higher of two measurements of the same machine; the lower one was disturbed."""
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
    """One contender in one case; if ``samples_ms`` is empty it did not run, and ``reason`` says why.

    Attributes:
        contender: its name.
        layout: of the maps it reads.
        detail: how it ran, e.g. the backend.
        samples_ms: milliseconds a call, each the mean of ``repeats`` calls.
        repeats: calls in a sample.
        disturbed: samples during which another process took a core from this one.
        error: largest error against float64, relative to the largest element; None where the output is not finite.
        passed: whether the error is within the limit.
        reason: why it did not run.
        page_faults: of each sample, pages that the kernel had to supply.
        memory: peak bytes of the first call after the check, its result among them; None where unknown.
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
        known: dict[str, Any] = {f.name: plain[f.name] for f in dataclasses.fields(cls) if f.name in plain}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**{**known, **lists})

    def joined(self, later: Measurement) -> Measurement:
        """With the samples of a later measurement of the same case appended, and the worse error; if either did not
        run, that one is returned."""
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
        passes: how many its samples were taken in, one after the other.
    """

    case: str
    flops: int
    bytes: int
    measurements: tuple[Measurement, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    passes: int = 1

    def joined(self, later: Row) -> Row:
        """With the samples of a later pass appended."""
        others = {m.contender: m for m in later.measurements}
        measurements = tuple(m.joined(others[m.contender]) if m.contender in others else m for m in self.measurements)
        return dataclasses.replace(self, measurements=measurements, passes=self.passes + later.passes)

    def measurement(self, contender: str) -> Measurement | None:
        """The measurement of a contender, or None if it did not run."""
        return next((m for m in self.measurements if m.contender == contender and m.samples_ms), None)

    def ratio(self, contender: str, to: str = OURS) -> float | None:
        """Median over the rounds of one contender's time over another's, or None if either did not run."""
        ratios = self._ratios(contender, to)
        return statistics.median(ratios) if ratios else None

    def ratio_quartiles(self, contender: str, to: str = OURS) -> tuple[float, float] | None:
        """First and third quartile of that ratio."""
        ratios = self._ratios(contender, to)
        return quartiles(ratios) if ratios else None

    def _ratios(self, contender: str, to: str) -> list[float]:
        """Per round, as the machine's drift affects both times of a round."""
        one, other = self.measurement(contender), self.measurement(to)
        if one is None or other is None:
            return []
        return [a / b for a, b in zip(one.samples_ms, other.samples_ms, strict=False)]

    def best_baseline(self, only: str | None = None) -> str | None:
        """The fastest baseline, or the one named if it ran; None if there is none or ours did not run."""
        ratios = {name: ratio for name, ratio in self.ratios().items() if only in (None, name)}
        return min(ratios, key=lambda name: ratios[name], default=None)

    def ratios(self) -> dict[str, float]:
        """The time over ours of each baseline that ran."""
        return {name: ratio for name in baselines_of([self]) if (ratio := self.ratio(name)) is not None}

    def gflops(self, measurement: Measurement) -> float:
        return self.flops / measurement.median_ms / 1e6

    def gbytes(self, measurement: Measurement) -> float:
        """Unavoidable traffic per second, in GB/s."""
        return self.bytes / measurement.median_ms / 1e6

    def least_ms(self, roofs: Roofs) -> float | None:
        """The least milliseconds according to the roofline; None if that is unknown for the dtype."""
        return roofs.least_ms(self.flops, self.bytes, self.parameters.get("dtype", ""))


@dataclass
class Result:
    """A run: the machine and the rows it finished."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """The plain data that is stored as JSON."""
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
        """Raises ValueError for an unknown format."""
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
        """Raises ValueError for an unknown format."""
        return cls.from_plain(json.loads(text))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context that yields a temporary file to write, which replaces ``path`` if the block succeeds: readers never see a
    partial file."""
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


def read(paths: Sequence[Path]) -> Result:
    """Merges several files into one result; a case in more than one file is taken from the last.

    Raises:
        ValueError: for runs on different machines, versions or numbers of threads, and other formats.
        OSError: for a file that cannot be read.
    """
    parts = [Result.from_json(path.read_text()) for path in paths]
    first = parts[0]
    for part in parts:
        if reason := different(first.machine, part.machine):
            raise ValueError(f"parts of different runs: {reason}")
    rows = {row.case: row for part in parts for row in part.rows}
    return Result(first.machine, list(rows.values()), any(part.interrupted for part in parts), first.extra)


def baselines_of(rows: Sequence[Row]) -> list[str]:
    """Names of the contenders other than ours, in the order in which they appear."""
    return list(dict.fromkeys(m.contender for row in rows for m in row.measurements if m.contender != OURS))


def shared_words(rows: Sequence[Row]) -> str:
    """The words that all case names end in, with the blanks before them; the first word of a name is never included."""
    words = [row.case.split(" ") for row in rows]
    shared = 0
    while len(rows) > 1 and all(len(w) > shared + 1 and w[-1 - shared] == words[0][-1 - shared] for w in words):
        shared += 1
    return "".join(f" {word}" for word in words[0][len(words[0]) - shared :]) if rows else ""


#: Properties that must agree for rows of two runs to be merged.
IDENTITY = ("processor", "threads", "isa", "torch", "commit", "runtimes")
RUNTIMES = ("onnx", "onnxruntime", "openvino")


def different(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first property that differs between two machines, or None."""
    for name in IDENTITY:
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)!r} and {other.get(name)!r}"
    return None


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
    """The machine in one line."""
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
    try:
        # An environment inside some repository is not under its version control, so ask about this file.
        git(here.parent, "ls-files", "--error-unmatch", here.name)
        commit = git(here.parent, "rev-parse", "--short=12", "HEAD")
        return commit + "+" * bool(git(here.parent, "status", "--porcelain", "--untracked-files=no"))
    except OSError:
        return None


def git(folder: Path, *arguments: str) -> str:
    """Runs a git command in a folder and returns its output. Raises OSError if it fails or there is no git."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
