"""Finds the fastest tile of each kernel on this GPU: ``python -m ffnet_kernels tune``.

The operators are timed at FFNet's shapes with every tile that ``configs`` lets a kernel choose from. The winners go to
``tuned/<device>.json``, where ``configs.choose`` looks them up; nothing is ever measured in a user's call.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops._operator import OPERATORS
from .. import triton as backend
from . import configs
from .launch import INTERPRETED, options, recording

#: Channels, height and width, and filter of the token mixer: the stages of FFNet-1, and a map that is no power of two.
STAGES = ((320, 16, 7), (640, 8, 7), (80, 64, 3), (160, 32, 3), (384, 24, 7))
BATCHES = (128, 8, 1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXPANSION = 3
WARM_UP, SAMPLES = 3, 21

#: Milliseconds that a function takes.
Clock = Callable[[Callable[[], object]], float]


class DeviceLostError(RuntimeError):
    """The GPU had a fault, after which nothing runs on it in this process; the message says which."""


class Call(NamedTuple):
    """A call of an operator on a map [batch, channels, size, size], or the backward pass of one."""

    operator: str
    batch: int
    channels: int
    size: int
    kernel: int
    dtype: torch.dtype
    channels_last: bool
    backward: bool

    def tensors(self, device: torch.device | str) -> tuple[Tensor, tuple]:
        """The output or its gradient, and the arguments as the schema has them: all biases, a residual, GELU."""

        def values(*shape: int, fan_in: int = 1) -> Tensor:
            return torch.randn(shape, dtype=self.dtype, device=device) / fan_in**0.5

        def new_map() -> Tensor:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            return values(self.batch, channels, self.size, self.size).contiguous(memory_format=layout)

        def filters() -> tuple[Tensor, Tensor]:
            return values(channels, 1, self.kernel, self.kernel, fan_in=self.kernel**2), values(channels)

        channels, hidden = self.channels, EXPANSION * self.channels
        if self.operator == "depthwise_conv2d":
            top, left = self.kernel // 2, self.kernel // 2
            return new_map(), (new_map(), *filters(), (1, 1), (top, top, left, left), "gelu")
        if self.operator == "ffnified_attention":
            return new_map(), (new_map(), *filters(), *filters(), "gelu", None, new_map())
        expand = values(hidden, channels, fan_in=channels), values(hidden)
        project = values(channels, hidden, fan_in=hidden), values(channels)
        return new_map(), (new_map(), *filters(), *expand, *project, "gelu", None, new_map())

    def start(self, device: torch.device | str = "meta") -> None:
        """Makes the tensors and launches the kernels on them, as a job for :class:`Compiler`."""
        start(self.operator, *self.tensors(device), backward=self.backward)


def start(operator: str, result: Tensor, args: tuple, *, backward: bool) -> None:
    """Launches the kernels of a call into ``result``, or those of all gradients, with ``result`` as the incoming
    gradient."""
    spec = OPERATORS[operator]
    if not backward:
        backend.run_forward(spec, result, args)
        return
    mask = [isinstance(args[i], Tensor) and i != spec.residual for i in spec.tensors]
    backend.run_backward(spec, (result, *args, mask))


def calls(quick: bool = False) -> list[Call]:
    """Every call that is tuned, the most important ones first; ``quick``: bfloat16 and the largest batch only."""
    dtypes, batches = (DTYPES[:1], BATCHES[:1]) if quick else (DTYPES, BATCHES)
    return [
        Call(name, batch, channels, size, kernel, dtype, last, backward)
        for dtype, batch, (channels, size, kernel), name, last, backward in itertools.product(
            dtypes, batches, STAGES, backend.OPERATORS, (True, False), (False, True)
        )
    ]


class Choice(NamedTuple):
    """The tiles among which a key of the winners chooses, and the first call that asks for it."""

    call: Call
    tiles: list


def choices(asking: Iterable[Call]) -> dict[str, Choice]:
    """The choices that these calls involve; the calls are run without data."""
    found: dict[str, Choice] = {}

    def note(call: Call, shape: Any, tiles: list) -> Any:
        if len(tiles) > 1:
            found.setdefault(shape.key(), Choice(call, tiles))
        return tiles[0]

    for call in asking:
        with recording(), configs.choosing(functools.partial(note, call)):
            call.start()
    return found


def with_tiles(tiles: Mapping[str, Sequence[int]], function: Callable[[], object]) -> None:
    """Runs a function with these tiles for their keys and the rule's tiles for all others."""

    def choose(shape: Any, allowed: list) -> Any:
        wanted = tuple(tiles.get(shape.key(), ()))
        return next((tile for tile in allowed if tile == wanted), allowed[0])

    with configs.choosing(choose):
        function()


