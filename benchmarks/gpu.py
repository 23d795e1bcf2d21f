"""``python -m benchmarks.gpu`` (``make gpu``): everything there is to do on a GPU, in parts that can be resumed.

``build`` says what is installed and compiles the kernels, ``selftest`` checks them on small awkward shapes, ``parity``
at FFNet's own, ``bench`` times them beside their peers, ``tune`` measures their tiles. Each part keeps a JSON file with
a row a step; what is there for the same sources and GPU is not done again. All of it goes into one file of results.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ffnet_kernels
from ffnet_kernels.backends.triton import configs, tune
from ffnet_kernels.selftest import _cases as selftest_cases

from .gpu_report import summary, table
from .gpu_timing import check, model_row, operator_row, operator_work, training_row
from .machine import machine
from .results import Result, replacing, write_json
from .specs import LAYOUTS, OPERATORS, ModelCase, OperatorCase
from .work import MEMORY_FORMATS

ROOT = Path(__file__).resolve().parents[1]
BENCH_BATCH = 128
MODEL = ModelCase("ffnet_2", BENCH_BATCH, dtype="bfloat16")

#: A name, and what returns its row; None where the step was cut short and has to be done again.
Step = tuple[str, Callable[[], dict[str, Any] | None]]


@dataclass(frozen=True)
class Session:
    """Where and until when (``time.monotonic()``) the steps run."""

    device: torch.device
    deadline: float

    @functools.cached_property
    def clock(self) -> tune.Clock:
        return tune.ColdClock(self.device)


def build_steps(session: Session) -> Iterator[Step]:
    yield "info", lambda: {"passed": True, "info": ffnet_kernels.info()}
    yield "compile", lambda: compile_kernels(session)


def compile_kernels(session: Session) -> dict[str, Any] | None:
    """The kernels of the other parts, on all processors: one by one in their first calls it would take long."""
    begun = time.monotonic()
    winners = configs.winners(configs.device_name(session.device))
    calls = [_call(case, backward) for case in parity_cases() for backward in (False, True)]
    calls.sort(key=lambda call: call.batch)  # the same kernels at another batch are then found compiled
    jobs: list[Callable] = [functools.partial(start_selftest_case, name) for name in selftest_work()]
    jobs += [functools.partial(tune.with_tiles, winners, call.start) for call in calls]
    with tune.Compiler() as compiler:
        errors = compiler(jobs, session.deadline)
    if time.monotonic() >= session.deadline:
        return None
    return {"passed": not errors, "calls": len(jobs), "seconds": round(time.monotonic() - begun, 1), "errors": errors}


def _call(case: OperatorCase, backward: bool) -> tune.Call:
    dtype, last = getattr(torch, case.dtype), case.layout == "channels_last"
    return tune.Call(case.operator, case.batch, case.channels, case.size, case.kernel, dtype, last, backward)


def selftest_steps(session: Session) -> Iterator[Step]:
    for name, (operator, args) in selftest_work().items():
        yield name, functools.partial(_check_on, session.device, operator, args)


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
        yield case.name, functools.partial(check_parity, case, session.device)


def check_parity(case: OperatorCase, device: torch.device) -> dict[str, Any]:
    work = operator_work(case, device)
    return check(case.operator, work.plain(case.layout).inputs[0])


def bench_steps(session: Session) -> Iterator[Step]:
    for backward, (channels, size, kernel), operator in itertools.product((False, True), tune.STAGES, OPERATORS):
        case = OperatorCase(operator, BENCH_BATCH, channels, size, kernel, dtype="bfloat16")
        yield (
            f"{case.name} {'backward' if backward else 'forward'}",
            functools.partial(_plain_row, operator_row, case, session, backward=backward),
        )
    yield f"{MODEL.name} inference", functools.partial(_plain_row, model_row, MODEL, session)
    yield f"{MODEL.name} training step", functools.partial(_plain_row, training_row, MODEL, session)


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

    yield "tune", step


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
    left = {step_name: step for step_name, step in PARTS[name](session) if step_name not in record["rows"]}
    for step_name in [step_name for step_name in left if text in step_name]:
        if time.monotonic() >= session.deadline:
            break
        begun = time.monotonic()
        row = _attempt(left[step_name], session.device)
        if row is not None:
            record["rows"][step_name] = row
            del left[step_name]
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({**record, "left": list(left)}, indent=1, allow_nan=False) + "\n")
            verdict = "ok" if row["passed"] else "FAIL"
            print(f"{name}: {verdict:4} {step_name} ({time.monotonic() - begun:.1f} s)", flush=True)
        tune.check_alive(session.device)
        _free(session.device)
    return [step_name for step_name in left if text in step_name]


def _attempt(step: Callable[[], dict[str, Any] | None], device: torch.device) -> dict[str, Any] | None:
    try:
        row = step()
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
    """Returns 0; 1 where something failed, 2 where there is no GPU."""
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    session = Session(device, time.monotonic() + options.budget)
    names = options.only or list(PARTS)
    if options.again:
        for name in names:
            (options.work / f"{name}.json").unlink(missing_ok=True)
    header = header_of(device)
    left = {}
    try:
        for name in names:
            left[name] = run_part(name, session, options.work / f"{name}.json", header, options.filter)
    except tune.DeviceLostError as error:
        _restart(options, session.deadline - time.monotonic(), error)
    except KeyboardInterrupt:
        print("interrupted; the next run goes on")
    result = merged(options.work, header, device)
    path = options.out / f"gpu-{configs.device_name(device)}.json"
    write_json(result, path)
    text, failed = summary(result, left)
    print(f"\n{text}\nwrote {path}\n\n{table(result)}")
    return 1 if failed else 0


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
