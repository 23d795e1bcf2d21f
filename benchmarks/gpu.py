"""``python -m benchmarks.gpu`` (``make gpu``): everything there is to do on a GPU, in parts that can be resumed.

``build`` says what is installed, ``selftest`` checks the kernels on small awkward shapes, ``parity`` at FFNet's own,
``bench`` times them beside their peers, ``tune`` measures their tiles. Each part keeps a JSON file with a row a step;
what is there for the same sources and GPU is not done again. All of it goes into one file of results.
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
from torch import Tensor

import ffnet_kernels
from ffnet_kernels.backends.triton import configs, tune
from ffnet_kernels.selftest import _cases as selftest_cases

from .__main__ import INTERRUPTED
from .gpu_report import summary, table
from .gpu_timing import check, model_row, operator_row, operator_work, training_row
from .machine import machine
from .results import Result, replacing, write_json
from .specs import LAYOUTS, OPERATORS, ModelCase, OperatorCase
from .work import MEMORY_FORMATS

ROOT = Path(__file__).resolve().parents[1]
BENCH_BATCH = 128
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


def build_steps(session: Session) -> Iterator[Step]:
    yield Step("info", lambda: {"passed": True, "info": ffnet_kernels.info()})


def selftest_steps(session: Session) -> Iterator[Step]:
    for name, (operator, args) in selftest_work().items():
        check_it = functools.partial(_check_on, session.device, operator, args)
        yield Step(name, check_it, [functools.partial(start_selftest_case, name)])


@functools.cache
def selftest_work() -> dict[str, tuple[str, tuple]]:
    """The cases of ``ffnet_kernels.selftest`` in both layouts, one of its filters in the narrow dtypes too."""
    found = {}
    for (name, operator, args), layout in itertools.product(selftest_cases(), LAYOUTS):
        args = (args[0].contiguous(memory_format=MEMORY_FORMATS[layout]), *args[1:])
        for dtype in ("float32", "bfloat16", "float16") if " k=7 " in name else ("float32",):
            found[f"{name} {dtype} {layout}"] = operator, _moved(args, dtype=getattr(torch, dtype))
    return found


def start_selftest_case(name: str) -> None:
    """Its kernels, forward and backward, without data."""
    operator, args = selftest_work()[name]
    args = _moved(args, device="meta")
    spec = next(o for o in ffnet_kernels.operators.OPERATORS if o.name == operator)
    for backward in (False, True):
        result = ffnet_kernels.operators.empty_output(*spec.infer(*args))
        tune.start(operator, result, args, backward=backward)


def _moved(args: tuple, **to: Any) -> tuple:
    return tuple(a.to(**to) if isinstance(a, Tensor) else a for a in args)


def _check_on(device: torch.device, operator: str, args: tuple) -> dict[str, Any]:
    return check(operator, _moved(args, device=device))


def parity_cases() -> list[OperatorCase]:
    """Every stage, those that draw the same random numbers one after the other."""
    return [
        OperatorCase(operator, batch, channels, size, kernel, layout, str(dtype).removeprefix("torch."))
        for batch, (channels, size, kernel), operator, dtype, layout in itertools.product(
            (8, 128), tune.STAGES, OPERATORS, tune.DTYPES, LAYOUTS
        )
    ]


def parity_steps(session: Session) -> Iterator[Step]:
    for case in parity_cases():
        jobs = [job for backward in (False, True) for job in _jobs(case, backward, session)]
        yield Step(case.name, functools.partial(check_parity, case, session.device), jobs)


def _jobs(case: OperatorCase, backward: bool, session: Session) -> list[Callable[[], object]]:
    """Compile what the case launches with the tiles that it will get on this GPU."""
    dtype, last = getattr(torch, case.dtype), case.layout == "channels_last"
    call = tune.Call(case.operator, case.batch, case.channels, case.size, case.kernel, dtype, last, backward)
    winners = configs.winners(configs.device_name(session.device))
    return [functools.partial(tune.with_tiles, winners, call.start)]


def check_parity(case: OperatorCase, device: torch.device) -> dict[str, Any]:
    work = operator_work(case, device)
    return check(case.operator, work.plain(case.layout).inputs[0])


def bench_steps(session: Session) -> Iterator[Step]:
    for (channels, size, kernel), backward, operator in itertools.product(tune.STAGES, (False, True), OPERATORS):
        case = OperatorCase(operator, BENCH_BATCH, channels, size, kernel, dtype="bfloat16")
        run = functools.partial(_plain_row, operator_row, case, session, backward=backward)
        both = [replace(case, layout=layout) for layout in LAYOUTS]
        jobs = [job for one in both for way in {False, backward} for job in _jobs(one, way, session)]
        yield Step(f"{case.name} {'backward' if backward else 'forward'}", run, jobs)
    yield Step(f"{MODEL.name} inference", functools.partial(_plain_row, model_row, MODEL, session))
    yield Step(f"{MODEL.name} training step", functools.partial(_plain_row, training_row, MODEL, session))


def _plain_row(measure: Callable, case: Any, session: Session, **options: Any) -> dict[str, Any]:
    row = measure(case, session.device, session.clock, **options)
    plain = json.loads(Result({}, [row]).to_json())["rows"][0]
    return {"passed": row.measurements[0].passed, "row": plain}


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
    "selftest": selftest_steps,
    "parity": parity_steps,
    "bench": bench_steps,
    "tune": tune_steps,
}


def run_part(name: str, session: Session, path: Path, header: dict[str, Any], text: str = "") -> list[str]:
    """Runs the steps with ``text`` in their names that are not in the file yet, each row written at once.

    Returns:
        The names of the steps that are left because time is up.
    """
    record = read_part(path, header)
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
            verdict = "ok" if row["passed"] else "FAIL"
            print(f"{name}: {verdict:4} {step.name} ({time.monotonic() - begun:.1f} s)", flush=True)
        tune.check_alive(session.device)
        _free(session.device)
    return [step.name for step in pending if step.name in left]


def _attempt(step: Step, device: torch.device) -> dict[str, Any] | None:
    try:
        row = step.run()
        if row is not None:
            tune.check_alive(device)
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
    for package in ("ffnet_kernels", "ffnet", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return {"device": tune.device_line(device), "source": digest.hexdigest()[:12], **machine(), **tune.versions()}


def merged(folder: Path, header: dict[str, Any], device: torch.device) -> Result:
    """All parts as one result: the rows of ``bench``, and what the others found in ``extra``."""
    records = {name: read_part(folder / f"{name}.json", header) for name in PARTS}
    parts = {name: {"left": record.get("left"), "rows": record["rows"]} for name, record in records.items()}
    rows = [row["row"] for row in parts["bench"]["rows"].values() if "row" in row]
    parts["bench"]["rows"] = {name: row for name, row in parts["bench"]["rows"].items() if "row" not in row}
    winners = tune.read(configs._TUNED / f"{configs.device_name(device)}.json")
    interrupted = any(part["left"] != [] for part in parts.values())
    plain = {"format": 1, "machine": header, "rows": rows, "interrupted": interrupted}
    return Result.from_json(json.dumps({**plain, "extra": {"parts": parts, "tuned": winners}}))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something failed, 2 where there is no GPU, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no GPU", file=sys.stderr)
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
        except (tune.DeviceLostError, KeyboardInterrupt) as event:
            ended = event
    if isinstance(ended, tune.DeviceLostError):
        _restart(options, deadline - time.monotonic(), ended)
    result = merged(options.work, header, device)
    path = options.out / f"gpu-{configs.device_name(device)}.json"
    write_json(result, path)
    text, failed = summary(result, left)
    print(f"\n{text}\nwrote {path}\n\n{table(result)}")
    return INTERRUPTED if ended else int(failed)


def _restart(options: argparse.Namespace, seconds: float, error: Exception) -> None:
    """Goes on in a new process: in this one the GPU is lost. What is done is in the files."""
    print(f"benchmarks.gpu: starting again after {error}", flush=True)
    arguments = ["--budget", f"{max(0.0, seconds):.0f}", "--work", options.work, "--out", options.out]
    arguments += ["--filter", options.filter, *(word for name in options.only for word in ("--only", name))]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
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


if __name__ == "__main__":
    sys.exit(main())