class Compiler:
    """Compiles kernels before their first launch, in processes beside this one, into Triton's cache on disk.

    A job is a picklable function that starts kernels on tensors of the device ``meta``. Interpreted kernels need no
    compiling.
    """

    def __init__(self) -> None:
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        context = multiprocessing.get_context("spawn")  # a process that has used the GPU must not be forked
        self._pool = None if INTERPRETED else concurrent.futures.ProcessPoolExecutor(workers, context)

    def __call__(self, jobs: Iterable[Callable[[], object]], deadline: float = math.inf) -> list[str]:
        """Compiles what the jobs would launch, up to a deadline of ``time.monotonic()``; returns what went wrong."""
        if self._pool is None:
            return []
        try:
            futures = [self._pool.submit(_compile, job) for job in jobs]
        except concurrent.futures.BrokenExecutor as error:  # a process died: from now on kernels compile when they run
            return [describe(error)]
        timeout = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        done, late = concurrent.futures.wait(futures, timeout)
        for future in late:
            future.cancel()
        errors = [[describe(e)] if (e := future.exception()) else future.result() for future in done]
        return sorted({text for texts in errors for text in texts})

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _compile(job: Callable[[], object]) -> list[str]:
    with recording() as launches:
        job()
    errors = []
    for launch in launches:
        try:
            chosen = options(launch.warps, launch.stages, nvidia=torch.version.cuda is not None)
            launch.kernel.warmup(grid=(launch.grid,), **launch.arguments, **chosen)
        except Exception as error:  # the kernel's first launch raises it again
            errors.append(f"{launch}: {describe(error)}")
    return errors


