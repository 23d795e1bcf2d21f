"""Measures contenders side by side: one process, alternating, every output checked against float64 in the same run.

Ahead of each sample the runner waits until the process is quiet (`sampling`), then makes untimed calls: thread pools
and caches are those of the contender that is measured, no matter who ran before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import progress, roof_measurement, roofs
from .cases import Case, parameters
from .heap import keep_freed_memory
from .high_water import most_during
from .machine import machine
from .peers import Contender, first_line
from .programs import CpuWork, Program, Unsupported
from .results import Measurement, Result, Row
from .sampling import Disturbances, no_garbage_collection, wait_until_quiet
from .work import build

#: Samples shorter than this would measure the clock and the call more than the work.
MIN_SAMPLE_SECONDS = 5e-3
#: Untimed running before the first sample: caches, thread pools and clocks settle.
WARM_UP_SECONDS = 5e-2
#: Untimed running ahead of a sample, at least a call; none where a call is so long that it does not matter. After 10 ms
#: everybody was as fast beside the others as alone; after 2 ms ONNX Runtime and OpenVINO were not yet.
UNTIMED_SECONDS, LONG_SECONDS = 1e-2, 5e-2
DEFAULT_SAMPLES = 12
#: Rounds that are measured even where a case takes longer than it may.
LEAST_SAMPLES = 5
DEFAULT_SECONDS = 20


class Counted(Protocol):
    """What the runner needs to know of a case."""

    @property
    def name(self) -> str: ...
    @property
    def flops(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Outcome(NamedTuple):
    """A row, and the outputs it was judged by."""

    row: Row
    expected: Tensor
    outputs: dict[str, Tensor]


@dataclass
class Entry:
    """A contender that runs, and its samples so far."""

    contender: str
    program: Program
    repeats: int = 1
    untimed: int = 0
    samples: list[float] = field(default_factory=list)
    disturbed: int = 0
    page_faults: list[int] = field(default_factory=list)
    memory: int | None = None


@dataclass
class Prepared:
    """A case whose contenders are checked and warm.

    Attributes:
        results: of each contender that runs, what it is judged by.
        reasons: of each contender, why it does not run, or None.
    """

    case: Counted
    expected: list[Tensor]
    limits: list[float]
    entries: list[Entry] = field(default_factory=list)
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    reasons: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """Runs cases.

    Attributes:
        contenders: in the order of the tables; the first takes the place of ours.
        samples: per contender and case.
        seconds: after which a case ends with `LEAST_SAMPLES`, or as many as there are by then.
        timer: seconds; another one is for tests.
        sample_seconds: calls of a sample take at least as long together.
    """

    contenders: Sequence[Contender]
    samples: int = DEFAULT_SAMPLES
    seconds: float = math.inf
    timer: Callable[[], float] = time.perf_counter
    sample_seconds: float = MIN_SAMPLE_SECONDS

    def run(self, case: Counted, work: CpuWork) -> Outcome:
        """One case. A contender that fails is kept, with the reason."""
        with torch.inference_mode(work.inference):
            with progress.bar(len(self.contenders) + self.samples, case.name) as bar:
                prepared = self.prepare(case, work, bar)
                bar.set_description_str(f"{case.name}: measuring")
                self._measure(prepared, bar)
            return self.outcome(prepared)

    def prepare(self, case: Counted, work: CpuWork, bar: progress.Bar = progress.SILENT) -> Prepared:
        """Everything ahead of the first sample. The work's inference mode is the caller's to enter."""
        keep_freed_memory()
        expected = as_list(work.expected())
        eager = work.plain("nchw").results()
        limits = [work.error_limit(*pair) for pair in zip(expected, eager, strict=True)]
        del eager
        prepared = Prepared(case, expected, limits)
        for contender in self.contenders:
            bar.set_description_str(f"{case.name}: preparing {contender.name}")
            try:
                reason = contender.unavailable()
                if reason is None:
                    program = contender.prepare(work)
                    prepared.results[contender.name] = program.results()
                    memory = None if program.hoards else most_during(program)
                    prepared.entries.append(Entry(contender.name, program, memory=memory))
            except Unsupported as refusal:
                reason = str(refusal)
            except Exception as failure:  # a baseline may fail in any way; the others still count
                reason = f"failed: {first_line(failure)}"
            prepared.reasons[contender.name] = reason
            bar.update()
        for entry in list(prepared.entries):
            self._attempt(prepared, entry, self._calibrate)
        return prepared

    def outcome(self, prepared: Prepared) -> Outcome:
        """The row of what was measured."""
        measurements = {name: Measurement(name, reason=reason) for name, reason in prepared.reasons.items()}
        for entry in prepared.entries:
            error, passed = _judge(prepared.results[entry.contender], prepared.expected, prepared.limits)
            measurements[entry.contender] = Measurement(
                entry.contender,
                entry.program.layout,
                entry.program.detail,
                tuple(float(f"{1e3 * seconds:.7g}") for seconds in entry.samples),  # no clock has more digits
                entry.repeats,
                entry.disturbed,
                error,
                passed,
                page_faults=tuple(entry.page_faults),
                memory=entry.memory,
            )
        case = prepared.case
        row = Row(case.name, case.flops, case.bytes, tuple(measurements.values()), parameters(case))
        return Outcome(row, prepared.expected[0], {name: results[0] for name, results in prepared.results.items()})

    def sample(self, entry: Entry) -> None:
        """Takes one, beginning quiet and warm."""
        wait_until_quiet()
        for _ in range(entry.untimed):
            entry.program()
        before = Disturbances.now()
        entry.samples.append(self._time(entry.program, entry.repeats))
        met = Disturbances.now().since(before)
        entry.disturbed += met.preemptions > 0
        entry.page_faults.append(met.page_faults)

    def _attempt(self, prepared: Prepared, entry: Entry, what: Callable[[Entry], None]) -> None:
        """A contender that fails late is taken out, with the reason."""
        try:
            what(entry)
        except Exception as failure:
            prepared.entries.remove(entry)
            prepared.reasons[entry.contender] = f"failed: {first_line(failure)}"

    def _measure(self, prepared: Prepared, bar: progress.Bar) -> None:
        begun = self.timer()
        with no_garbage_collection():
            for number in range(self.samples):
                if number >= LEAST_SAMPLES and self.timer() - begun > self.seconds:
                    break
                # Rotated, so that nobody always runs in the caches the same neighbour left.
                for entry in _rotated(prepared.entries, number):
                    self._attempt(prepared, entry, self.sample)
                bar.update()

    def _calibrate(self, entry: Entry) -> None:
        """Warms up, and finds the calls that a sample needs."""
        wait_until_quiet()
        fastest, total = math.inf, 0.0
        while total < WARM_UP_SECONDS:
            seconds = max(self._time(entry.program, 1), 1e-9)
            fastest, total = min(fastest, seconds), total + seconds
        entry.repeats = max(1, math.ceil(self.sample_seconds / fastest))
        entry.untimed = 0 if fastest > LONG_SECONDS else math.ceil(UNTIMED_SECONDS / fastest)

    def _time(self, program: Program, repeats: int) -> float:
        start = self.timer()
        for _ in range(repeats):
            program()
        return (self.timer() - start) / repeats


def run_cases(
    cases: Iterable[Case],
    runner_of: Callable[[Any], Runner],
    passes: int = 1,
    kept: Result | None = None,
    save: Callable[[Result], object] = lambda result: None,
) -> Result:
    """All cases, each by the runner that is given for it; or, after Ctrl-C, as far as it got.

    Args:
        passes: how often all cases are gone through; their samples are put together, and minutes lie between them.
        kept: an earlier run. Its rows stay; passes of a case that they hold, with all contenders, are not run again.
        save: called with what there is after every case.
    """
    todo = [(number, case) for number in range(passes) for case in cases]
    rows = {row.case: row for row in kept.rows} if kept else {}
    result = Result(machine(), list(rows.values()))
    try:
        _raise_roofs(result, kept.machine if kept else {})
        with progress.bar(len(todo), "cases", leave=True) as bar:
            for number, case in todo:
                runner, known = runner_of(case), rows.get(case.name)
                if known and not {c.name for c in runner.contenders} <= {m.contender for m in known.measurements}:
                    known = None
                if known is None or known.passes <= number:
                    row = runner.run(case, build(case)).row
                    rows[case.name] = known.joined(row) if known else row
                    result.rows = list(rows.values())
                    save(result)
                bar.update()
        _raise_roofs(result, result.machine)
    except KeyboardInterrupt:
        result.interrupted = True
    save(result)
    return result


def _raise_roofs(result: Result, known: dict[str, Any]) -> None:
    """Measures the roofs; the higher ones count, of those and the ones that are known."""
    measured = roof_measurement.measure()
    before = roofs.Roofs.from_plain(known.get("roofs"))
    result.machine["roofs"] = (roofs.best(before, measured) if before else measured).to_plain()


def _rotated(entries: list[Entry], by: int) -> list[Entry]:
    by %= max(1, len(entries))
    return entries[by:] + entries[:by]


def as_list(results: Tensor | list[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else results


def _judge(results: Sequence[Tensor], expected: Sequence[Tensor], limits: Sequence[float]) -> tuple[float | None, bool]:
    """The largest error relative to the largest element, the worst of all results (None where one is not finite), and
    whether each is within its limit."""
    if len(results) != len(expected):
        return None, False
    errors = [_largest_error(*pair) for pair in zip(results, expected, strict=True)]
    relative = [_relative(*pair) for pair in zip(errors, expected, strict=True)]
    finite = [r for r in relative if r is not None]
    passed = all(error <= limit for error, limit in zip(errors, limits, strict=True))  # NaN compares false
    return max(finite) if len(finite) == len(relative) else None, passed


def _largest_error(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return math.nan
    return (output.double() - expected).abs().max().item()


def _relative(error: float, expected: Tensor) -> float | None:
    relative = error / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
    return relative if math.isfinite(relative) else None
