"""``python -m benchmarks gpu`` (``make gpu``): everything there is to do on a GPU, in parts that can be resumed.

The most valuable part comes first. ``build`` compiles the CUDA library, ``selftest-*`` check a backend's kernels on
small awkward shapes, ``parity-*`` at FFNet's own; ``headline`` times the operators that matter most beside baselines,
``bench`` the others; ``sanitize`` runs NVIDIA's sanitizer, ``tune`` measures Triton's tiles. Each part keeps a file
with a row a step; what is there for the same sources and GPU is not done again. All goes into one file of results.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

import ffnet_kernels
from ffnet_kernels import native
from ffnet_kernels.backends import choice
from ffnet_kernels.backends.triton import configs, tune
from ffnet_kernels.selftest import cases as selftest_cases
from ffnet_kernels.selftest import error_limit, incoming_gradient, moved, poisoned_memory

from .cases import DIRECTIONS, LAYOUTS, OPERATORS, ModelCase, OperatorCase, TrainingCase
from .contenders import is_ours, on_gpu
from .report import error_text, gpu_summary, gpu_table
from .results import Result, Row, machine, replacing, write_json
from .runner import INTERRUPTED, Entry, Runner, largest_error
from .work import OperatorWork, Work, build, differentiated, mapped

ROOT = Path(__file__).resolve().parents[1]
BENCH_BATCH = 128
HEADLINE_STAGES, HEADLINE_OPERATORS = tune.STAGES[:2], ("ffnified_attention", "depthwise_conv2d")
NARROW = (torch.bfloat16, torch.float16)
MODEL = ModelCase("ffnet_2", BENCH_BATCH, dtype="bfloat16")
TRAINING = TrainingCase("ffnet_2", BENCH_BATCH, autocast=True)
WARM_UP = 3

#: Steps whose kernels are compiled together, on all processors: one by one in their first calls it would take long.
CHUNK = 64


class Step(NamedTuple):
    """A row of a part: its name, what returns it (None where it was cut short and has to be done again), and jobs for
    the compiler, of the kernels that it is going to launch."""

    name: str
    run: Callable[[], dict[str, Any] | None]
    jobs: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True)
class Session:
    """Where and until when (``time.monotonic()``) the steps run."""

    device: torch.device
    deadline: float
    compiler: tune.Compiler

    @functools.cached_property
    def clock(self) -> tune.Clock:
        return tune.ColdClock(self.device)


class RebuiltError(Exception):
    """The CUDA library is another than the one that this process has loaded."""


class GpuClock(NamedTuple):
    """How `Runner` measures a GPU.

    Attributes:
        milliseconds: of a call, caches being cold.
        graphs: on a GPU as CUDA graphs, so that no gaps between a contender's kernels are timed.
    """

    milliseconds: tune.Clock
    device: torch.device
    graphs: bool = False
    timer: Callable[[], float] = time.monotonic

    @contextlib.contextmanager
    def mode(self, work: Work) -> Iterator[None]:
        # Compiled backward passes run more than once, so their buffers are not theirs to give away.
        again = isinstance(work, OperatorWork) and not work.inference
        with torch.no_grad(), torch._functorch.config.patch(donated_buffer=not again):
            yield

    def first_call(self, entry: Entry) -> None:
        for _ in range(WARM_UP):
            self.milliseconds(entry.call)

    def warm_up(self, entry: Entry) -> None:
        if self.graphs and self.device.type == "cuda":
            entry.call, how = captured(entry.call, self.device)
            entry.detail += how

    def sample(self, entry: Entry) -> None:
        entry.samples_ms.append(round(self.milliseconds(entry.call), 6))

    def why(self, failure: Exception) -> str:
        tune.check_alive(self.device)
        return tune.describe(failure)


def captured(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], str]:
    """A CUDA graph of what runs; or what runs, and why there is no graph of it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception as failure:  # such as one that synchronises
        tune.check_alive(device)
        return run, f"; without a CUDA graph: {tune.describe(failure)}"
    return graph.replay, ""


