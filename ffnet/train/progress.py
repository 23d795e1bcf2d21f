"""Progress of a run: a line on the screen, records in a file, one per line, and TensorBoard on request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Progress", "duration"]

RECORDS = "metrics.jsonl"
SMOOTHING = 0.7  # smoothing of the speed that the remaining time is computed from


class Progress:
    """Reports speed, loss, learning rate and remaining time of a run; only on the first rank.

    Args:
        folder: Folder of ``metrics.jsonl``; records of steps after ``start``, left by a killed process, are removed.
        total: Steps of the run.
        start: The step at which this process starts.
        active: Whether this rank reports.
        tensorboard: Whether to write TensorBoard events, too.

    Raises:
        ImportError: If TensorBoard is needed but not installed.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        start: int,
        *,
        active: bool,
        tensorboard: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.active, self.stream = total, active, sys.stdout if stream is None else stream
        self.is_terminal, self.is_open = self.stream.isatty(), False
        self.step, self.speed = start, 0.0
        self.begin = self.last = time.perf_counter()
        self.writer: Any = None
        if not active:
            return
        self.path = folder / RECORDS
        _cut(self.path, start)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("--tensorboard needs the tensorboard package, which is not installed") from error
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def start(self) -> None:
        """Marks the start of the first step, from which speed is measured."""
        self.last = time.perf_counter()

    def show(self, step: int, epoch: float, loss: float, rate: float, images: int) -> None:
        """Reports the state after ``step`` steps; ``images`` were trained on since the last call."""
        now = time.perf_counter()
        steps_per_second = (step - self.step) / max(now - self.last, 1e-9)
        self.speed = SMOOTHING * self.speed + (1 - SMOOTHING) * steps_per_second if self.speed else steps_per_second
        images_per_second = images / max(now - self.last, 1e-9)
        self.step, self.last = step, now
        if not self.active:
            return
        line = (
            f"epoch {epoch:.2f}  step {step}/{self.total}  loss {loss:.4f}  lr {rate:.2e}  "
            f"{images_per_second:.1f} images/s  ETA {duration((self.total - step) / self.speed)}"
        )
        if self.is_terminal:
            self.stream.write(f"\r\033[K{line}")
            self.is_open = True
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()
        self.record(step, loss=loss, lr=rate, images_per_second=images_per_second)

    def record(self, step: int, **values: float) -> None:
        """Appends a record to the file, with the seconds since this process started."""
        if not self.active:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "seconds": time.perf_counter() - self.begin, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if self.active:
            self.stream.write(f"{chr(10) if self.is_open else ''}{text}\n")
            self.stream.flush()
            self.is_open = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context for other work than training, which does not count towards its speed."""
        begin = time.perf_counter()
        yield
        self.last += time.perf_counter() - begin

    def close(self) -> None:
        if self.is_open:
            self.stream.write("\n")
        if self.writer is not None:
            self.writer.close()


def duration(seconds: float) -> str:
    """Formats seconds, such as 0:42, 12:05, 3:07:00, 2d 03:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _cut(path: Path, start: int) -> None:
    """Truncates the file to records of steps up to ``start``; a killed process may have left more, and half a line."""
    kept = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)
