"""Tile selection: a rule by shape and dtype, overridden by the winners measured on a GPU."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_TUNED = Path(__file__).parent / "tuned"


class RowTile(NamedTuple):
    """Tile of the depthwise kernels: a program holds ``rows`` tiles of ``block_w`` pixels × ``block_c`` channels."""

    block_w: int
    block_c: int
    rows: int
    warps: int

    def blocks(self) -> dict[str, int]:
        """As arguments of a kernel."""
        return {"BLOCK_W": self.block_w, "BLOCK_C": self.block_c, "ROWS": self.rows}

    def __str__(self) -> str:
        return f"{self.rows} rows × {self.block_w} pixels × {self.block_c} channels, {self.warps} warps"


class MatrixTile(NamedTuple):
    """Tile of the matrix products: ``block_p`` pixels × ``block_o`` outputs, ``block_k`` terms of the sum at a time."""

    block_p: int
    block_o: int
    block_k: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """As arguments of a kernel."""
        return {"BLOCK_P": self.block_p, "BLOCK_O": self.block_o, "BLOCK_K": self.block_k}

    def __str__(self) -> str:
        return f"{self.block_p} × {self.block_o} × {self.block_k}, {self.warps} warps, {self.stages} stages"


Tile = TypeVar("Tile", RowTile, MatrixTile)


class Shape(NamedTuple):
    """All that tile selection may depend on: the work of a kernel, in units of its output map."""

    kernel: str
    dtype: torch.dtype
    channels_last: bool
    images: int
    channels: int
    height: int
    width: int
    taps: int

    @classmethod
    def of(cls, kernel: str, x: Tensor, extent: Sequence[int], taps: int) -> Shape:
        """For maps like x with the output extent (N, C, H, W) and filters so many rows high."""
        images, channels, height, width = extent
        return cls(kernel, x.dtype, channels_innermost(x), images, channels, height, width, taps)

    def key(self) -> str:
        """Key of the winners. Extents are bucketed, so that a measurement serves neighbouring sizes, too."""
        layout = "channels_last" if self.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        taps = next((k for k in (3, 7, 15) if self.taps <= k), 31)
        extents = f"n{_power(self.images, 1, 64)}/c{_power(self.channels, 16, 1024)}"
        return f"{self.kernel}/{dtype}/{layout}/k{taps}/{extents}/w{_power(self.width, 8, 64)}"


def candidates(shape: Shape) -> list[RowTile]:
    """The tiles to try for a shape, the rule's choice first. None of them spills (see ``aot.py``).

    Values per thread and rows are as many as the registers hold. With the channels innermost a tile is 16 channels or
    more where it can be, which is a whole sector of memory; else it is as wide as the map, up to 64 pixels.
    """
    return _CANDIDATES[shape.kernel](shape)


def _depthwise(shape: Shape) -> list[RowTile]:
    rows = 8 if shape.height > 4 else 4
    if shape.channels_last:
        return [RowTile(16, 32, rows, 4), RowTile(16, 16, rows, 4)]
    return [_filled(_power(shape.width, 8, 64), rows, 2, 4), _filled(_power(shape.width, 8, 32), rows, 4, 4)]


def _depthwise_sum(shape: Shape) -> list[RowTile]:
    """Of two convolutions, the input gradient of a layer with two outputs per channel."""
    return [_filled(16 if shape.channels_last else _power(shape.width, 8, 64), 8 if shape.height > 4 else 4, 2, 4)]


def _depthwise_weight(shape: Shape) -> list[RowTile]:
    rows = 8 if shape.height > 4 else 4
    if shape.channels_last:
        return [RowTile(16, 16, rows, 4), RowTile(8, 32, rows, 4)]
    return [_filled(_power(shape.width, 8, 64), rows, 2, 8)]


def _depthwise_backward(shape: Shape) -> list[RowTile]:
    rows = 8 if shape.height > 4 else 4
    if shape.channels_last:
        return [RowTile(16, 32, rows, 8)]
    return [_filled(_power(shape.width, 8, 64), rows, 2, 8)]


def _attention(shape: Shape) -> list[RowTile]:
    """As high as the map where the registers allow it: then no row of the middle map is computed twice."""
    block_w = _power(shape.width, 8, 64)
    if shape.taps > 3 and 8 < shape.height <= 24 and block_w <= 32:
        rows = 16 if shape.height <= 16 else 24
        return [_filled(block_w, rows, 1, 8)]
    if shape.channels_last:
        return [RowTile(block_w, max(16, 256 // block_w), 8, max(4, block_w // 4))]
    return [_filled(block_w, 8, 2, 4), _filled(block_w, 8, 1, 4)]


def _attention_backward(shape: Shape) -> list[RowTile]:
    narrow = shape.channels_last and shape.width > 32  # 64 pixels of 16 channels would be too many threads
    block_w = 16 if narrow else _power(shape.width, 8, 64)
    rows = 16 if shape.taps > 3 and 8 < shape.height <= 16 and block_w <= 16 else 8
    return [_filled(block_w, rows, 1, 8)]


def _filled(block_w: int, rows: int, values: int, warps: int) -> RowTile:
    """With as many channels as give each thread so many values of a row."""
    return RowTile(block_w, max(1, 32 * warps * values // block_w), rows, warps)


_CANDIDATES = {
    "depthwise": _depthwise,
    "depthwise_sum": _depthwise_sum,
    "depthwise_weight": _depthwise_weight,
    "depthwise_backward": _depthwise_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
}


def choose(shape: Shape, device: torch.device) -> RowTile:
    """The measured winner on this GPU, or the rule's choice. Never measures anything itself."""
    return _pick(shape, candidates(shape), device)


