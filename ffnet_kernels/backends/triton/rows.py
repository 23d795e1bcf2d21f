"""What the depthwise kernels share: rows of a map held in registers, and their convolution.

A row is a tile ``[BLOCK_W, BLOCK_C]``, some pixels of one map row by some channels, in float32. A kernel holds several
adjacent rows as a tuple, so that an input row, loaded once for each column of the filter, serves every output row that
it reaches without leaving the registers: (ROWS + TAPS - 1) loads for ROWS · TAPS products. Which of the two axes
lies along the lanes is the compiler's choice, by the strides: one source serves NCHW and channels-last.

Filter columns are a loop, filter rows are unrolled: TAPS of them at a time, up to CHUNK; taller filters come in
chunks. So a handful of compiled kernels takes every filter, and no tap that does not exist is multiplied: an infinite
pixel shows where it does in the reference.
"""

import triton
import triton.language as tl

#: Most filter rows in registers at once.
CHUNK: tl.constexpr = tl.constexpr(8)

#: Numbers of which no kernel is compiled for a special value: only strides and channels decide how memory is read.
EXTENTS = (
    "images", "height", "width", "out_height", "out_width", "top", "left", "chunks", "kernel_height", "kernel_width",
    "strip", "strips", "column_tiles", "splits",
)  # fmt: skip


@triton.jit
def in_elements(strides, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Strides that the host passed in units of ALIGN elements; in those, dimension UNIT has a stride of 1."""
    elements = ()
    for i in tl.static_range(len(strides)):
        if ALIGN == 1:
            elements = elements + (strides[i],)
        elif i == UNIT:
            elements = elements + (1,)
        else:
            elements = elements + (strides[i] * ALIGN,)
    return elements


@triton.jit
def own_share(channels, BLOCK_C: tl.constexpr):
    """The channels of a program, which of them exist, and which share of the maps it takes."""
    blocks = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels, tl.program_id(0) // blocks


@triton.jit
def zero_rows(ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    return (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),) * ROWS


@triton.jit
def only_if(mask, condition):
    """The mask where a scalar condition holds, else all False. (Triton's interpreter has no mask & scalar.)"""
    one: tl.constexpr = (1,) * len(mask.shape)
    return mask & (tl.full(one, 0, tl.int32) + tl.cast(condition, tl.int32) != 0)


@triton.jit
def load_row(pointers, row, height, mask):
    """One row of a map in float32, zeros outside the map; ``pointers`` to that row."""
    return tl.load(pointers, mask=only_if(mask, (row >= 0) & (row < height)), other=0.0).to(tl.float32)


@triton.jit
def row_offset(row, row_stride):
    return tl.cast(row, tl.int64) * row_stride


@triton.jit
def load_taps(pointers, ky_stride, mask, TAPS: tl.constexpr):
    """A column of the filter, top to bottom, as a tuple of ``[1, BLOCK_C]``."""
    taps = ()
    for _ in tl.static_range(TAPS):
        taps = taps + (tl.load(pointers, mask=mask, other=0.0).to(tl.float32)[None, :],)
        pointers += ky_stride
    return taps


@triton.jit
def load_vector(pointers, mask, EXISTS: tl.constexpr, DEFAULT: tl.constexpr):
    """A value per channel, ``[1, BLOCK_C]``; the default where the tensor is None."""
    if EXISTS:
        return tl.load(pointers, mask=mask, other=DEFAULT).to(tl.float32)[None, :]
    else:
        return tl.full(mask.shape, DEFAULT, tl.float32)[None, :]


@triton.jit
def add_products(rows, tile, taps, r: tl.constexpr, STRIDE: tl.constexpr):
    """Adds input row ``r``, counted from the first output row's first tap, to the output rows whose taps it meets."""
    ROWS: tl.constexpr = len(rows)
    TAPS: tl.constexpr = len(taps)
    updated = ()
    for i in tl.static_range(ROWS):
        if r - i * STRIDE >= 0 and r - i * STRIDE < TAPS:
            updated = updated + (rows[i] + tile * taps[r - i * STRIDE],)
        else:
            updated = updated + (rows[i],)
    return updated


@triton.jit
def add_correlations(sums, tile, rows, r: tl.constexpr, STRIDE: tl.constexpr):
    """Adds the products of input row ``r`` with the output rows it meets to the sums of the taps they meet by."""
    ROWS: tl.constexpr = len(rows)
    TAPS: tl.constexpr = len(sums)
    updated = ()
    for ky in tl.static_range(TAPS):
        total = sums[ky]
        if (r - ky) % STRIDE == 0 and r - ky >= 0 and r - ky < ROWS * STRIDE:
            total = total + tile * rows[(r - ky) // STRIDE]
        updated = updated + (total,)
    return updated


@triton.jit
def convolve_rows(
    rows, x, first_row, first_columns, height, width, row_stride, column_stride,
    filter, ky_stride, kx_stride, kernel_width, channel_mask, TAPS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Adds TAPS rows of a filter over a map in memory.

    x: pointers ``[BLOCK_W, BLOCK_C]`` to ``first_columns`` of row 0; filter: pointers ``[BLOCK_C]`` to its first tap.
    Output row i starts at map row ``first_row + i·STRIDE``.
    """
    ROWS: tl.constexpr = len(rows)
    x += row_offset(first_row, row_stride)
    for kx in range(kernel_width):
        taps = load_taps(filter, ky_stride, channel_mask, TAPS)
        columns = first_columns + kx
        mask = ((columns >= 0) & (columns < width))[:, None] & channel_mask[None, :]
        # Pointers step from row to row: as multiples of the stride, compilers keep them all in registers.
        pointers = x
        for r in tl.static_range((ROWS - 1) * STRIDE + TAPS):
            rows = add_products(rows, load_row(pointers, first_row + r, height, mask), taps, r, STRIDE)
            pointers += row_stride
        x += column_stride
        filter += kx_stride
    return rows


@triton.jit
def convolve(
    rows, x, first_row, first_columns, height, width, row_stride, column_stride,
    filter, ky_stride, kx_stride, kernel_width, channel_mask, chunks,
    CHUNKED: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """:func:`convolve_rows` for a filter of any height: ``chunks`` of CHUNK rows, then TAPS rows."""
    if CHUNKED:
        for chunk in range(chunks):
            rows = convolve_rows(
                rows, x, first_row + chunk * CHUNK, first_columns, height, width, row_stride, column_stride,
                filter + chunk * CHUNK * ky_stride, ky_stride, kx_stride, kernel_width, channel_mask, CHUNK, STRIDE,
            )  # fmt: skip
    if TAPS > 0:
        rows = convolve_rows(
            rows, x, first_row + chunks * CHUNK, first_columns, height, width, row_stride, column_stride,
            filter + chunks * CHUNK * ky_stride, ky_stride, kx_stride, kernel_width, channel_mask, TAPS, STRIDE,
        )  # fmt: skip
    return rows


@triton.jit
def shift(tile, by):
    """The tile moved by so many pixels along its row, zeros from outside it. Costs a warp shuffle a value."""
    BLOCK_W: tl.constexpr = tile.shape[0]
    source = tl.arange(0, BLOCK_W)[:, None] + by
    inside = (source >= 0) & (source < BLOCK_W)
    index = tl.broadcast_to(tl.where(inside, source, 0), tile.shape)
    return tl.where(inside, tl.gather(tile, index, 0), 0.0)
