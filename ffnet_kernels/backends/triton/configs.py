"""Which tile a call takes: a rule by shape and dtype, and the winners that were measured on a GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TUNED = Path(__file__).parent / "tuned"


class RowTile(NamedTuple):
    """Of the depthwise kernels: a program holds ``rows`` tiles of ``block_w`` pixels × ``block_c`` channels."""

    block_w: int
    block_c: int
    rows: int
    warps: int

    def __str__(self) -> str:
        return f"{self.rows} rows × {self.block_w} pixels × {self.block_c} channels, {self.warps} warps"


class MatrixTile(NamedTuple):
    """Of the matrix products: ``block_p`` pixels × ``block_o`` outputs, ``block_k`` terms of the sum at a time."""

    block_p: int
    block_o: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_p} × {self.block_o} × {self.block_k}, {self.warps} warps, {self.stages} stages"


class Shape(NamedTuple):
    """What a choice of tile may depend on: the work of a kernel, in the units of its output map."""

    kernel: str
    dtype: torch.dtype
    channels_last: bool
    images: int
    channels: int
    height: int
    width: int
    taps: int

    def key(self) -> str:
        """Of the winners: extents are bucketed, so that a neighbour's measurement serves."""
        layout = "channels_last" if self.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        taps = next((k for k in (3, 7, 15) if self.taps <= k), 31)
        extents = f"n{_power(self.images, 1, 64)}/c{_power(self.channels, 16, 1024)}"
        return f"{self.kernel}/{dtype}/{layout}/k{taps}/{extents}/w{_power(self.width, 8, 64)}"


def candidates(shape: Shape) -> list[RowTile]:
    """The tiles that may run such a shape, the rule's own choice first. None of them spills (see ``aot.py``).

    Values per thread and rows are as many as the registers hold. With the channels innermost a tile is 16 channels or
    more where it can be, which is a whole sector of memory; else it is as wide as the map, up to 64 pixels.
    """
    return _CANDIDATES[shape.kernel](shape)


def _depthwise(shape: Shape) -> list[RowTile]:
    rows = 8 if shape.height > 4 else 4
    if shape.channels_last:
        return [RowTile(16, 32, rows, 4), RowTile(16, 16, rows, 4)]
    return [_filled(_power(shape.width, 8, 64), rows, 2, 4), _filled(_power(shape.width, 8, 32), rows, 4, 4)]


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
        return [_filled(block_w, rows, 1, 16 if shape.channels_last and block_w == 32 else 8)]
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
    "depthwise_weight": _depthwise_weight,
    "depthwise_backward": _depthwise_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
}


def choose(shape: Shape, device: torch.device) -> RowTile:
    """The measured winner on this GPU, or the rule's choice. Never measures anything itself."""
    allowed = candidates(shape)
    if device.type != "cuda":
        return allowed[0]
    winner = winners(device_name(device)).get(shape.key())
    tile = None if winner is None else RowTile(*winner)
    return tile if tile in allowed else allowed[0]


@functools.cache
def device_name(device: torch.device) -> str:
    """As in the names of the files of winners: ``nvidia_h100_80gb_hbm3``."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "_").replace("/", "_")


@functools.cache
def winners(device: str) -> dict[str, list[int]]:
    """What ``python -m ffnet_kernels tune`` wrote for a GPU; empty where it never ran there."""
    path = _TUNED / f"{device}.json"
    return json.loads(path.read_text())["winners"] if path.exists() else {}


class MatrixShape(NamedTuple):
    """What a choice of tile for a product may depend on: [pixels, channels] maps by [outputs, channels] weights."""

    kernel: str
    dtype: torch.dtype
    channels_last: bool
    pixels: int
    channels: int
    outputs: int

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
    if shape.kernel == "pointwise":
        return [MatrixTile(128, 64, 32, 4, 3), MatrixTile(64, 64, 32, 4, 3), MatrixTile(128, 128, 32, 8, 3)]
    return [MatrixTile(64, 64, 32, 4, 3)]


def choose_matrix(shape: MatrixShape, device: torch.device) -> MatrixTile:
    """As :func:`choose`."""
    allowed = matrix_candidates(shape)
    if device.type != "cuda":
        return allowed[0]
    winner = winners(device_name(device)).get(shape.key())
    tile = None if winner is None else MatrixTile(*winner)
    return tile if tile in allowed else allowed[0]


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


def strips(height: int, tile: RowTile, others: int) -> tuple[int, int]:
    """(rows, number) of the strips that share the height of a map: few, but enough programs for a large GPU."""
    blocks = -(-height // tile.rows)
    number = min(blocks, max(1, PROGRAMS // max(1, others)))
    rows = -(-blocks // number) * tile.rows
    return rows, -(-height // rows)


#: Programs that fill a large GPU: with fewer, maps are cut into strips whose filters' halos are read twice.
PROGRAMS = 1024


def _power(value: int, least: int, most: int) -> int:
    """The power of two from ``value`` upwards, between ``least`` and ``most``."""
    return min(most, max(least, 1 << max(0, value - 1).bit_length()))