def operator_work(case: OperatorCase, device: torch.device) -> OperatorWork:
    """As `build` makes it, on the device; the numbers are the same in every dtype and layout but for rounding."""
    plain, dtype = _built(replace(case, dtype="float32", layout="nchw")), getattr(torch, case.dtype)
    arguments, incoming = mapped(lambda t: t.to(device, dtype), (plain.arguments, plain.incoming))
    return replace(plain, arguments=arguments, incoming=incoming, layout=case.layout)


@functools.lru_cache(maxsize=1)  # random numbers take the CPU longer than all that is done with them takes the GPU
def _built(case: OperatorCase) -> OperatorWork:
    return build(case)


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


def operator_row(case: OperatorCase, device: torch.device, clock: tune.Clock, samples: int = 30) -> Row:
    """An operator, or all its gradients, beside baselines and a copy."""
    work, graphs = operator_work(case, device), case.direction == "forward"
    row = Runner(on_gpu(work, device, case.bytes), samples, clock=GpuClock(clock, device, graphs)).run(case, work).row
    # Its contenders have layouts of their own.
    parameters = {name: value for name, value in row.parameters.items() if name != "layout"}
    return replace(row, case=_operator_name(case), parameters=parameters)


def _operator_name(case: OperatorCase) -> str:
    return f"{replace(case, direction='forward').name.removesuffix(f' {case.layout}')} {case.direction}"


def model_row(case: ModelCase, device: torch.device, clock: tune.Clock, samples: int = 10) -> Row:
    """Inference of a model, on the backends that are chosen by themselves."""
    built = build(case)
    work = replace(built, model=built.model.to(device), batches=[batch.to(device) for batch in built.batches])
    row = Runner(on_gpu(work, device), samples, clock=GpuClock(clock, device)).run(case, work).row
    return replace(row, case=f"{case.name} inference")


def training_row(case: TrainingCase, device: torch.device, clock: tune.Clock, samples: int = 5) -> Row:
    """A training step without the optimizer."""
    built = build(case)
    work = replace(built, model=built.model.to(device), batch=built.batch.to(device), gradients=False)
    return Runner(on_gpu(work, device), samples, clock=GpuClock(clock, device)).run(case, work).row


SANITIZER = "compute-sanitizer"

#: Tools, and the cases of the self-test that they watch: they slow kernels down by a factor of 10 to 100.
SANITIZED = (("memcheck", "k=3 "), ("racecheck", "k=3 "), ("memcheck", "k=31 "), ("racecheck", "k=31 "))
LONGEST = 90.0  # seconds of one of them

#: How the texts begin that say why there is no CUDA library where nothing is wrong with it.
NOT_WANTED = ("no CUDA compiler", "left out by", "no working C++ compiler", "ninja is not installed")


def library_state() -> tuple[int, int] | None:
    """Tells one build of the CUDA library from another; None where there is none."""
    try:
        found = (native.library_dir() / native.CUDA_LIBRARY).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def build_libraries(device: torch.device, seconds: float) -> dict[str, Any] | None:
    """Brings the libraries up to date with their sources, that of CUDA for this GPU only, unless ``FFNET_CUDA_ARCHS``
    says otherwise or there is one already that runs on it. Returns a row; None where time was up."""
    folder = native.library_dir()
    if os.environ.get("FFNET_KERNELS_LIBRARY_DIR"):
        return {"passed": True, "skipped": "FFNET_KERNELS_LIBRARY_DIR names the libraries"}
    architectures = wanted_architectures(torch.cuda.get_device_capability(device), built_architectures(folder))
    command = [sys.executable, ROOT / "csrc" / "build.py", "--out", folder, "--work", ROOT / "build" / "native"]
    finished = finish(command, seconds, {"FFNET_CUDA_ARCHS": architectures})
    if finished is None:
        return None
    code, output = finished
    row: dict[str, Any] = {"passed": code == 0, "architectures": architectures}
    if code != 0 and "no native kernels" not in output:  # refused before anything was built
        return {**row, "error": output}
    missing = json.loads((folder / "build_record.json").read_text())["missing"].get(native.CUDA_LIBRARY)
    if missing is None:
        return row
    if missing.startswith(NOT_WANTED):
        return {**row, "passed": True, "skipped": missing}
    return {**row, "passed": False, "error": f"{missing}\n{output}"}


