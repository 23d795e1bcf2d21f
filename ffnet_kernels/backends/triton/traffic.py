"""Counts the bytes that the kernels move, from the loads and stores that Triton's interpreter sees.

A byte counts once for each program that touches it: what a program touches again is in its multiprocessor's cache, but
nothing is assumed of one program finding what another has left in the second-level cache. So halos count as often as
different programs read them. ``python -m ffnet_kernels traffic`` prints the table.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from . import attention, configs, depthwise
from .configs import Shape

#: The batch that is counted for. Some of its images are computed, and shared out among programs as all of them are.
BATCH = 128

#: What a depthwise operator may move, over what it has to.
LIMIT = 1.25

#: (channels, size, kernel) of the token mixers of FFNet-1 at 256², and of the last stages of FFNet-3 at 384².
STAGES = ((80, 64, 3), (160, 32, 3), (320, 16, 7), (640, 8, 7), (384, 24, 7), (768, 12, 7))


class Traffic(NamedTuple):
    """Of a call on bfloat16 maps: bytes that its programs load and store, and those that any implementation has to."""

    operator: str
    layout: str
    channels: int
    size: int
    kernel: int
    moved: int
    unavoidable: int

    @property
    def ratio(self) -> float:
        return self.moved / self.unavoidable


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter]:
    """Adds up ``load`` and ``store`` bytes of interpreted kernels meanwhile."""
    totals: collections.Counter = collections.Counter()
    touched: dict[tuple[str, int], list[np.ndarray]] = collections.defaultdict(list)

    def finish_program() -> None:
        stored = [np.concatenate(addresses) for (kind, _), addresses in touched.items() if kind == "store"]
        own = np.unique(np.concatenate(stored)) if stored else np.empty(0, np.uint64)
        for (kind, size), addresses in touched.items():
            distinct = np.unique(np.concatenate(addresses))
            if kind == "load":  # what a program has stored itself it finds in its cache
                distinct = np.setdiff1d(distinct, own, assume_unique=True)
            totals[kind] += size * distinct.size
        touched.clear()

    def observed(method: Callable, kind: str, mask_at: int) -> Callable:
        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            touched[kind, size].append(np.unique(pointers.data[rest[mask_at].data.astype(bool)]))
            return method(self, pointers, *rest)

        return access

    def next_program(self: Any, *index: int) -> None:
        finish_program()
        set_index(self, *index)

    set_index = InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with (
        mock.patch.object(InterpreterBuilder, "set_grid_idx", next_program),
        mock.patch.object(InterpreterBuilder, "create_masked_load", observed(load, "load", 0)),
        mock.patch.object(InterpreterBuilder, "create_masked_store", observed(store, "store", 1)),
    ):
        yield totals
        finish_program()


def operators() -> dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Any], int, int]]:
    """By name: the kernel that chooses the tile, the call on (map, filter, vector), and how many maps and filters of
    its size it cannot but read or write."""
    every = (True,) * 7

    def convolution(x, weight, bias):
        depthwise.forward(torch.empty_like(x), x, weight, bias, (1, 1), depthwise.same_padding(weight), "gelu")

    def convolution_backward(x, weight, bias):
        depthwise.backward(
            x.clone(), x, weight, bias, (1, 1), depthwise.same_padding(weight), "none", (True, True, True)
        )

    def mixer(x, weight, bias):
        attention.forward(torch.empty_like(x), x, weight, bias, weight, bias, "gelu", bias, None)

    def mixer_residual(x, weight, bias):
        attention.forward(torch.empty_like(x), x, weight, bias, weight, bias, "gelu", bias, x.clone())

    def mixer_backward(x, weight, bias):
        attention.backward(x.clone(), x, weight, bias, weight, bias, "gelu", bias, None, every)

    return {
        "depthwise_conv2d + GELU": ("depthwise", convolution, 2, 1),
        "depthwise_conv2d backward": ("depthwise_backward", convolution_backward, 3, 2),
        "ffnified_attention": ("attention", mixer, 2, 2),
        "ffnified_attention + residual": ("attention", mixer_residual, 3, 2),
        "ffnified_attention backward": ("attention_backward", mixer_backward, 3, 4),
    }


def measure(operator: str, layout: str, channels: int, size: int, kernel: int) -> Traffic:
    """Counts one call, of a few images and of one block of channels: all blocks and images are alike."""
    name, call, maps, filters = operators()[operator]
    last = layout == "channels_last"
    tile = configs.candidates(Shape(name, torch.bfloat16, last, BATCH, channels, size, size, kernel))[0]
    width = min(channels, tile.block_c)
    images = max(2, min(16, 4096 // size**2))
    programs = max(1, configs.PROGRAMS * images * width // (BATCH * channels))
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(images, width, size, size).bfloat16().contiguous(memory_format=memory_format)
    weight = torch.randn(width, 1, kernel, kernel).bfloat16()
    if last:
        weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    with counting() as totals, mock.patch.object(configs, "PROGRAMS", programs):
        call(x, weight, torch.randn(width).bfloat16())
    unavoidable = x.element_size() * (maps * x.numel() + filters * weight.numel())
    return Traffic(operator, layout, channels, size, kernel, totals["load"] + totals["store"], unavoidable)


def table(rows: list[Traffic]) -> str:
    """In Markdown: the ratio to the unavoidable bytes by operator and layout, a column for each stage."""
    stages = list(dict.fromkeys((row.channels, row.size, row.kernel) for row in rows))
    ratios = {(row.operator, row.layout, row.channels, row.size, row.kernel): row.ratio for row in rows}
    lines = ["| operator | layout |" + "".join(f" {c}×{size}² k{k} |" for c, size, k in stages)]
    lines.append("|---|---|" + "--:|" * len(stages))
    for operator, layout in dict.fromkeys((row.operator, row.layout) for row in rows):
        cells = (ratios.get((operator, layout, *stage)) for stage in stages)
        lines.append(f"| {operator} | {layout} |" + "".join(" – |" if r is None else f" {r:.2f} |" for r in cells))
    return "\n".join(lines)


def main() -> int:
    """Counts all operators at all stages, prints the table; 1 where a ratio is over LIMIT."""
    rows = [
        measure(operator, layout, *stage)
        for stage in STAGES
        for operator in operators()
        for layout in ("channels_last", "nchw")
    ]
    print(f"Bytes moved over bytes unavoidable, bfloat16, batch {BATCH}:\n\n{table(rows)}")
    return int(any(row.ratio > LIMIT for row in rows))
