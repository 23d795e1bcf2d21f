"""Checkpoints of a run: atomic, verified before use; the most recent ones and the best are kept.

A checkpoint is a folder ``step-000000123`` of PyTorch's distributed checkpoint with a manifest. It is written under
another name, synchronised to the disk and then renamed, so that a process can be killed at any moment. The manifest has
the length and the CRC-32 of every file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from .distributed import Ranks

__all__ = ["CheckpointStore", "DamagedCheckpoint", "write_atomically"]

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d+)$")
WRITING, REMOVING = ".writing", ".removing"
VERSION = 1
CHUNK = 1 << 24


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are not those written."""


class CheckpointStore:
    """The checkpoints below ``root``, on a file system that all ranks share.

    Args:
        root: Created if it does not exist.
        ranks: The processes that read and write together.
        keep: How many of the most recent ones are kept besides the best.
    """

    def __init__(self, root: str | os.PathLike[str], ranks: Ranks, keep: int) -> None:
        self.root, self.ranks, self.keep = Path(root), ranks, keep
        if ranks.is_first:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.root.glob(f"step-*{WRITING}"), *self.root.glob(f"step-*{REMOVING}")]:
                shutil.rmtree(leftover)
        ranks.barrier()

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, damaged or not."""
        return sorted(int(match[1]) for entry in os.scandir(self.root) if (match := NAME.match(entry.name)))

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes those no longer to be kept.

        Args:
            step: Names it; one of the same name is replaced.
            tensors: State dicts, of DTensors where the model is sharded.
            facts: JSON data, the same on every rank; ``metric``, unless None, determines the best one.
        """
        final = self._folder(step)
        temporary = final.with_name(final.name + WRITING)
        with _quiet():
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=self.ranks.world == 1)
        own = temporary.glob(f"__{self.ranks.rank}_*")
        sums = self.ranks.gather({file.name: _checksum(file) for file in own})
        if self.ranks.is_first:
            files = {name: value for part in sums for name, value in part.items()}
            files[".metadata"] = _checksum(temporary / ".metadata")
            content = {"version": VERSION, "step": step, "facts": facts, "files": files}
            manifest = {"crc": _crc_of(content), "content": content}
            _write_through(temporary / MANIFEST, json.dumps(manifest).encode())
            _sync_folder(temporary)
            if final.exists():
                self._remove(step)
            os.rename(temporary, final)
            _sync_folder(self.root)
            self._remove_old()
        self.ranks.barrier()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and facts of the most recent intact checkpoint, or None; reports which ones are damaged, and how.

        Raises:
            DamagedCheckpoint: If there are checkpoints, but no intact one.
        """
        found: Any = None
        if self.ranks.is_first:
            found = self._newest()
        found = self.ranks.from_first(found)
        if isinstance(found, str):
            raise DamagedCheckpoint(found)
        return found

    def _newest(self) -> tuple[int, dict[str, Any]] | str | None:
        reason = None
        for step in reversed(self.steps()):
            try:
                return step, self.verify(step)
            except DamagedCheckpoint as error:
                reason = f"{self._folder(step)} is damaged ({error})"
                print(f"ffnet train: {reason}; trying the one before", file=sys.stderr)
        return reason and f"no checkpoint in {self.root} is whole; of the oldest: {reason}"

    def verify(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint, once all of its files have been verified.

        Raises:
            DamagedCheckpoint: If a file is damaged, with its name.
        """
        folder = self._folder(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            content = manifest["content"]
            if manifest["crc"] != _crc_of(content):
                raise ValueError("its checksum differs")
            if content["version"] != VERSION or content["step"] != step:
                raise ValueError(f"it is of step {content['step']}, version {content['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{MANIFEST}: {error}") from error
        for name, (size, crc) in content["files"].items():
            file = folder / name
            if not file.is_file():
                raise DamagedCheckpoint(f"{name} is missing")
            if file.stat().st_size != size:
                raise DamagedCheckpoint(f"{name}: expected {size} bytes, got {file.stat().st_size}")
            if _checksum(file)[1] != crc:
                raise DamagedCheckpoint(f"{name}: its checksum differs")
        return content["facts"]

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Reads a checkpoint into the tensors of state dicts, in place, on any number of ranks.

        Raises:
            ValueError: If it holds other tensors, as of another model.
        """
        reader = dcp.FileSystemReader(self._folder(step))
        stored = reader.read_metadata()
        _require_same(self._folder(step), stored, tensors)
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=self.ranks.world == 1)

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:09d}"

    def _remove(self, step: int) -> None:
        # A folder that is being deleted file by file would look like a damaged checkpoint.
        folder = self._folder(step)
        doomed = folder.with_name(folder.name + REMOVING)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)

    def _remove_old(self) -> None:
        steps = self.steps()
        metrics = {step: metric for step in steps if (metric := self._metric(step)) is not None}
        best = {max(metrics, key=lambda step: (metrics[step], -step))} if metrics else set()
        for step in set(steps) - set(steps[-self.keep :]) - best:
            self._remove(step)

    def _metric(self, step: int) -> float | None:
        try:
            return json.loads((self._folder(step) / MANIFEST).read_bytes())["content"]["facts"].get("metric")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # a damaged one


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` that replaces the file atomically."""
    temporary = path.with_name(path.name + WRITING)
    torch.save(content, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses PyTorch's warning that there is only one process, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _require_same(folder: Path, stored: Metadata, tensors: dict[str, Any]) -> None:
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    expected = {name: value.shape for name, value in flatten_state_dict(tensors)[0].items() if hasattr(value, "shape")}
    found = {name: value.size for name, value in stored.state_dict_metadata.items() if hasattr(value, "size")}
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        name = differing[0]
        got = list(found[name]) if name in found else "nothing"
        raise ValueError(
            f"{folder} is another model's checkpoint: {len(differing)} tensors differ; {name}: expected "
            f"{list(expected[name])}, got {got}"
        )


def _checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