def wanted_architectures(capability: tuple[int, int], built: Sequence[int]) -> str:
    """What is to be in ``FFNET_CUDA_ARCHS``. Machine code runs on every later minor of its major version."""
    major, minor = capability
    if "FFNET_CUDA_ARCHS" in os.environ:
        return os.environ["FFNET_CUDA_ARCHS"]
    if any(number // 10 == major and number % 10 <= minor for number in built):
        return ",".join(map(str, built))
    return f"{major}{minor}"


def built_architectures(folder: Path) -> list[int]:
    try:
        return json.loads((folder / "build_record.json").read_text())["cuda"]["architectures"]
    except (OSError, ValueError, KeyError):
        return []


def sanitize(tool: str, text: str, seconds: float) -> dict[str, Any] | None:
    """A row: whether the CUDA kernels pass the self-test's cases with this text in their names without a finding of the
    sanitizer; None where time was up."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    program = shutil.which(SANITIZER) or shutil.which(SANITIZER, path=f"{home}/bin")
    missing = None if program else f"{SANITIZER} is not there (looked on the path and in CUDA's folder)"
    if reason := choice.why_unavailable("cuda") or missing:
        return {"passed": True, "skipped": reason}
    begun = time.monotonic()
    command = [program, "--tool", tool, "--error-exitcode", "86", "--kernel-name", "kns=ffnet", sys.executable]
    command += ["-m", "ffnet_kernels", "selftest", "--backend", "cuda", "--filter", text]
    # Blocks of memory end where tensors end only where torch does not keep and divide them.
    finished = finish(command, min(seconds, LONGEST), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if finished is None:
        late = seconds > LONGEST
        return {"passed": False, "error": f"not finished after {LONGEST:.0f} s"} if late else None
    code, output = finished
    took = {"seconds": round(time.monotonic() - begun, 1)}
    return {"passed": True, **took} if code == 0 else {"passed": False, **took, "error": output}


def finish(command: Sequence[object], seconds: float, environment: dict[str, str]) -> tuple[int, str] | None:
    """The exit code of a process and the end of what it printed; None where it was not done in time.

    It is ended together with its children: ninja and the sanitizer have some.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(0.0, seconds))
    except BaseException as event:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(event, subprocess.TimeoutExpired):
            return None
        raise
    return process.returncode, output[-1200:].strip()


_LOADED = library_state()


def build_steps(session: Session) -> Iterator[Step]:
    yield Step("library", lambda: build_libraries(session.device, session.deadline - time.monotonic()))
    yield Step("info", _info)


def _info() -> dict[str, Any]:
    if library_state() != _LOADED:
        raise RebuiltError
    return {"passed": True, "info": ffnet_kernels.info()}


def _if_available(backend: str, steps: Callable[[], Iterator[Step]]) -> Iterator[Step]:
    """The steps, or one that says why the backend cannot run them."""
    reason = choice.why_unavailable(backend)
    if reason is None:
        yield from steps()
    else:
        yield Step(f"all of {backend}", lambda: {"passed": True, "skipped": reason})


def selftest_steps(backend: str, session: Session) -> Iterator[Step]:
    def steps() -> Iterator[Step]:
        for name, (operator, args) in selftest_work(backend).items():
            check_it = functools.partial(_check_on, backend, session.device, operator, args)
            yield Step(name, check_it, [functools.partial(start_selftest_case, name)] if backend == "triton" else ())

    return _if_available(backend, steps)


