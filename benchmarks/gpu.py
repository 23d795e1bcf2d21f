"""``python -m benchmarks gpu`` (``make gpu``): everything there is to do on a GPU, in parts that can be resumed.

The most valuable part comes first. ``build`` compiles the CUDA library, ``selftest-*`` check a backend's kernels on
small awkward shapes, ``parity-*`` at FFNet's own; ``headline`` times the operators that matter most beside baselines,
``bench`` the others; ``sanitize`` runs NVIDIA's sanitizer, ``tune`` measures Triton's tiles. Each part keeps a file
with a row a step; what is there for the same sources and GPU is not done again. All goes into one file of results.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ffnet_kernels
from ffnet_kernels.backends import choice
from ffnet_kernels.backends.triton import configs, tune
from ffnet_kernels.selftest import cases as selftest_cases
from ffnet_kernels.selftest import moved

from . import gpu_processes
from .cases import OPERATORS, ModelCase, OperatorCase
from .gpu_contenders import is_ours
from .gpu_report import summary, table
from .gpu_timing import check, model_row, operator_row, operator_work, training_row
from .machine import machine
from .progress import INTERRUPTED
from .report import error_text
from .results import Result, replacing, write_json
from .suites import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
BENCH_BATCH = 128
HEADLINE_STAGES, HEADLINE_OPERATORS = tune.STAGES[:2], ("ffnified_attention", "depthwise_conv2d")
NARROW = (torch.bfloat16, torch.float16)
MODEL = ModelCase("ffnet_2", BENCH_BATCH, dtype="bfloat16")

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


def build_steps(session: Session) -> Iterator[Step]:
    yield Step("library", lambda: gpu_processes.build(session.device, session.deadline - time.monotonic()))
    yield Step("info", _info)


_LOADED = gpu_processes.library_state()


def _info() -> dict[str, Any]:
    if gpu_processes.library_state() != _LOADED:
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


def parity_cases(stages: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype]) -> list[OperatorCase]:
    """Every stage, those that draw the same random numbers one after the other."""
    return [
        OperatorCase(operator, batch, channels, size, kernel, layout, str(dtype).removeprefix("torch."))
        for batch, (channels, size, kernel), operator, dtype, layout in itertools.product(
            (8, 128), stages, OPERATORS, dtypes, LAYOUTS
        )
    ]


def parity_steps(backend: str, session: Session) -> Iterator[Step]:
    """Of the CUDA kernels those on tensor cores, at FFNet's own stages: float32 has but one kernel in all sizes."""
    triton = backend == "triton"

    def steps() -> Iterator[Step]:
        for case in parity_cases(*((tune.STAGES, tune.DTYPES) if triton else (tune.STAGES[:4], NARROW))):
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
    return check(backend, case.operator, work.plain(case.layout).inputs[0])


def sanitize_steps(session: Session) -> Iterator[Step]:
    for tool, text in gpu_processes.SANITIZED:
        yield Step(f"{tool} {text.strip()}", functools.partial(_sanitize, tool, text, session))


def _sanitize(tool: str, text: str, session: Session) -> dict[str, Any] | None:
    return gpu_processes.sanitize(tool, text, session.deadline - time.monotonic())


def headline_steps(session: Session) -> Iterator[Step]:
    for stage, operator in itertools.product(HEADLINE_STAGES, HEADLINE_OPERATORS):
        yield _operator_step(operator, stage, False, session)


def bench_steps(session: Session) -> Iterator[Step]:
    headline = {step.name for step in headline_steps(session)}
    for stage, backward, operator in itertools.product(tune.STAGES, (False, True), OPERATORS):
        step = _operator_step(operator, stage, backward, session)
        if step.name not in headline:
            yield step
    yield Step(f"{MODEL.name} inference", functools.partial(_plain_row, model_row, MODEL, session))
    yield Step(f"{MODEL.name} training step", functools.partial(_plain_row, training_row, MODEL, session))


def _operator_step(operator: str, stage: tuple[int, int, int], backward: bool, session: Session) -> Step:
    channels, size, kernel = stage
    case = OperatorCase(operator, BENCH_BATCH, channels, size, kernel, dtype="bfloat16")
    run = functools.partial(_plain_row, operator_row, case, session, backward=backward)
    both = [replace(case, layout=layout) for layout in LAYOUTS]
    jobs = [job for one in both for way in sorted({False, backward}) for job in _jobs(one, way, session)]
    name = case.name.removesuffix(f" {case.layout}")
    return Step(f"{name} {'backward' if backward else 'forward'}", run, jobs)


def _plain_row(measure: Callable, case: Any, session: Session, **options: Any) -> dict[str, Any]:
    row = measure(case, session.device, session.clock, **options)
    plain = json.loads(Result({}, [row]).to_json())["rows"][0]
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
    text, failed = summary(result, left)
    print(f"\n{text}\nwrote {path}\n\n{table(result)}")
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
    parser.add_argument("--only", action="append", choices=PARTS, default=[], help="this part; may be repeated")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only steps with this text in their name")
    parser.add_argument("--again", action="store_true", help="forget what these parts have done before")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="of the parts' files (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR", help="of the result (%(default)s)"
    )
    return parser
