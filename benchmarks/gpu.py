"""``python -m benchmarks gpu`` (``make gpu``): all that a GPU can show of the kernels, in one go of under nine minutes.

The steps are in `gpu_steps`, the most valuable first. They run in processes beside this one, which never touches the
GPU: a step that hangs or crashes is ended at its deadline, and the next one runs in a process that is waiting for it.
All that is found goes into one folder, row by row as it is found; what is there for the same sources is not done again.

    rows.jsonl          a line a step
    gpu-DEVICE.json     what was timed, as results of the suite are kept
    summary.md          what failed, and the table
    log.txt             what the processes printed
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ffnet_kernels import native

from .cases import LAYOUTS, OPERATORS, OperatorCase
from .contenders import COMPILED, COPY, CUDNN, CUDNN_NCHW, EAGER, EAGER_NCHW
from .gpu_steps import (
    BATCH,
    FLOORS,
    LARGE_BATCH,
    NARROW,
    Bench,
    Step,
    bandwidth,
    compiled_model,
    launched,
    library,
    model_case,
    on_cpu_reference,
    operator_name,
    parity,
    products,
    selftest,
    time_model,
    time_operator,
    time_training,
    unless_missing,
)
from .report import gpu_summary, gpu_table
from .results import Measurement, Result, Row, replacing, write_json
from .runner import INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0
START_SECONDS, BUILD_SECONDS = 60.0, 240.0
#: Where CUDA's tools are, if not on the path.
FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
FILE = "rows.jsonl"


class Section(NamedTuple):
    """Steps that have so many seconds together, and what sections before them have left."""

    name: str
    seconds: float
    steps: tuple[Step, ...]


#: Channels, size and filter of FFNet's token mixers, and of depthwise convolutions of FFNet and ConvNeXt.
MIXERS = ((320, 16, 7), (640, 8, 7), (160, 32, 3), (80, 64, 3), (320, 14, 7), (640, 7, 7), (160, 28, 3))
DEPTHWISE = ((352, 16, 7), (704, 8, 7), (176, 32, 7), (88, 64, 7), (384, 14, 7), (768, 7, 7), (192, 28, 7))
SHAPES = {"ffnified_attention": MIXERS, "depthwise_conv2d": DEPTHWISE}

NCU = ("ncu", "--clock-control", "none", "--csv", "--page", "raw", "--launch-skip", "1", "--launch-count", "1")
NCU_SECTIONS = (
    "SpeedOfLight", "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis",
)  # fmt: skip
SANITIZER = ("compute-sanitizer", "--error-exitcode", "86", "--kernel-name", "kns=ffnet", "--tool")


def plan(small: bool = False) -> list[Section]:
    """Everything, the most valuable first.

    Args:
        small: as a rehearsal has it: the same steps on few channels and images.
    """

    def of(operator: str, shape: tuple[int, int, int], batch: int = BATCH, direction: str = "forward", **how: Any):
        channels, size, kernel = shape
        if small:
            channels, batch = 4, {BATCH: 3, LARGE_BATCH: 5}.get(batch, 2)
        return OperatorCase(operator, batch, channels, size, kernel, dtype="bfloat16", direction=direction, **how)

    def timed(
        contender: str, batch: int, direction: str, pick: slice = slice(None), seconds: float = 10
    ) -> Iterator[Step]:
        for shapes in zip(*(SHAPES[operator][pick] for operator in SHAPES), strict=True):
            for operator, shape in zip(SHAPES, shapes, strict=True):
                case = of(operator, shape, batch, direction)
                run = functools.partial(time_operator, case, contender)
                yield Step(f"{operator_name(case)}: {contender}", seconds, run)

    def floors(batch: int, direction: str) -> Iterator[Step]:
        """Of the token mixer and of all gradients three maps, of the convolution two."""
        for name in FLOORS:
            steps = list(timed(name, batch, direction))
            yield from steps if name == COPY or direction == "backward" else steps[::2]

    def parities(backend: str, batch: int, dtypes: Sequence[torch.dtype]) -> Iterator[Step]:
        shapes = ((320, 16, 7), (640, 8, 7), (160, 32, 3), (80, 64, 3))
        for dtype, shape, operator, layout in itertools.product(dtypes, shapes, OPERATORS, LAYOUTS):
            case = replace(of(operator, shape, batch), layout=layout, dtype=str(dtype).removeprefix("torch."))
            run = functools.partial(unless_missing, backend, functools.partial(parity, backend, case))
            yield Step(f"parity {backend} {case.name}", 10, run)

    def selftests(backend: str, dtypes: Sequence[str], seconds: float) -> Iterator[Step]:
        for operator, dtype in itertools.product(OPERATORS, dtypes):
            run = functools.partial(unless_missing, backend, functools.partial(selftest, backend, operator, dtype))
            yield Step(f"selftest {backend} {operator} {dtype}", seconds, run)

    def counted(kernel: str, case: OperatorCase) -> Step:
        sections = itertools.chain.from_iterable(("--section", name) for name in NCU_SECTIONS)
        under = (*NCU, *sections, "--kernel-name", f"regex:{kernel}")
        return Step(f"ncu {operator_name(case)}", 25, functools.partial(launched, case), under)

    def watched(tool: str, operator: str, kernel: int) -> Step:
        case = replace(of(operator, (5, 14, kernel), 3, "backward"), batch=3, channels=5, layout="nchw")
        run = functools.partial(on_cpu_reference, "cuda", case)
        return Step(f"{tool} {operator_name(case)}", 30, run, (*SANITIZER, tool))

    def named(prefix: str, run: Callable, names: Sequence[str], seconds: float) -> list[Step]:
        return [Step(f"{prefix}: {name}", seconds, functools.partial(run, name)) for name in names]

    mixer, depthwise = SHAPES
    model, training = model_case(small).name, "training step"
    ways = ("ours nchw", "ours channels-last", "eager channels-last", "ours nchw graph", "ours channels-last graph",
            "eager channels-last graph", "eager nchw", "ours nchw profile", "eager channels-last profile")  # fmt: skip
    single = functools.partial(time_model, batch=1)
    every, forward, backward = ("bfloat16", "float16", "float32"), "forward", "backward"
    return [
        Section("device", 20, (
            Step("library", 15, library), Step("products", 5, products),
            *(Step(f"bandwidth {size} MB", 5, functools.partial(bandwidth, size)) for size in (16, 128, 1024)),
        )),
        Section("parity", 40, (*selftests("cuda", every, 15), *parities("cuda", 8, NARROW[:1]))),
        Section(forward, 50, (
            *timed("cuda nchw", BATCH, forward), *floors(BATCH, forward), *timed("cuda nchw", LARGE_BATCH, forward),
            *floors(LARGE_BATCH, forward), *timed("cuda channels-last", BATCH, forward), *timed(EAGER, BATCH, forward),
            *timed(EAGER_NCHW, BATCH, forward), *timed(CUDNN, BATCH, forward), *timed(CUDNN_NCHW, BATCH, forward),
        )),
        Section(backward, 50, (
            *timed("cuda nchw", BATCH, backward), *floors(BATCH, backward), *timed("cuda nchw", LARGE_BATCH, backward),
            *floors(LARGE_BATCH, backward), *timed("cuda channels-last", BATCH, backward),
            *timed(EAGER, BATCH, backward), *timed(EAGER_NCHW, BATCH, backward),
        )),
        Section("model", 70, (
            *named(model, time_model, ways, 25),
            *named(f"{model}, one image", single, ("ours nchw graph", "eager channels-last graph"), 15),
        )),
        Section("training", 40, tuple(named(training, time_training, (
            "ours channels-last", "ours nchw", "eager channels-last", "ours channels-last profile"), 25))),
        Section("counters", 80, (
            counted("attention_forward", of(mixer, MIXERS[0])),
            counted("depthwise_stream", of(depthwise, DEPTHWISE[0])),
            counted("attention_backward", of(mixer, MIXERS[0], direction=backward)),
            counted("attention_forward", of(mixer, MIXERS[4])),
        )),
        Section("compile", 100, (
            *timed(COMPILED, BATCH, forward, slice(0, 2), 25), Step(f"{model}: {COMPILED}", 60, compiled_model),
            *timed(COMPILED, BATCH, backward, slice(0, 1), 30),
        )),
        Section("rest", 70, (
            watched("memcheck", mixer, 7), watched("racecheck", mixer, 7), watched("memcheck", depthwise, 7),
            watched("racecheck", depthwise, 7), *selftests("triton", every[:1], 40),
            *timed("triton channels-last", BATCH, forward, slice(0, 2), 20),
            *timed("triton nchw", BATCH, forward, slice(0, 2), 20), *parities("cuda", BATCH, NARROW),
            *parities("triton", 8, NARROW[:1]),
        )),
    ]  # fmt: skip


class Process:
    """A process that runs steps: it gets their names, and answers with a row each."""

    def __init__(self, command: Sequence[object], log: IO[str]) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        self._unread = b""

    def ask(self, name: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # which shows in its answer
            self._process.stdin.write(f"{name}\n".encode())
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Its next one, or a row that says why there is none; then nothing more can be asked of it."""
        assert self._process.stdout is not None
        end, pipe = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.end()
                return {"passed": False, "error": f"not finished after {seconds:.1f} s", "lost": True}
            read = os.read(pipe, 1 << 16)
            if not read:
                self.end()
                return {"passed": False, "error": f"its process ended ({self._process.returncode})", "lost": True}
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """With its children: compilers have some."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Workers:
    """A process at work and one that waits, with everything imported."""

    def __init__(self, command: Sequence[object], log: IO[str]) -> None:
        self._command, self._log = command, log
        self._busy: Process | None = None
        self._spare = Process(command, log)

    def perform(self, name: str, seconds: float) -> dict[str, Any]:
        if self._busy is None:
            self._busy, self._spare = self._spare, Process(self._command, self._log)
            row = self._busy.answer(START_SECONDS)  # that it is ready
            if row.get("lost"):
                self._busy = None
                return row
        self._busy.ask(name)
        row = self._busy.answer(seconds)
        if row.pop("lost", False):
            self.restart()
        return row

    def restart(self) -> None:
        """The next step runs in a new process."""
        if self._busy is not None:
            self._busy.end()
        self._busy = None

    def again(self) -> None:
        """Both are new: what they import has changed."""
        self.restart()
        self._spare.end()
        self._spare = Process(self._command, self._log)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.restart()
        self._spare.end()


class Record:
    """The rows of a folder, each on disk as soon as it is there."""

    def __init__(self, folder: Path, header: dict[str, Any], again: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._header = folder, header
        self.rows: dict[str, dict[str, Any]] = {}
        kept = [] if again else _lines(folder / FILE)
        if kept[:1] == [header]:
            self.rows = {row["step"]: row for row in kept[1:]}
        with replacing(folder / FILE) as temporary:
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in (header, *self.rows.values())))

    def done(self, name: str) -> bool:
        """What failed or was skipped is tried again: what it lacked may be there now."""
        row = self.rows.get(name)
        return row is not None and row["passed"] and "skipped" not in row

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["step"]] = row
        with (self.folder / FILE).open("a") as file:
            file.write(f"{json.dumps(row)}\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def machine(self) -> dict[str, Any]:
        found = self.rows.get("library", {}).get("machine", {})
        return {"device": "unknown", "name": "unknown", "commit": "unknown", **found, **self._header}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a file whose last line may be cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def run(options: argparse.Namespace, worker: Sequence[object], sections: Sequence[Section]) -> int:
    """Returns 0; 1 where something failed or is left, 130 after Ctrl-C."""
    record = Record(options.out, {"source": digest(), "small": options.small}, options.again)
    interrupted = False
    with (options.out / "log.txt").open("a") as log, Workers(worker, log) as workers:
        scale = options.budget / sum(section.seconds for section in sections)
        end = begun = time.monotonic()
        last = begun + options.budget
        try:
            for section in sections:
                end += section.seconds * scale
                # A build takes from what comes last, not from what comes next.
                end += _section(section, record, workers, min(end, last), scale, options)
                _write(record, sections)
        except KeyboardInterrupt:
            interrupted = True
    text, failed = _write(record, sections)
    print(f"\n{text}\nwrote {options.out} in {time.monotonic() - begun:.0f} s")
    return INTERRUPTED if interrupted else int(failed)


def _section(
    section: Section, record: Record, workers: Workers, end: float, scale: float, options: argparse.Namespace
) -> float:
    """Its steps until there is no time; returns the seconds that a build took."""
    built = 0.0
    for step in section.steps:
        first = step.name == "library"  # who and what it is: in every run
        if not first and (record.done(step.name) or not (options.only in section.name and options.filter in step.name)):
            continue
        begun = time.monotonic()
        if begun >= end:
            break
        row = _perform(step, min(step.seconds * scale, end - begun), workers, options)
        if first and not row["passed"] and "architecture" in row and not os.environ.get("FFNET_KERNELS_LIBRARY_DIR"):
            row = {**_build(row["architecture"], workers), "was": row["error"]}
            built = time.monotonic() - begun
            if row["passed"]:
                row = {**_perform(step, step.seconds, workers, options), **row}
        seconds = time.monotonic() - begun
        record.add({"section": section.name, "step": step.name, "seconds": round(seconds, 2), **row})
        verdict = "skip" if "skipped" in row else "ok" if row["passed"] else "FAIL"
        print(f"{section.name}: {verdict:4} {step.name} ({seconds:.1f} s)", flush=True)
    return built


def _perform(step: Step, seconds: float, workers: Workers, options: argparse.Namespace) -> dict[str, Any]:
    if not step.under:
        return workers.perform(step.name, seconds)
    workers.restart()  # its memory, and its share of the GPU
    program = _tool(step.under[0])
    if program is None:
        return {"passed": True, "skipped": f"{step.under[0]} is not there (looked on the path and in CUDA's folders)"}
    # Blocks of memory end where tensors end only where torch does not keep and divide them.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, *step.under[1:], *_worker(options, "--run", step.name)]
    finished = finish(command, seconds, environment)
    if finished is None:
        return {"passed": False, "error": f"not finished after {seconds:.1f} s"}
    code, output = finished
    rows = [line for line in output.splitlines() if line.startswith("{")]
    row = json.loads(rows[-1]) if rows else {"passed": False}
    if code != 0 or not rows:
        row = {**row, "passed": False, "error": f"exit code {code}: {output[-1200:].strip()}"}
    return {**row, **({"counters": counters(output)} if step.under[0] == "ncu" else {})}


def _tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else []
    folders += [folder for pattern in FOLDERS for folder in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def counters(output: str) -> dict[str, str]:
    """Of the one launch in what ncu prints as comma-separated values: a line of names, one of units, one of values."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(table) < 3:
        return {}
    return {name: f"{value} {unit}".strip() for name, unit, value in zip(*table[:3], strict=False)}