@functools.cache
def device_name(device: torch.device) -> str:
    """As in the file names of winners: ``nvidia_h100_80gb_hbm3``."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "_").replace("/", "_")


@functools.cache
def winners(device: str) -> dict[str, list[int]]:
    """The winners that ``python -m ffnet_kernels tune`` found for a GPU; empty if it never ran there."""
    path = _TUNED / f"{device}.json"
    return json.loads(path.read_text())["winners"] if path.exists() else {}


class MatrixShape(NamedTuple):
    """All that tile selection for a product may depend on: [pixels, channels] maps by [outputs, channels] weights."""

    kernel: str
    dtype: torch.dtype
    channels_last: bool
    pixels: int
    channels: int
    outputs: int

    @classmethod
    def of(cls, kernel: str, x: Tensor, grid: Mapping[str, int], channels: int, outputs: int) -> MatrixShape:
        """For maps like x with the images and pixels of a grid."""
        return cls(kernel, x.dtype, channels_innermost(x), grid["images"] * grid["count"], channels, outputs)

    def key(self) -> str:
        layout = "channels_last" if self.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        extents = (
            f"p{_power(self.pixels, 64, 1 << 18)}/c{_power(self.channels, 16, 4096)}/o{_power(self.outputs, 16, 4096)}"
        )
        return f"{self.kernel}/{dtype}/{layout}/{extents}"


def matrix_candidates(shape: MatrixShape) -> list[MatrixTile]:
    if shape.kernel == "channel_mixer":
        return [MatrixTile(64, 0, 32, 4, 2), MatrixTile(128, 0, 32, 8, 2)]
    if shape.dtype == torch.float32:
        return [MatrixTile(64, 64, 16, 4, 2)]
    if shape.kernel == "pointwise" and shape.channels % 8 == 0 and shape.outputs % 8 == 0:
        return [MatrixTile(128, 64, 32, 4, 3), MatrixTile(64, 64, 32, 4, 3), MatrixTile(128, 128, 32, 8, 3)]
    return [MatrixTile(64, 64, 32, 4, 3)]


def choose_matrix(shape: MatrixShape, device: torch.device) -> MatrixTile:
    """Like :func:`choose`."""
    return _pick(shape, matrix_candidates(shape), device)


def _pick(shape: Shape | MatrixShape, allowed: list[Tile], device: torch.device) -> Tile:
    if _chooser is not None:
        return _chooser(shape, allowed)
    if device.type != "cuda":
        return allowed[0]
    winner = winners(device_name(device)).get(shape.key())
    return next((tile for tile in allowed if winner is not None and list(tile) == list(winner)), allowed[0])


_chooser: Callable | None = None


@contextlib.contextmanager
def choosing(chooser: Callable[[Any, list], Any]) -> Iterator[None]:
    """Context in which ``chooser(shape, candidates)`` picks every tile: for tuning and tests; not thread-safe."""
    global _chooser
    previous, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = previous


def fuses_hidden(dtype: torch.dtype, channels: int, outputs: int) -> bool:
    """Whether the hidden map of a channel mixer stays on chip.

    Its traffic is 6·D bytes a pixel of a 16-bit map, its arithmetic 4·C·D operations on tensor cores: below some 140
    channels an H100 waits for the memory. Wider ones do not fit the registers of a program either; nor does float32,
    which without tensor cores is bound by arithmetic anyway.
    """
    return dtype != torch.float32 and max(channels, outputs) <= 128


def covering(extent: int) -> int:
    """The block that covers an extent: a power of two, at least 16 as products need."""
    return _power(extent, 16, 1 << 30)


def channels_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(3) != 1


def share(tile: RowTile, shape: Shape, *, overlap: int = 0, sums: int = 0) -> dict[str, int]:
    """How programs share the maps: in column tiles that overlap by so many pixels, strips of rows, and splits, which
    are the programs for each block of channels.

    As many programs as fill a large GPU: more would read the filters again and cut maps into strips with halos. Those
    of a gradient each write so many ``sums`` per channel, kept below an eighth of the maps' traffic as long as there
    are as many warps as else programs.
    """
    channel_blocks = -(-shape.channels // tile.block_c)
    column_tiles = 1 if shape.width <= tile.block_w else -(-shape.width // (tile.block_w - overlap))
    blocks = -(-shape.height // tile.rows)
    strips = min(blocks, max(1, PROGRAMS // (shape.images * channel_blocks * column_tiles or 1)))
    strip = -(-blocks // strips) * tile.rows
    strips = -(-shape.height // strip)
    most = PROGRAMS
    if sums:
        maps = 3 * shape.images * shape.height * shape.width * shape.dtype.itemsize
        most = min(PROGRAMS, max(PROGRAMS // tile.warps, channel_blocks * (maps // (8 * 2 * 4 * sums))))
    splits = min(shape.images * strips * column_tiles, max(1, most // channel_blocks))
    return {"strip": strip, "strips": strips, "column_tiles": column_tiles, "splits": splits}


#: Number of programs that fills a large GPU.
PROGRAMS = 1024


def _power(value: int, least: int, most: int) -> int:
    """The power of two from ``value`` upwards, between ``least`` and ``most``."""
    return min(most, max(least, 1 << max(0, value - 1).bit_length()))
