"""Measures contenders side by side on the CPU: one process, alternating, every output checked against float64 in the
same run. (On a GPU contenders run one after the other: `gpu_steps`.)"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffnet_kernels import native

from .cases import Case, parameters
from .contenders import Contender, first_line
from .memory import keep_freed_memory, peak_during
from .results import Measurement, Result, Roofs, Row, machine
from .work import Program, Unsupported, Work, build

#: Samples shorter than this would measure the clock and the call more than the work.
MIN_SAMPLE_SECONDS = 5e-3
#: Untimed running before the first sample: caches, thread pools and clocks settle.
WARM_UP_SECONDS = 5e-2
#: Untimed running ahead of a sample, at least a call; none where a call is so long that it does not matter. After 10 ms
#: every contender was as fast beside the others as alone; after 2 ms ONNX Runtime and OpenVINO were not yet.
UNTIMED_SECONDS, LONG_SECONDS = 1e-2, 5e-2
DEFAULT_SAMPLES = 12
#: Rounds that are measured even if a case exceeds its time.
LEAST_SAMPLES = 5
DEFAULT_SECONDS = 20
INTERRUPTED = 130  # as shells report a process that Ctrl-C ended


class Outcome(NamedTuple):
    """A row, and the outputs that were checked."""

    row: Row
    expected: Tensor
    outputs: dict[str, Tensor]


@dataclass
class Entry:
    """A contender that runs, and its samples so far."""

    contender: str
    program: Program
    error: float | None = None
    passed: bool = False
    repeats: int = 1
    untimed: int = 0
    samples_ms: list[float] = field(default_factory=list)
    disturbed: int = 0
    page_faults: list[int] = field(default_factory=list)
    memory: int | None = None

    def measurement(self) -> Measurement:
        program = self.program
        return Measurement(
            self.contender, program.layout, program.detail, tuple(self.samples_ms), self.repeats, self.disturbed,
            self.error, self.passed, page_faults=tuple(self.page_faults), memory=self.memory,
        )  # fmt: skip


@dataclass
class Prepared:
    """A case whose contenders are checked and warm.

    Attributes:
        case: has a name, and counts its ``flops`` and ``bytes``.
        outputs: of each contender that runs, the first of its results.
        reasons: of each contender, why it does not run, or None.
    """

    case: Any
    expected: list[Tensor]
    entries: list[Entry] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str | None] = field(default_factory=dict)

    def outcome(self) -> Outcome:
        """The row of what was measured."""
        measurements = {name: Measurement(name, reason=reason) for name, reason in self.reasons.items()}
        measurements |= {entry.contender: entry.measurement() for entry in self.entries}
        case = self.case
        row = Row(case.name, case.flops, case.bytes, tuple(measurements.values()), parameters(case))
        return Outcome(row, self.expected[0], self.outputs)


@dataclass(frozen=True)
class Runner:
    """Runs cases.

    Attributes:
        contenders: in the order of the tables.
        samples: per contender and case.
        seconds: time after which a case ends, once it has `LEAST_SAMPLES`.
        sample_seconds: the least duration of a sample's calls together.
        timer: returns seconds; replaced in tests.
    """

    contenders: Sequence[Contender]
    samples: int = DEFAULT_SAMPLES
    seconds: float = math.inf
    sample_seconds: float = MIN_SAMPLE_SECONDS
    timer: Callable[[], float] = time.perf_counter

    def run(self, case: Any, work: Work) -> Outcome:
        """Runs one case. A contender that fails is recorded with the reason."""
        with measuring(work), progress(len(self.contenders) + self.samples, case.name) as bar:
            prepared = self.prepare(case, work, bar)
            bar.set_description_str(f"{case.name}: measuring")
            self._measure(prepared, bar)
            return prepared.outcome()

    def prepare(self, case: Any, work: Work, bar: Any = None) -> Prepared:
        """Does everything before the first sample; must be called within `measuring`."""
        bar = bar or _Silent()
        expected = as_list(work.expected())
        limits = [work.error_limit(*pair) for pair in zip(expected, work.plain("nchw").results(), strict=True)]
        prepared = Prepared(case, expected)
        for contender in self.contenders:
            bar.set_description_str(f"{case.name}: preparing {contender.name}")
            try:
                reason = contender.unavailable()
                if reason is None:
                    program = contender.prepare(work)
                    results = program.results()
                    entry = Entry(contender.name, program, *_judge(results, expected, limits))
                    prepared.outputs[contender.name] = results[0]
                    entry.memory = None if program.hoards else peak_during(program)
                    prepared.entries.append(entry)
            except Unsupported as refusal:
                reason = str(refusal)
            except Exception as failure:  # a baseline may fail in any way, without affecting the others
                reason = _why(failure)
            prepared.reasons[contender.name] = reason
            bar.update()
        for entry in list(prepared.entries):
            self._attempt(prepared, entry, self._warm_up)
        return prepared

    def sample(self, entry: Entry) -> None:
        """Takes one sample, within `measuring`: in a quiet process and after untimed calls, so that thread pools and
        caches are those of the contender measured, whichever ran before."""
        wait_until_quiet()
        for _ in range(entry.untimed):
            entry.program()
        before = Disturbances.now()
        milliseconds = 1e3 * self._time(entry.program, entry.repeats)
        after = Disturbances.now()
        entry.samples_ms.append(float(f"{milliseconds:.7g}"))  # no clock has more digits
        entry.disturbed += after.preemptions > before.preemptions
        entry.page_faults.append(after.page_faults - before.page_faults)

    def _warm_up(self, entry: Entry) -> None:
        """Once all are prepared: determines how many calls make a sample."""
        wait_until_quiet()
        fastest, total = math.inf, 0.0
        while total < WARM_UP_SECONDS:
            seconds = max(self._time(entry.program, 1), 1e-9)
            fastest, total = min(fastest, seconds), total + seconds
        entry.repeats = max(1, math.ceil(self.sample_seconds / fastest))
        entry.untimed = 0 if fastest > LONG_SECONDS else math.ceil(UNTIMED_SECONDS / fastest)

    def _time(self, call: Callable[[], Any], repeats: int) -> float:
        start = self.timer()
        for _ in range(repeats):
            call()
        return (self.timer() - start) / repeats

    def _attempt(self, prepared: Prepared, entry: Entry, what: Callable[[Entry], None]) -> None:
        """Takes out a contender that fails late, with the reason."""
        try:
            what(entry)
        except Exception as failure:
            prepared.entries.remove(entry)
            prepared.reasons[entry.contender] = _why(failure)

    def _measure(self, prepared: Prepared, bar: Any) -> None:
        begun = self.timer()
        with no_garbage_collection():
            for number in range(self.samples):
                if number >= LEAST_SAMPLES and self.timer() - begun > self.seconds:
                    break
                for entry in rotated(prepared.entries, number):
                    self._attempt(prepared, entry, self.sample)
                bar.update()


def measuring(work: Work) -> contextlib.AbstractContextManager[Any]:
    """Context in which everything of a work runs."""
    keep_freed_memory()
    return torch.inference_mode(work.inference)


def _why(failure: Exception) -> str:
    return f"failed: {first_line(failure)}"


def rotated(entries: Sequence[Any], number: int) -> list[Any]:
    """The order of a round, which starts with the next entry each time, so that no contender always runs after the same
    one, with its caches."""
    first = number % max(1, len(entries))
    return [*entries[first:], *entries[:first]]


def run_cases(
    cases: Iterable[Case],
    runner_of: Callable[[Any], Runner],
    passes: int = 1,
    kept: Result | None = None,
    save: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Runs all cases, each with the runner that is given for it; after Ctrl-C, returns what there is.

    Args:
        passes: how often all cases are run, minutes apart; samples of a case are put together.
        kept: an earlier run, whose rows are kept; passes that these contain, with all contenders, are not run again.
        save: called with the result so far after every case.
    """
    todo = [(number, case) for number in range(passes) for case in cases]
    rows = {row.case: row for row in kept.rows} if kept else {}
    result = Result(machine(), list(rows.values()))
    try:
        _raise_roofs(result, kept.machine if kept else {})
        with progress(len(todo), "cases", leave=True) as bar:
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


