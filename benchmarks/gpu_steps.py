"""What there is to do on a GPU, step by step; the plan, and what runs it, is in `gpu`.

A step returns its row as plain data. It runs in a process that may be ended at any time, so nothing but rows is kept.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import importlib.util
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

import ffnet_kernels
from ffnet_kernels.backends import choice, cuda
from ffnet_kernels.backends.triton import configs, tune
from ffnet_kernels.selftest import cases as selftest_cases
from ffnet_kernels.selftest import error_limit, incoming_gradient, moved, poisoned_memory

from .cases import ModelCase, OperatorCase, TrainingCase
from .contenders import (
    BACKENDS,
    COMPILED,
    COPY,
    Contender,
    Copy,
    TorchCompile,
    on_gpu,
)
from .results import Measurement, machine
from .runner import as_list, largest_error
from .work import SEED, ModelWork, OperatorWork, Program, TrainingWork, build, differentiated, is_filter, mapped

BATCH, LARGE_BATCH, CHECKED_IMAGES = 128, 512, 8
ADD = "add"
NARROW = (torch.bfloat16, torch.float16)

#: Bytes that launches in turn read and write together: several times any L2 cache.
ROTATED, MOST_SETS = 256 << 20, 12
LEAST_LAUNCHES, SAMPLES, MODEL_SAMPLES, MODEL_CALLS = 10, 20, 5, 4
SPIN = 200_000  # clocks for which the GPU waits, while the host puts a graph into its queue


class Step(NamedTuple):
    """A row: its name, seconds after which it is ended, what returns it, and a program that watches its process."""

    name: str
    seconds: float
    run: Callable[[Bench], dict[str, Any]]
    under: tuple[str, ...] = ()


class GraphClock:
    """Milliseconds of a launch on a GPU: of a graph of launches, whose buffers rotate, less those of an empty graph."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.mode():
            empty = self._captured(())
            self.empty_ms = statistics.median(self._replayed(empty) for _ in range(SAMPLES))

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """In which everything is made that is going to be captured: backward passes run on their forward's stream."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def __call__(self, programs: Sequence[Callable[[], Any]], samples: int = SAMPLES) -> tuple[list[float], str]:
        """Samples, and what is worth knowing of how they were taken."""
        for program in (*programs, *programs):
            program()
        self._stream.synchronize()
        launches = len(programs) * math.ceil(LEAST_LAUNCHES / len(programs))
        if len(programs) == 1:
            clock = tune.ColdClock(self._device)
            return [clock(programs[0]) for _ in range(samples)], "cold caches, one launch a sample"
        try:
            graph = self._captured(list(itertools.islice(itertools.cycle(programs), launches)))
        except Exception as failure:  # such as one that synchronises
            tune.check_alive(self._device)
            clock = tune.ColdClock(self._device)
            reason = f"without a CUDA graph: {tune.describe(failure)[:200]}"
            return [clock(program) for program in itertools.islice(itertools.cycle(programs), samples)], reason
        found = [(self._replayed(graph) - self.empty_ms) / launches for _ in range(samples + 2)]
        return found[2:], f"{launches} launches a graph, {len(programs)} sets of buffers"

    def _captured(self, calls: Iterable[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(), torch.cuda.graph(graph, stream=self._stream):
            warnings.simplefilter("ignore")  # an empty one is wanted once
            # Results live on while others are made, or all would lie in one buffer that never leaves the cache.
            held = collections.deque((call() for call in calls), maxlen=MOST_SETS)
            del held
        graph.replay()
        return graph

    def _replayed(self, graph: torch.cuda.CUDAGraph) -> float:
        torch.cuda._sleep(SPIN)
        self._start.record(self._stream)
        graph.replay()
        self._end.record(self._stream)
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def calls(self, call: Callable[[], Any], number: int, samples: int, graph: bool = False) -> list[float]:
        """Of calls one after the other, gaps between their kernels included; or of graphs of one each."""
        run: Callable[[], Any] = call
        for _ in range(2):
            call()
        if graph:
            run = self._captured([call]).replay
        found = []
        for _ in range(samples):
            self._start.record(self._stream)
            for _ in range(number):
                run()
            self._end.record(self._stream)
            self._end.synchronize()
            found.append(self._start.elapsed_time(self._end) / number)
        return found


class HostClock:
    """The same in the place of a GPU's, for rehearsals."""

    empty_ms = 0.0
    mode = contextlib.nullcontext

    def __call__(self, programs: Sequence[Callable[[], Any]], samples: int = SAMPLES) -> tuple[list[float], str]:
        return self.calls(programs[0], 1, min(2, samples)), "on the processor"

    def calls(self, call: Callable[[], Any], number: int, samples: int, graph: bool = False) -> list[float]:
        found = []
        for _ in range(min(2, samples)):
            begun = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - begun))
        return found


