"""Sources of labelled images: folders of classes, tar shards, scikit-learn's digits."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..preprocess import load_image

__all__ = ["Data", "Digits", "Folder", "Shards", "Source", "open_data", "open_source"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
VALIDATION = ("val", "validation", "test")
HELD_OUT = 5  # every fifth digit is held out


class Source(Protocol):
    """Labelled images by number.

    Attributes:
        classes: Names of the classes, or None if the data only has numbers.
        labels: Of every image, int64.
        problems: Messages about data that could not be used, found on opening.
    """

    classes: list[str] | None
    labels: np.ndarray
    problems: list[str]

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def image(self, index: int) -> Image.Image:
        """Reads an image as RGB; raises OSError if it cannot be read."""
        ...


class Data(NamedTuple):
    """The two parts of a data set and the number of its classes."""

    train: Source
    val: Source
    classes: int


class Folder:
    """``root/<class>/**/<image>``: classes are numbered in the order of their names, as in torchvision.

    Raises:
        ValueError: If a class has no image.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.classes: list[str] | None = list(classes or found)
        self.root = root
        self.problems: list[str] = []
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ValueError(f"{root} has classes that the training part lacks: {_some(unknown)}")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(_images_below(root / name)) if name in found else []
            if not files and name in found:
                raise ValueError(f"no image in {root / name}: expected files ending in {', '.join(EXTENSIONS)}")
            names += [os.fsencode(os.path.relpath(file, root)) for file in files]
            labels += [label] * len(files)
        if not labels:
            raise ValueError(f"no image below {root}")
        # Arrays, because reference counts would make data workers copy lists of objects.
        self.names, self.labels = np.array(names), np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))

    def image(self, index: int) -> Image.Image:
        return load_image(self.name(index))


class Shards:
    """Tar files in the layout of WebDataset: files of one stem are a sample, ``<stem>.jpg`` and ``<stem>.cls``.

    ``.cls`` holds the number of the class as text. The headers are read once, when it is opened; images are then read
    at random. A truncated shard yields the samples before its end.

    Raises:
        ValueError: If there are no samples, or a shard is compressed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.classes: list[str] | None = None
        self.problems: list[str] = []
        self.stems: np.ndarray
        places, labels, stems = [], [], []
        for shard, path in enumerate(self.files):
            for stem, parts in self._members(path).items():
                picture = next((parts[e] for e in EXTENSIONS if e in parts), None)
                if picture is None or ".cls" not in parts:
                    self.problems.append(f"{path}: sample {stem} lacks its {'.cls' if picture else 'image'}")
                    continue
                try:
                    label = int(_read(path, *parts[".cls"]))
                except ValueError:
                    self.problems.append(f"{path}: sample {stem} has no number in its .cls")
                    continue
                places.append((shard, *picture))
                labels.append(label)
                stems.append(stem.encode())
        if not places:
            raise ValueError(
                f"no sample in {_some([str(f) for f in files])}: expected pairs of <stem>.jpg and <stem>.cls"
            )
        self.places, self.stems = np.array(places, dtype=np.int64), np.array(stems)
        self.labels = np.array(labels, dtype=np.int64)
        if self.labels.min() < 0:
            raise ValueError(f"{self.files[0].parent}: expected classes from 0 on, got {self.labels.min()}")

    def _members(self, path: Path) -> dict[str, dict[str, tuple[int, int]]]:
        """Offset and size of each file in a shard, by stem and suffix."""
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    place = (member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f".{suffix.lower()}"] = place
                if tar.offset + tarfile.BLOCKSIZE > size:  # truncated between two files or in a header
                    raise tarfile.ReadError("it has no end mark")
        except tarfile.TarError as error:
            if not samples:
                raise ValueError(f"{path} is no readable, uncompressed tar file: {error}") from error
            self.problems.append(f"{path} is damaged after {len(samples)} samples: {error}")
        return samples

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.files[self.places[index, 0]]}:{self.stems[index].item().decode()}"

    def image(self, index: int) -> Image.Image:
        shard, offset, size = self.places[index].tolist()
        return load_image(io.BytesIO(_read(self.files[shard], offset, size)))


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels. Every fifth is held out."""

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the data set 'digits' comes with scikit-learn, which is not installed") from error
        bunch = load_digits()
        kept = (np.arange(len(bunch.target)) % HELD_OUT != 0) == train
        self.pixels = np.rint(bunch.images[kept] * (255 / 16)).astype(np.uint8)
        self.labels = bunch.target[kept].astype(np.int64)
        self.classes: list[str] | None = [str(digit) for digit in range(10)]
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digits:{index}"

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")


def open_source(path: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Source:
    """Opens one part of a data set: a folder of class folders, a folder of shards, or a pattern such as
    ``d/train-*.tar``.

    Raises:
        FileNotFoundError: If nothing is found.
        ValueError: If it has neither layout.
    """
    path = Path(path)
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise FileNotFoundError(f"no file matches {path}")
        return Shards(files)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    shards = sorted(path.glob("*.tar"))
    if shards:
        return Shards(shards)
    entries = sorted(os.listdir(path))
    if not any((path / entry).is_dir() for entry in entries):
        raise ValueError(f"{path}: expected a folder for each class, or .tar shards, got {_some(entries) or 'nothing'}")
    return Folder(path, classes)


def open_data(data: str, val: str | None = None) -> Data:
    """Opens both parts of a data set.

    Args:
        data: ``digits``, a folder with ``train`` and ``val`` (or ``validation``, ``test``) in it, or, if ``val`` is
            given, the training part itself.
        val: The held-out part, if it is elsewhere.

    Raises:
        FileNotFoundError, ValueError: If something is missing or has another layout, with what was expected.
    """
    if data == "digits":
        return Data(Digits(train=True), Digits(train=False), 10)
    root = Path(data)
    if not root.is_dir() and "*" not in root.name:
        raise FileNotFoundError(f"no folder {root}; built-in data: digits")
    train_path = root / "train" if (root / "train").is_dir() else root
    val_path = Path(val) if val else next((root / name for name in VALIDATION if (root / name).is_dir()), None)
    if val_path is None or (train_path is root and not val):
        raise ValueError(
            f"{root}: expected folders train and val (or {', '.join(VALIDATION[1:])}), or --val, "
            f"got {_some(sorted(os.listdir(root))) or 'nothing'}"
        )
    train = open_source(train_path)
    held_out = open_source(val_path, train.classes)
    known = len(train.classes) if train.classes else int(train.labels.max()) + 1
    if held_out.labels.max() >= known:
        raise ValueError(f"{val_path} has class {held_out.labels.max()}, the training part only 0 to {known - 1}")
    return Data(train, held_out, known)


def _images_below(folder: Path) -> list[str]:
    return [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    ]


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _some(names: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
