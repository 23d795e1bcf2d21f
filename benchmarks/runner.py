"""Measures contenders side by side: one process, alternating, every output checked against float64 in the same run."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import progress
from .machine import keep_freed_memory, machine
from .peers import Contender, first_line
from .results import Measurement, Result, Row
from .work import Program, Work, build

#: Samples shorter than this would measure the clock and the call more than the work.
MIN_SAMPLE_SECONDS = 5e-3
#: Untimed running before the first sample: caches, thread pools and clocks settle.
WARM_UP_SECONDS = 5e-2
DEFAULT_SAMPLES = 15


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
class _Entry:
    contender: str
    program: Program
    repeats: int = 1
    samples: list[float] = field(default_factory=list)
    disturbed: int = 0


@dataclass(frozen=True)
class Runner:
    """Runs cases.

    Attributes:
        contenders: in the order of the tables; the first takes the place of ours.
        samples: per contender and case.
        timer: seconds; another one is for tests.
    """

    contenders: Sequence[Contender]
    samples: int = DEFAULT_SAMPLES
    timer: Callable[[], float] = time.perf_counter

    @torch.inference_mode()
    def run(self, case: Counted, work: Work) -> Outcome:
        """One case. A contender that fails is kept, with the reason."""
        keep_freed_memory()
        expected = work.expected()
        limit = work.error_limit(expected, work.plain("nchw").outputs())
        entries: list[_Entry] = []
        outputs: dict[str, Tensor] = {}
        measurements: dict[str, Measurement] = {}
        with progress.bar(len(self.contenders) + self.samples, case.name) as bar:
            for contender in self.contenders:
                bar.set_description_str(f"{case.name}: preparing {contender.name}")
                try:
                    reason = contender.unavailable()
                    if reason is None:
                        program = contender.prepare(work)
                        outputs[contender.name] = program.outputs()
                        entries.append(_Entry(contender.name, program))
                except Exception as failure:  # a peer may fail in any way; the others still count
                    reason = f"failed: {first_line(failure)}"
                measurements[contender.name] = Measurement(contender.name, reason=reason)
                bar.update()
            bar.set_description_str(f"{case.name}: measuring")
            for entry in entries:
                entry.repeats = self._calibrate(entry.program)
            with _no_garbage_collection():
                for sample in range(self.samples):
                    # Rotated, so that nobody always runs in the caches the same neighbour left.
                    for entry in _rotated(entries, sample):
                        switches = _preemptions()
                        entry.samples.append(self._time(entry.program, entry.repeats))
                        entry.disturbed += _preemptions() > switches
                    bar.update()
        for entry in entries:
            error = _largest_error(outputs[entry.contender], expected)
            measurements[entry.contender] = Measurement(
                entry.contender,
                entry.program.layout,
                entry.program.detail,
                tuple(1e3 * seconds for seconds in entry.samples),
                entry.repeats,
                entry.disturbed,
                _relative(error, expected),
                error <= limit,  # NaN compares false
            )
        return Outcome(Row(case.name, case.flops, case.bytes, tuple(measurements.values())), expected, outputs)

    def _calibrate(self, program: Program) -> int:
        """Warms up, and returns the calls a sample needs."""
        fastest, total = math.inf, 0.0
        while total < WARM_UP_SECONDS:
            seconds = max(self._time(program, 1), 1e-9)
            fastest, total = min(fastest, seconds), total + seconds
        return max(1, math.ceil(MIN_SAMPLE_SECONDS / fastest))

    def _time(self, program: Program, repeats: int) -> float:
        start = self.timer()
        for _ in range(repeats):
            program()
        return (self.timer() - start) / repeats


def run_cases(cases: Iterable, runner: Runner) -> Result:
    """All cases, or, after Ctrl-C, those that were finished."""
    cases = list(cases)
    result = Result(machine())
    try:
        with progress.bar(len(cases), "cases", leave=True) as bar:
            for case in cases:
                result.rows.append(runner.run(case, build(case)).row)
                bar.update()
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def _rotated(entries: list[_Entry], by: int) -> list[_Entry]:
    by %= max(1, len(entries))
    return entries[by:] + entries[:by]


def _preemptions() -> int:
    """How often another process took a core from one of our threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _largest_error(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return math.nan
    return (output.double() - expected).abs().max().item()


def _relative(error: float, expected: Tensor) -> float | None:
    relative = error / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
    return relative if math.isfinite(relative) else None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