@functools.cache
def selftest_work(backend: str) -> dict[str, tuple[str, tuple]]:
    """The cases of ``ffnet_kernels.selftest`` in all dtypes; on Triton, whose every kernel has to be compiled, those of
    one filter only, and the others in float32."""
    found = {}
    for case in selftest_cases():
        dtypes = (*NARROW, torch.float32) if backend == "cuda" or " k=7 " in case.name else (torch.float32,)
        for dtype, layout in itertools.product(dtypes, case.layouts):
            name = f"{case.name} {str(dtype).removeprefix('torch.')} {layout}"
            found[name] = case.operator, moved(case.laid_out(layout), dtype=dtype)
    return found


def start_selftest_case(name: str) -> None:
    """Its Triton kernels, forward and backward, without data."""
    operator, args = selftest_work("triton")[name]
    args = moved(args, device="meta")
    spec = ffnet_kernels.ops.OPERATORS[operator]
    for backward in (False, True):
        tune.start(operator, spec.defined.empty(*args), args, backward=backward)


def _check_on(backend: str, device: torch.device, operator: str, args: tuple) -> dict[str, Any]:
    return check(backend, operator, moved(args, device=device))


def parity_steps(backend: str, session: Session) -> Iterator[Step]:
    """Of the CUDA kernels those on tensor cores, at FFNet's own stages: float32 has but one kernel in all sizes."""
    triton = backend == "triton"

    def steps() -> Iterator[Step]:
        stages, dtypes = (tune.STAGES, tune.DTYPES) if triton else (tune.STAGES[:4], NARROW)
        # Those that draw the same random numbers one after the other.
        choices = itertools.product((8, 128), stages, OPERATORS, dtypes, LAYOUTS)
        for batch, (channels, size, kernel), operator, dtype, layout in choices:
            name = str(dtype).removeprefix("torch.")
            case = OperatorCase(operator, batch, channels, size, kernel, layout, name)
            jobs = [job for backward in (False, True) for job in _jobs(case, backward, session)] if triton else []
            yield Step(case.name, functools.partial(check_parity, backend, case, session.device), jobs)

    return _if_available(backend, steps)


def _jobs(case: OperatorCase, backward: bool, session: Session) -> list[Callable[[], object]]:
    """Compile what the case launches on Triton with the tiles that it will get on this GPU."""
    dtype, last = getattr(torch, case.dtype), case.layout == "channels_last"
    call = tune.Call(case.operator, case.batch, case.channels, case.size, case.kernel, dtype, last, backward)
    winners = configs.winners(configs.device_name(session.device))
    return [functools.partial(tune.with_tiles, winners, call.start)]


def check_parity(backend: str, case: OperatorCase, device: torch.device) -> dict[str, Any]:
    work = operator_work(case, device)
    return check(backend, case.operator, work.checked(case.layout))


def sanitize_steps(session: Session) -> Iterator[Step]:
    def step(tool: str, text: str) -> dict[str, Any] | None:
        return sanitize(tool, text, session.deadline - time.monotonic())

    for tool, text in SANITIZED:
        yield Step(f"{tool} {text.strip()}", functools.partial(step, tool, text))


def headline_steps(session: Session) -> Iterator[Step]:
    for stage, operator in itertools.product(HEADLINE_STAGES, HEADLINE_OPERATORS):
        yield _operator_step(operator, stage, "forward", session)


def bench_steps(session: Session) -> Iterator[Step]:
    headline = {step.name for step in headline_steps(session)}
    for stage, direction, operator in itertools.product(tune.STAGES, DIRECTIONS, OPERATORS):
        step = _operator_step(operator, stage, direction, session)
        if step.name not in headline:
            yield step
    yield Step(f"{MODEL.name} inference", functools.partial(_plain_row, model_row, MODEL, session))
    yield Step(TRAINING.name, functools.partial(_plain_row, training_row, TRAINING, session))