def finish(command: Sequence[object], seconds: float, environment: dict[str, str]) -> tuple[int, str] | None:
    """The exit code of a process and what it printed; None where it was not done in time.

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
    return process.returncode, output


def _build(architecture: str, workers: Workers) -> dict[str, Any]:
    """The libraries for this GPU, in place of those that do not run on it."""
    print(f"building the CUDA library for sm_{architecture}", flush=True)
    command = [
        sys.executable,
        ROOT / "csrc" / "build.py",
        "--out",
        native.library_dir(),
        "--work",
        ROOT / "build/native",
    ]
    chosen = os.environ.get("FFNET_CUDA_ARCHS", architecture)
    finished = finish(command, BUILD_SECONDS, {"FFNET_CUDA_ARCHS": chosen})
    workers.again()
    if finished is None:
        return {"passed": False, "error": f"the build was not finished after {BUILD_SECONDS:.0f} s"}
    code, output = finished
    return {"passed": True, "built": chosen} if code == 0 else {"passed": False, "error": output[-1200:].strip()}


def _write(record: Record, sections: Sequence[Section]) -> tuple[str, bool]:
    """The results and the summary of what there is; its text, and whether anything failed or is left."""
    parts: dict[str, Any] = {}
    left: dict[str, list[str]] = {}
    rows: dict[str, Row] = {}
    for section in sections:
        names = [step.name for step in section.steps]
        found = {name: record.rows[name] for name in names if name in record.rows}
        left[section.name] = [name for name in names if name not in found]
        kept = {n: {k: v for k, v in row.items() if k != "measurement"} for n, row in found.items()}
        parts[section.name] = {"left": left[section.name], "rows": kept}
        for row in (row for row in found.values() if "measurement" in row):
            measurement = Measurement.from_plain({"samples_ms": (), **row["measurement"]})
            one = Row(row["case"], row["flops"], row["bytes"], (measurement,))
            before = rows.get(one.case)
            rows[one.case] = one if before is None else replace(one, measurements=(*before.measurements, measurement))
    result = Result(record.machine, list(rows.values()), any(left.values()), {"parts": parts})
    write_json(result, record.folder / f"gpu-{record.machine['name']}.json")
    text, failed = gpu_summary(result, left)
    text = f"{text}\n\n{gpu_table(result)}\n"
    with replacing(record.folder / "summary.md") as temporary:
        temporary.write_text(text)
    return text, failed or any(left.values())


def digest() -> str:
    """Of the sources: it tells uncommitted changes apart, too."""
    found = hashlib.sha256()
    for folder in ("ffnet_kernels", "ffnet", "benchmarks", "csrc"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".cu", ".h", ".cpp"):
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _worker(options: argparse.Namespace, *more: str) -> list[str]:
    small = ["--small"] if options.small else []
    return [sys.executable, "-m", str(__package__), "gpu", *small, "--hang", options.hang, *more]


def work(options: argparse.Namespace) -> int:
    """The process that runs steps: those whose names come, or the one that ``--run`` names."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints into the log
    steps = {step.name: step for section in plan(options.small) for step in section.steps}
    bench = Bench(torch.device("cpu" if options.small else "cuda:0"), options.small)
    gc.collect()
    gc.freeze()  # or every collection between steps would go through all of torch

    def answer(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=answers, flush=True)

    def perform(name: str) -> dict[str, Any]:
        if options.hang != NOTHING and options.hang in name:
            time.sleep(1e6)
        return bench.perform(steps[name])

    if options.run:
        row = perform(options.run)
        answer(row)
        return 0 if row["passed"] else 1
    answer({"ready": True})
    for line in sys.stdin:
        row = perform(line.rstrip("\n"))
        answer(row)
        if row.get("lost"):
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something failed or is left, 2 where there is no GPU, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    if options.work or options.run:
        return work(options)
    if not (ROOT / "csrc" / "build.py").exists():
        print("benchmarks gpu: checks and measures a source tree; this package is installed", file=sys.stderr)
        return 2
    if not options.small and not torch.cuda.is_available():
        print("benchmarks gpu: there is no GPU", file=sys.stderr)
        return 2
    return run(options, _worker(options, "--work"), plan(options.small))


NOTHING = "nothing"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__} gpu", description=__doc__.splitlines()[0])
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="gets all files (%(default)s)")
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help="all deadlines scale with it (%(default)s)")
    add("--only", default="", metavar="TEXT", help="only sections with this text in their names")
    add("--filter", default="", metavar="TEXT", help="only steps with this text in their names")
    add("--again", action="store_true", help="forget what is there")
    add("--small", action="store_true", help="a rehearsal on the processor: few channels and images")
    add("--hang", default=NOTHING, help=argparse.SUPPRESS)  # steps with this text in their names never end
    add("--work", action="store_true", help=argparse.SUPPRESS)
    add("--run", default="", help=argparse.SUPPRESS)
    return parser