class ColdClock:
    """Measures the GPU time of a call with cold caches, in milliseconds.

    Before each call a buffer larger than any L2 cache is read, and the GPU then spins for as long as the host needs to
    queue the call: so neither warm caches nor the speed of Python are measured.
    """

    BYTES = 256 << 20
    LONGEST = 0.05
    CYCLES_A_SECOND = 2e9  # no GPU's clock is much faster

    def __init__(self, device: torch.device) -> None:
        self._device, self._wait = device, 2e-4
        self._buffer = torch.ones(self.BYTES // 4, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function: Callable[[], object]) -> float:
        with torch.cuda.device(self._device):
            for _ in range(3):
                self._buffer.sum()
                torch.cuda._sleep(int(self._wait * self.CYCLES_A_SECOND))
                self._start.record()
                begun = time.perf_counter()
                function()
                queueing = time.perf_counter() - begun
                self._end.record()
                self._end.synchronize()
                covered = queueing <= self._wait
                self._wait = min(self.LONGEST, max(1.5 * queueing, 0.8 * self._wait))
                if covered:
                    break
        return self._start.elapsed_time(self._end)


def tune(
    device: torch.device, folder: Path | None, asking: Iterable[Call], clock: Clock, *,
    again: bool = False, deadline: float = math.inf, report: Callable[[str], object] = print,
) -> int:  # fmt: skip
    """Measures whatever the folder's file for this device lacks, and writes it there key by key.

    Args:
        folder: by default the one from which ``configs`` reads.
        asking: the calls whose choices are measured.
        again: measure again what is there already.
        deadline: a ``time.monotonic()`` value after which no further key is started.
        report: gets a line a key.

    Returns:
        How many keys are left.

    Raises:
        DeviceLostError: if a tile crashed the GPU; the file records it, and the next run skips that tile.
    """
    path = (folder or configs._TUNED) / f"{configs.device_name(device)}.json"
    header = {"device": device_line(device), **versions(), "date": datetime.date.today().isoformat()}
    table = {**header, **read(path), **header}
    left = {key: choice for key, choice in choices(asking).items() if again or key not in table["medians"]}
    keys, together = list(left), 4 * len(os.sched_getaffinity(0))
    try:
        with Compiler() as compiler:
            for index, key in enumerate(keys):
                if index % together == 0:
                    compiler(_jobs(left, keys[index : index + together], table["winners"]), deadline)
                if time.monotonic() >= deadline:
                    break
                _tune_key(key, left[key], table, path, device, clock, report)
                del left[key]
    finally:
        configs.winners.cache_clear()
    return len(left)


def _jobs(left: Mapping[str, Choice], keys: Sequence[str], winners: dict) -> list[Callable[[], object]]:
    tiles = [(left[key].call, {**winners, key: tile}) for key in keys for tile in left[key].tiles]
    return [functools.partial(with_tiles, chosen, call.start) for call, chosen in tiles]


def _tune_key(key: str, choice: Choice, table: dict, path: Path, device: torch.device, clock: Clock, report) -> None:
    found: dict[Any, float | str] = {}
    try:
        _measure(key, choice, table["winners"], device, clock, found)
    except DeviceLostError:
        _record(key, found, table, path, report)  # so that the next run skips it
        raise
    _record(key, found, table, path, report)


def _measure(key: str, choice: Choice, winners: dict, device: torch.device, clock: Clock, found: dict) -> None:
    """Fills ``found``: the median of each tile, taken in turn, or why it does not run."""
    call, samples = choice.call, {tile: [] for tile in choice.tiles}  # type: ignore[var-annotated]
    result, args = call.tensors(device)
    run = functools.partial(start, call.operator, result, args, backward=call.backward)
    for turn, tile in itertools.product(range(WARM_UP + SAMPLES), choice.tiles):
        if tile in found:
            continue
        try:
            ms = clock(functools.partial(with_tiles, {**winners, key: tile}, run))
            samples[tile] += [ms] if turn >= WARM_UP else []
        except Exception as error:  # compilers and drivers may raise anything
            found[tile] = describe(error)
            check_alive(device)
    found.update({tile: round(statistics.median(ms), 6) for tile, ms in samples.items() if tile not in found})


def _record(key: str, found: dict, table: dict, path: Path, report: Callable[[str], object]) -> None:
    """Into the table and its file."""
    times = {tile: ms for tile, ms in found.items() if not isinstance(ms, str)}
    table["winners"].pop(key, None)
    if times:
        best = min(times, key=lambda tile: times[tile])
        table["winners"][key] = list(best)
        report(f"{key}: {best}: {times[best]:.4f} ms, of {', '.join(f'{ms:.4f}' for ms in times.values())}")
    table["medians"][key] = {" ".join(map(str, tile)): ms for tile, ms in found.items()}
    for tile, error in found.items():
        if isinstance(error, str):
            report(f"{key}: {tile} does not run: {error.splitlines()[0]}")
    write(path, table)


def read(path: Path) -> dict[str, Any]:
    """The file of a device, or an empty one: winners, and the medians of all tiles or why one does not run."""
    return json.loads(path.read_text()) if path.exists() else {"winners": {}, "medians": {}}


def write(path: Path, table: dict[str, Any]) -> None:
    """Atomically: readers never see a partial file, even after an interruption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.json")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary, path)


def check_alive(device: torch.device) -> None:
    """Raises DeviceLostError if a fault has left the GPU unusable in this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise DeviceLostError(describe(error)) from error


def describe(error: BaseException) -> str:
    """Type and text of an error, the middle of a long one left out: compilers say what is wrong last."""
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 1200 else f"{text[:400]} [...] {text[-800:]}"


def device_line(device: torch.device) -> str:
    """The GPU in one line."""
    if device.type != "cuda":
        return str(device)
    gpu = torch.cuda.get_device_properties(device)
    return (
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 2**30:.0f} GiB"
    )


def versions() -> dict[str, str]:
    """Of torch, of its CUDA, and of Triton."""
    import triton

    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none", "triton": triton.__version__}