def _operator_step(operator: str, stage: tuple[int, int, int], direction: str, session: Session) -> Step:
    case = OperatorCase(operator, BENCH_BATCH, *stage, dtype="bfloat16", direction=direction)
    ways = sorted({False, direction == "backward"})
    jobs = [job for layout in LAYOUTS for way in ways for job in _jobs(replace(case, layout=layout), way, session)]
    return Step(_operator_name(case), functools.partial(_plain_row, operator_row, case, session), jobs)


def _plain_row(measure: Callable, case: Any, session: Session) -> dict[str, Any]:
    row = measure(case, session.device, session.clock)
    plain = Result({}, [row]).to_plain()["rows"][0]
    wrong = [m for m in row.measurements if is_ours(m.contender) and not m.passed]
    texts = [f"{m.contender}: {m.reason or f'error {error_text(m)}'}" for m in wrong]
    return {"passed": not wrong, **({"error": "; ".join(texts)} if wrong else {}), "row": plain}


def tune_steps(session: Session) -> Iterator[Step]:
    def step() -> dict[str, Any] | None:
        try:
            left = tune.tune(session.device, None, tune.calls(), session.clock, deadline=session.deadline)
        except tune.DeviceLostError:
            return None  # its file says which tile it was; in a new process it goes on with the others
        return None if left else {"passed": True}

    yield Step("tune", step)


PARTS: dict[str, Callable[[Session], Iterator[Step]]] = {
    "build": build_steps,
    "selftest-cuda": functools.partial(selftest_steps, "cuda"),
    "parity-cuda": functools.partial(parity_steps, "cuda"),
    "headline": headline_steps,
    "sanitize": sanitize_steps,
    "selftest-triton": functools.partial(selftest_steps, "triton"),
    "parity-triton": functools.partial(parity_steps, "triton"),
    "bench": bench_steps,
    "tune": tune_steps,
}


def run_part(name: str, session: Session, path: Path, header: dict[str, Any], text: str = "") -> list[str]:
    """Runs the steps with ``text`` in their names that are not in the file yet, each row written at once. What was
    skipped is tried again: what it lacked may be there now.

    Returns:
        The names of the steps that are left because time is up.
    """
    record = read_part(path, header)
    record["rows"] = {name: row for name, row in record["rows"].items() if "skipped" not in row}
    left = {step.name: step for step in PARTS[name](session) if step.name not in record["rows"]}
    pending = [step for step in left.values() if text in step.name]
    for index, step in enumerate(pending):
        if index % CHUNK == 0:
            session.compiler([job for s in pending[index : index + CHUNK] for job in s.jobs], session.deadline)
        if time.monotonic() >= session.deadline:
            break
        begun = time.monotonic()
        row = _attempt(step, session.device)
        if row is not None:
            record["rows"][step.name] = row
            del left[step.name]
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({**record, "left": list(left)}, indent=1, allow_nan=False) + "\n")
            verdict = "skip" if "skipped" in row else "ok" if row["passed"] else "FAIL"
            print(f"{name}: {verdict:4} {step.name} ({time.monotonic() - begun:.1f} s)", flush=True)
        tune.check_alive(session.device)
        _free(session.device)
    return [step.name for step in pending if step.name in left]