def as_list(results: Tensor | list[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else results


def _judge(results: Sequence[Tensor], expected: Sequence[Tensor], limits: Sequence[float]) -> tuple[float | None, bool]:
    """The largest error relative to the largest element, over all results (None if one is not finite), and whether each
    is within its limit."""
    if len(results) != len(expected):
        return None, False
    errors = [largest_error(*pair) for pair in zip(results, expected, strict=True)]
    scales = [max(_largest(one), torch.finfo(torch.float64).tiny) for one in expected]
    relative = [error / scale for error, scale in zip(errors, scales, strict=True)]
    passed = all(error <= limit for error, limit in zip(errors, limits, strict=True))  # NaN compares false
    return max(relative) if all(map(math.isfinite, relative)) else None, passed


def largest_error(output: Tensor, expected: Tensor) -> float:
    return _largest(output.double() - expected) if output.shape == expected.shape else math.nan


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


# Samples are taken fairly: each begins in a quiet process, and disturbances are counted.

#: Time between looks at the threads, of which two in a row must find them asleep.
LOOK_SECONDS = 1e-3
LONGEST_WAIT = 0.25
#: Waiting time if threads cannot be inspected: ONNX Runtime's were seen to spin for 35 ms.
BLIND_WAIT = 0.06


class Disturbances(NamedTuple):
    """Counts since the process started, over all its threads."""

    preemptions: int  # another process took a core from one of our threads, or one yielded, as OpenVINO's do in waiting
    page_faults: int  # pages that the kernel had to supply, such as for an output whose memory was returned

    @classmethod
    def now(cls) -> Disturbances:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_nivcsw, usage.ru_minflt)


def wait_until_quiet() -> bool:
    """Sleeps until no other thread of this process runs, and says whether that was reached.

    The threads of ONNX Runtime, OpenVINO and OpenMP spin for a while after each call, waiting for the next. With as
    many threads as cores they would take cores from the next contender, and slow it down several times.
    """
    end, quiet_looks = time.perf_counter() + LONGEST_WAIT, 0
    while time.perf_counter() < end:
        running = _other_threads_running()
        if running is None:
            time.sleep(BLIND_WAIT)
            return True
        quiet_looks = 0 if running else quiet_looks + 1
        if quiet_looks == 2:
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _other_threads_running() -> bool | None:
    """Judged by their states, as CPU time advances only in clock ticks. None if the system does not list threads."""
    own = str(threading.get_native_id())
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return None
    for thread in threads:
        with contextlib.suppress(OSError):  # the thread has ended
            text = Path(f"/proc/self/task/{thread}/stat").read_text()
            if thread != own and text.rpartition(")")[2].split()[0] == "R":
                return True
    return False


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# The roofline of this machine, measured in the run that is compared with it.

TRIALS = 7  # of which the best counts: a roof is the most that was ever reached
MULTIPLY_SECONDS, COPY_SECONDS = 1e-2, 4e-3
#: Bytes read and written by each copy: from the first cache to well beyond the last.
COPIES = tuple(4**power for power in range(8, 15))


def _raise_roofs(result: Result, known: dict[str, Any]) -> None:
    """Measures the roofline; of several measurements the highest counts, as the others were disturbed."""
    measured, before = measure_roofs(), Roofs.of(known)
    result.machine["roofs"] = asdict(before.raised(measured) if before else measured)


def measure_roofs() -> Roofs:
    """Measures the roofline on torch's number of threads; takes about two seconds."""
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
    """The highest rate of what ``run(rounds)`` returns as done, with rounds chosen to take about so many seconds."""

    def timed(rounds: int) -> tuple[int, float]:
        begun = time.perf_counter()
        return run(rounds), time.perf_counter() - begun

    rounds, best = 1, 0.0
    while min(timed(rounds)[1] for _ in range(3)) <= seconds / 2:  # another process may have had the core for one
        rounds *= 2
    for _ in range(TRIALS):
        wait_until_quiet()
        run(max(1, rounds // 4))
        done, spent = timed(rounds)
        best = max(best, done / spent)
    return best


class _Silent:
    """A bar that shows nothing."""

    def update(self, steps: int = 1) -> None:
        pass

    def set_description_str(self, text: str) -> None:
        pass


def progress(total: int, text: str, *, leave: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A context manager that yields a bar of ``total`` steps on stderr: tqdm's if installed and on a terminal,
    otherwise one that shows nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(_Silent())
    return tqdm(total=total, desc=text, leave=leave, disable=None)