@dataclass
class Bench:
    """Where steps run, and what they share as long as their process lives.

    Attributes:
        small: in a rehearsal: maps of few channels and images, without a GPU.
    """

    device: torch.device
    small: bool = False
    _kept: dict[Any, Any] = field(default_factory=dict)

    @functools.cached_property
    def clock(self) -> Any:
        return GraphClock(self.device) if self.device.type == "cuda" else HostClock()

    def perform(self, step: Step) -> dict[str, Any]:
        """The step's row; one that says what went wrong. ``lost``: nothing runs in this process any more."""
        try:
            again = torch._functorch.config.patch(donated_buffer=False)  # backward passes run more than once
            with torch.no_grad(), again, self.clock.mode():
                row = step.run(self)
            tune.check_alive(self.device)
        except tune.DeviceLostError as error:
            return {"passed": False, "error": tune.describe(error), "lost": True}
        except Exception as error:  # whatever went wrong is the result
            row = {"passed": False, "error": tune.describe(error)}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several steps need: made once. Another kind (the key's first word) takes the place of what is kept."""
        if any(other[0] != key[0] for other in self._kept):
            self._kept.clear()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def works(self, case: OperatorCase) -> list[OperatorWork]:
        """The case on as many sets of maps as it takes to leave the cache; the first is the same in every step."""
        return operator_works(case, self.device, min(MOST_SETS, max(2, math.ceil(ROTATED / case.bytes))))


def operator_works(case: OperatorCase, device: torch.device, sets: int) -> list[OperatorWork]:
    """Maps are drawn on the device: the processor would take longer for them than for all that is done with them."""
    plain, dtype = build(replace(case, batch=1, dtype="float32", layout="nchw")), getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(SEED)

    def on_device(value: Tensor) -> Tensor:
        if value.dim() != 4 or is_filter(value):
            return value.to(device, dtype)
        return torch.randn(case.shape, generator=generator, device=device).to(dtype)

    found = []
    for _ in range(sets):
        arguments, incoming = mapped(on_device, plain.arguments), mapped(on_device, plain.incoming)
        found.append(replace(plain, arguments=arguments, incoming=incoming, layout=case.layout))
    return found


# What is right.


def check(backend: str, operator: str, args: tuple) -> dict[str, Any]:
    """A backend's kernels against float64: the output and the gradients of all tensors.

    Args:
        args: as in the operator's schema, on the device where it is to run.

    Returns:
        ``passed``, and for each result its largest absolute error and the limit of that.
    """
    spec = ffnet_kernels.ops.OPERATORS[operator]
    tensors = [name for name, value in zip(spec.names, args, strict=True) if isinstance(value, Tensor)]

    def results(function: Callable[..., Tensor], args: tuple) -> dict[str, Tensor]:
        output, backward = differentiated(function, args, grad)
        return {"output": output.detach(), **dict(zip(tensors, backward(), strict=True))}

    with torch.no_grad():
        grad = incoming_gradient(spec.reference(*args))
    expected, eager = results(spec.reference, mapped(Tensor.double, args)), results(spec.reference, args)
    with poisoned_memory():
        got = results(functools.partial(spec.on, backend), args)
    errors = {name: largest_error(got.pop(name), result) for name, result in expected.items()}
    limits = {name: error_limit(result, eager[name]) for name, result in expected.items()}
    finite = {name: [n if math.isfinite(n) else None for n in (errors[name], limits[name])] for name in errors}
    return {"passed": all(error <= limits[name] for name, error in errors.items()), "errors": finite}  # NaN: false


def unless_missing(backend: str, run: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    reason = choice.why_unavailable(backend)
    return {"passed": True, "skipped": reason} if reason else run(bench)


@functools.cache
def selftest_work(backend: str) -> dict[str, tuple[str, tuple]]:
    """The cases of ``ffnet_kernels.selftest`` in all dtypes; on Triton, whose every kernel has to be compiled, those of
    7×7 filters in bfloat16 only."""
    found = {}
    for case in selftest_cases():
        if backend == "triton" and " k=7 " not in case.name:
            continue
        dtypes = (*NARROW, torch.float32) if backend == "cuda" else NARROW[:1]
        for dtype, layout in itertools.product(dtypes, case.layouts):
            name = f"{case.name} {str(dtype).removeprefix('torch.')} {layout}"
            found[name] = case.operator, moved(case.laid_out(layout), dtype=dtype)
    return found


def selftest(backend: str, operator: str, dtype: str, bench: Bench) -> dict[str, Any]:
    """All its cases of an operator and dtype, awkward ones; the row has those that failed."""
    names = [name for name, (of, _) in selftest_work(backend).items() if of == operator and f" {dtype} " in name]
    rows = {}
    for name in names[: 1 if bench.small else None]:
        rows[name] = check(backend, operator, moved(selftest_work(backend)[name][1], device=bench.device))
    wrong = {name: row["errors"] for name, row in rows.items() if not row["passed"]}
    row = {"passed": not wrong, "checked": len(rows)}
    return {**row, "error": f"{len(wrong)} of {len(rows)} are wrong: {wrong}"} if wrong else row


def parity(backend: str, case: OperatorCase, bench: Bench) -> dict[str, Any]:
    """At a shape of a network."""
    (work,) = operator_works(case, bench.device, 1)
    return check(backend, case.operator, work.checked(case.layout))


def on_cpu_reference(backend: str, case: OperatorCase, bench: Bench) -> dict[str, Any]:
    """All gradients once, for a sanitizer, which slows kernels down up to 100 times: all else is the processor's."""
    (work,) = operator_works(case, torch.device("cpu"), 1)
    assert work.incoming is not None
    spec, args = ffnet_kernels.ops.OPERATORS[case.operator], work.checked(case.layout)
    reference, back = differentiated(spec.reference, mapped(Tensor.double, args), work.incoming.double())
    eager, eager_back = differentiated(spec.reference, args, work.incoming)
    placed = moved(args, device=bench.device)
    output, backward = differentiated(functools.partial(spec.on, backend), placed, work.incoming.to(bench.device))
    expected, plain = [reference.detach(), *back()], [eager.detach(), *eager_back()]
    got = [one.cpu() for one in (output.detach(), *backward())]
    errors = [largest_error(one, exact) for one, exact in zip(got, expected, strict=True)]
    limits = [error_limit(exact, one) for exact, one in zip(expected, plain, strict=True)]
    return {"passed": all(error <= limit for error, limit in zip(errors, limits, strict=True)), "checked": len(errors)}


# How fast it is.


@dataclass(frozen=True)
class Add(Contender):
    """As many bytes through ``torch.add(q, r, out=)``: the floor of what reads two maps and writes one."""

    name: str = ADD
    bytes: int = 0
    device: torch.device | str = "cpu"

    def prepare(self, work: Any) -> Program:
        q, r, out = (torch.randn(self.bytes // 6, device=self.device).to(torch.bfloat16) for _ in range(3))
        return Program(functools.partial(torch.add, out=out), [(q, r)], "")


FLOORS: dict[str, Any] = {COPY: Copy, ADD: Add}


def operator_name(case: OperatorCase) -> str:
    """Without a layout: contenders have their own."""
    return f"{replace(case, direction='forward').name.removesuffix(f' {case.layout}')} {case.direction}"


def _row(case: Any, name: str, measurement: Measurement) -> dict[str, Any]:
    """``passed``: whether its numbers are right, where it is ours; baselines may be wrong."""
    plain = {key: value for key, value in asdict(measurement).items() if value not in ((), None)}
    row = {"case": name, "flops": case.flops, "bytes": case.bytes, "measurement": plain}
    return {"passed": measurement.passed, **row, **({} if measurement.passed else {"error": "its numbers are wrong"})}


def time_operator(case: OperatorCase, contender: str, bench: Bench) -> dict[str, Any]:
    """One contender of a case, judged and timed."""
    works = bench.works(case)
    if contender in FLOORS:
        programs = [FLOORS[contender](bytes=case.bytes, device=bench.device).prepare(work) for work in works]
        samples, detail = bench.clock(programs)
        return _row(case, operator_name(case), _measured(contender, programs[0], samples, detail, 0.0, True))
    if contender.split()[0] in BACKENDS and (reason := choice.why_unavailable(contender.split()[0])):
        return {"passed": True, "skipped": reason}
    found = next((one for one in on_gpu(works[0], bench.device) if one.name == contender), None)
    if found is None:
        return {"passed": True, "skipped": f"{contender} does not take part: PyTorch takes it already, or cannot"}
    if reason := found.unavailable():
        return {"passed": True, "skipped": reason}
    expected, limits = bench.keep((case.direction, replace(case, layout="nchw")), lambda: _expected(works[0]))
    # A compiler forgets what it compiled for one set when it meets the next.
    programs = [found.prepare(work) for work in (works[:1] if contender == COMPILED else works)]
    results = programs[0].results()
    errors = [largest_error(result, one) for result, one in zip(results, expected, strict=True)]
    passed = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    relative = max(error / max(one.abs().max().item(), 1e-300) for error, one in zip(errors, expected, strict=True))
    del results
    samples, detail = bench.clock(programs)
    return _row(case, operator_name(case), _measured(contender, programs[0], samples, detail, relative, passed))


def _expected(work: Any) -> tuple[list[Tensor], list[float]]:
    """Results, kept in float32, and the largest errors of others."""
    exact, eager = as_list(work.expected()), work.plain("nchw").results()
    limits = [work.error_limit(one, plain) for one, plain in zip(exact, eager, strict=True)]
    return [one.float() for one in exact], limits


def _measured(
    name: str, program: Program, samples: Sequence[float], detail: str, error: float, passed: bool
) -> Measurement:
    text = "; ".join(filter(None, (program.detail, detail)))
    finite = error if math.isfinite(error) else None
    return Measurement(name, program.layout, text, tuple(round(ms, 6) for ms in samples), 1, 0, finite, passed)


def model_case(small: bool, batch: int = BATCH) -> ModelCase:
    return ModelCase("ffnet_1", 2, 64, "bfloat16") if small else ModelCase("ffnet_2", batch, dtype="bfloat16")


def time_model(contender: str, bench: Bench, batch: int = BATCH) -> dict[str, Any]:
    """Inference: ``contender`` is "ours" or "eager", a layout, and "graph" or "profile" where it is one.

    Judged by its first images, and timed with the gaps between its kernels.
    """
    case = model_case(bench.small, batch)
    who, layout, *how = contender.split()
    work, expected, limit = bench.keep(("model", case), functools.partial(_model_work, case, bench.device))
    layout = layout.replace("-", "_")
    program = work.fused(layout) if who == "ours" else work.plain(layout)
    output = program()[:CHECKED_IMAGES].float()
    error = largest_error(output, expected)
    if how == ["profile"]:
        return {"passed": error <= limit, "kernels": profiled(program, bench.device)}
    samples = bench.clock.calls(program, MODEL_CALLS if batch > 1 else 20, MODEL_SAMPLES, graph=how == ["graph"])
    relative = error / expected.abs().max().item()
    return _row(case, f"{case.name} inference", _measured(contender, program, samples, "", relative, error <= limit))


def _model_work(case: ModelCase, device: torch.device) -> tuple[ModelWork, Tensor, float]:
    built = build(case)
    work = replace(built, model=built.model.to(device), batches=[batch.to(device) for batch in built.batches])
    few = replace(work, batches=[work.batches[0][:CHECKED_IMAGES]])
    exact = few.expected()
    return work, exact.float(), few.error_limit(exact, few.plain("nchw").outputs())


def profiled(call: Callable[[], Any], device: torch.device, most: int = 25) -> list[list[Any]]:
    """The kernels of a call that take longest together: [name, calls, microseconds]."""
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    call()
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        tune.check_alive(device)
    time_of = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [[e.key[:120], e.count, round(getattr(e, time_of), 1)] for e in profile.key_averages()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def time_training(contender: str, bench: Bench) -> dict[str, Any]:
    """A training step without the optimizer: ``contender`` as of `time_model`."""
    case = (
        TrainingCase("ffnet_1", 2, 64, autocast=True) if bench.small else TrainingCase("ffnet_2", BATCH, autocast=True)
    )
    who, layout, *how = contender.split()
    work, expected, limit = bench.keep(("training", case), functools.partial(_training_work, case, bench.device))
    layout = layout.replace("-", "_")
    program = work.fused(layout) if who == "ours" else work.plain(layout)
    error = largest_error(program.results()[0].float(), expected)
    if how == ["profile"]:
        return {"passed": error <= limit, "kernels": profiled(program, bench.device)}
    samples = bench.clock.calls(program, 2, MODEL_SAMPLES)
    relative = error / expected.abs().max().item()
    return _row(case, case.name, _measured(contender, program, samples, "", relative, error <= limit))


def _training_work(case: TrainingCase, device: torch.device) -> tuple[TrainingWork, Tensor, float]:
    built = build(case)
    work = replace(built, model=built.model.to(device), batch=built.batch.to(device), gradients=False)
    (exact,) = work.expected()
    return work, exact.float(), work.error_limit(exact, work.plain("nchw").results()[0])


def compiled_model(bench: Bench) -> dict[str, Any]:
    """torch.compile of the model, channels-last, with CUDA graphs but without tuning, for which there is no time."""
    case = model_case(bench.small)
    work, expected, limit = bench.keep(("model", case), functools.partial(_model_work, case, bench.device))
    options = {"triton.cudagraphs": True} if bench.device.type == "cuda" else {}
    peer = TorchCompile(COMPILED, arguments={"options": options}, device=bench.device.type)
    program = peer.prepare(work)
    error = largest_error(program()[:CHECKED_IMAGES].float(), expected)
    samples = bench.clock.calls(program, MODEL_CALLS, MODEL_SAMPLES)
    relative = error / expected.abs().max().item()
    return _row(case, f"{case.name} inference", _measured(COMPILED, program, samples, "", relative, error <= limit))


# What the GPU is.


def library(bench: Bench) -> dict[str, Any]:
    """Whether the CUDA library runs on this GPU, and what everything is."""
    index = bench.device.index or 0
    reason = choice.why_unavailable("cuda") or cuda._device_error(index)
    versions = tune.versions() if importlib.util.find_spec("triton") else {"torch": torch.__version__}
    gpu, name = {}, "rehearsal"
    if bench.device.type == "cuda":
        (major, minor), name = torch.cuda.get_device_capability(bench.device), configs.device_name(bench.device)
        gpu = {"architecture": f"{major}{minor}", "L2": torch.cuda.get_device_properties(bench.device).L2_cache_size}
    found = {"device": tune.device_line(bench.device), "name": name, **machine(), **versions}
    return {"passed": reason is None, "machine": found, **gpu, **({"error": reason} if reason else {})}


def bandwidth(megabytes: int, bench: Bench) -> dict[str, Any]:
    """Bytes read and written a second, by a copy and by an addition."""
    size = megabytes << (10 if bench.small else 20)
    rates = {}
    for name, floor in FLOORS.items():
        programs = [floor(bytes=size, device=bench.device).prepare(None) for _ in range(2)]
        rates[name] = round(size / statistics.median(bench.clock(programs)[0]) / 1e6, 1)
    return {"passed": True, "GB/s": rates, "empty graph, ms": bench.clock.empty_ms}


def products(bench: Bench) -> dict[str, Any]:
    """Rate of torch's matrix product on random numbers, in bfloat16."""
    n = 64 if bench.small else 8192
    a, b = (torch.randn(n, n, device=bench.device).to(torch.bfloat16) for _ in range(2))
    ms = statistics.median(bench.clock([lambda: a @ b])[0])
    return {"passed": True, "TFLOP/s": float(f"{2 * n**3 / ms / 1e9:.4g}")}


def launched(case: OperatorCase, bench: Bench) -> dict[str, Any]:
    """A few launches for a profiler."""
    (work,) = operator_works(case, bench.device, 1)
    found = next(one for one in on_gpu(work, bench.device) if one.name == "cuda nchw")
    program = found.prepare(work)
    for _ in range(4):
        program()
    return {"passed": True}