def _attempt(step: Step, device: torch.device) -> dict[str, Any] | None:
    try:
        row = step.run()
        if row is not None:
            tune.check_alive(device)
    except RebuiltError:
        raise
    except Exception as error:  # whatever went wrong is the result
        return {"passed": False, "error": tune.describe(error)}
    return row


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_part(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """What a part's file holds, without rows where it is of other sources or another GPU."""
    record = json.loads(path.read_text()) if path.exists() else {}
    same = record.get("source") == header["source"] and record.get("device") == header["device"]
    return record if same else {**header, "rows": {}}


def header_of(device: torch.device) -> dict[str, Any]:
    """What results belong to: the GPU and a digest of the sources, which tells uncommitted changes apart too."""
    digest = hashlib.sha256()
    for folder in ("ffnet_kernels", "ffnet", "benchmarks", "csrc"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".cu", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return {"device": tune.device_line(device), "source": digest.hexdigest()[:12], **machine(), **tune.versions()}


def merged(folder: Path, header: dict[str, Any], device: torch.device) -> Result:
    """All parts as one result: what was timed as its rows, and what the steps found in ``extra``."""
    records = {name: read_part(folder / f"{name}.json", header) for name in PARTS}
    parts = {name: {"left": record.get("left"), "rows": record["rows"]} for name, record in records.items()}
    rows = [row["row"] for part in parts.values() for row in part["rows"].values() if "row" in row]
    for part in parts.values():
        part["rows"] = {n: {k: v for k, v in row.items() if k != "row"} for n, row in part["rows"].items()}
    winners = tune.read(configs._TUNED / f"{configs.device_name(device)}.json")
    interrupted = any(part["left"] != [] for part in parts.values())
    plain = {"format": 1, "machine": header, "rows": rows, "interrupted": interrupted}
    return Result.from_json(json.dumps({**plain, "extra": {"parts": parts, "tuned": winners}}))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something failed, 2 where there is no GPU, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    if not (ROOT / "csrc" / "build.py").exists():
        print("benchmarks gpu: builds, checks and measures a source tree; this package is installed", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks gpu: there is no GPU", file=sys.stderr)
        return 2
    return run(options, torch.device("cuda", torch.cuda.current_device()))


def run(options: argparse.Namespace, device: torch.device) -> int:
    """The parts that the options name, then their results: as a file, and as a table."""
    deadline = time.monotonic() + options.budget
    names = options.only or list(PARTS)
    if options.again:
        for name in names:
            (options.work / f"{name}.json").unlink(missing_ok=True)
    header = header_of(device)
    left: dict[str, list[str]] = {}
    ended: BaseException | None = None
    with tune.Compiler() as compiler:
        session = Session(device, deadline, compiler)
        try:
            for name in names:
                left[name] = run_part(name, session, options.work / f"{name}.json", header, options.filter)
        except (tune.DeviceLostError, RebuiltError, KeyboardInterrupt) as event:
            ended = event
    if isinstance(ended, (tune.DeviceLostError, RebuiltError)):
        _restart(options, deadline - time.monotonic(), ended)
    result = merged(options.work, header, device)
    path = options.out / f"gpu-{configs.device_name(device)}.json"
    write_json(result, path)
    text, failed = gpu_summary(result, left)
    print(f"\n{text}\nwrote {path}\n\n{gpu_table(result)}")
    return INTERRUPTED if ended else int(failed)


def _restart(options: argparse.Namespace, seconds: float, error: Exception) -> None:
    """Goes on in a new process: in this one the GPU is lost, or an older library. What is done is in the files."""
    what = "the CUDA library was built" if isinstance(error, RebuiltError) else error
    print(f"benchmarks gpu: starting again after {what}", flush=True)
    arguments = ["--budget", f"{max(0.0, seconds):.0f}", "--work", options.work, "--out", options.out]
    arguments += ["--filter", options.filter, *(word for name in options.only for word in ("--only", name))]
    os.execv(sys.executable, [sys.executable, "-m", str(__package__), "gpu", *map(str, arguments)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} gpu", description=__doc__.splitlines()[0])
    add, work, out = parser.add_argument, ROOT / "build" / "gpu", ROOT / "benchmarks" / "results"
    add("--only", action="append", choices=PARTS, default=[], help="this part; may be repeated")
    add("--filter", default="", metavar="TEXT", help="only steps with this text in their name")
    add("--again", action="store_true", help="forget what these parts have done before")
    add("--budget", type=float, default=480, metavar="SECONDS", help="default: %(default)s")
    add("--work", type=Path, default=work, metavar="DIR", help="of the parts' files (%(default)s)")
    add("--out", type=Path, default=out, metavar="DIR", help="of the result (%(default)s)")
    return parser
