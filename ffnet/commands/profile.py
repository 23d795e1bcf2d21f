"""``ffnet profile``: where a model spends its time, plain and on the operators."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import CommandError, add_model_options, input_size_of, model_from, new_file, require_place

SHOWN = 12
WIDTH = 44


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("profile", help="latency of a model, plain and on the operators, and what takes it")
    add_model_options(parser, None, trained=False)
    parser.add_argument("--size", type=int, metavar="S", help="side of the model's input; default: the model's own")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images in a call (default 1)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="calls that are measured (default 20)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's own choice")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="writes the operators' run as a Chrome trace (.json)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    import ffnet_kernels

    from ..profile import count_macs, count_parameters

    for name in ("size", "batch", "runs", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise CommandError(f"expected --{name} of 1 or more, got {getattr(options, name)}")
    if options.trace is not None:
        require_place(options.trace)
    model = model_from(options, None)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    size = input_size_of(model, options.size)
    x = torch.randn(options.batch, *size, generator=torch.Generator().manual_seed(0))
    try:
        macs = count_macs(model, size) * options.batch / 1e9
        with torch.inference_mode():
            plain = milliseconds(lambda: model(x), options.runs)
            ffnet_kernels.optimize(model)
            optimised = milliseconds(lambda: model(x), options.runs)
            profile = _profiled(lambda: model(x), options.runs)
    except RuntimeError as error:
        raise CommandError(f"cannot run {options.model}: {str(error).splitlines()[0]}") from error
    print(
        f"{options.model}, {options.batch} x {'x'.join(map(str, size))}, {torch.get_num_threads()} threads: "
        f"{count_parameters(model):,} parameters, {macs:.3f} G multiply-adds"
    )
    for name, times in (("plain PyTorch", plain), ("on the operators", optimised)):
        median = statistics.median(times)
        print(f"{name:18} median {median:9.3f} ms, best {min(times):9.3f} ms, {macs / median * 1e3:8.1f} G/s")
    print(f"\n{'on the operators':{WIDTH}} {'calls':>8} {'ms':>9} {'share':>7}")
    rows = sorted(profile.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:SHOWN]:
        calls, spent = row.count / options.runs, row.self_cpu_time_total / options.runs / 1e3
        share = row.self_cpu_time_total / total
        print(f"{row.key[:WIDTH]:{WIDTH}} {calls:8.1f} {spent:9.3f} {share:7.1%}")
    if options.trace is not None:
        _write_trace(profile, options.trace)
    return 0


def milliseconds(call: Callable[[], Any], runs: int) -> list[float]:
    """Times so many calls, after some warm-up calls."""
    for _ in range(2 + runs // 10):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _profiled(call: Callable[[], Any], runs: int) -> Any:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(runs):
            call()
    return found


def _write_trace(profile: Any, path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "trace.json")
        profile.export_chrome_trace(str(whole))
        with new_file(path) as file:
            file.write(whole.read_bytes())
    print(f"\nwrote {path}: open it in a viewer of Chrome traces")
