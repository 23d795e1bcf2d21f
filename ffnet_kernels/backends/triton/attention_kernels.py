"""Kernels of FFNified attention, DW → activation → DW. Maps are [N, C, H, W] by strides; rows: see ``rows.py``.

The middle map stays in registers. Its rows are complete tiles of one map row, so the second convolution needs no
memory either: along the height it finds its rows in the same thread, along the width it shifts tiles by warp shuffles.

A program keeps its channels and takes every ``splits``-th strip of the maps, ROWS output rows at a time. With HALO, it
computes the TAPS - 1 middle rows around them too; without, ROWS covers the whole height and there is nothing around.
Likewise the columns: a map as wide as BLOCK_W or less is one tile, a wider one is cut into tiles that overlap by the
filter's width - 1.
"""

import triton
import triton.language as tl

from .activation import activate, derivative
from .depthwise_kernels import add_sum, backward_rows
from .rows import (
    EXTENTS,
    add_correlations,
    add_products,
    convolve_rows,
    in_elements,
    load_row,
    load_taps,
    load_vector,
    only_if,
    own_share,
    row_offset,
    shift,
    zero_rows,
)


@triton.jit
def _columns(tile, tiles, left, right, BLOCK_W: tl.constexpr):
    """(map columns of a middle tile, first and last of them that are outputs)."""
    first = tl.where(tiles > 1, tile * (BLOCK_W - left - right) - left, 0)
    columns = first + tl.arange(0, BLOCK_W)
    return columns, tl.where(tiles > 1, first + left, 0), tl.where(tiles > 1, first + BLOCK_W - right, BLOCK_W)


@triton.jit(do_not_specialize=EXTENTS)
def ffnified_attention_forward_kernel(
    query, query_strides, key, key_strides, key_bias, value, value_strides, value_bias,
    scale, residual, residual_strides, out, out_strides,
    images, channels, height, width, kernel_width, strip, strips, column_tiles, splits,
    ACTIVATION: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    MAP_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``residual + scale · (DW(act(DW(query; key) + key_bias); value) + value_bias)``, both filters of one size."""
    query_strides = in_elements(query_strides, MAP_UNIT, ALIGN)
    key_strides = in_elements(key_strides, 0, ALIGN)
    value_strides = in_elements(value_strides, 0, ALIGN)
    if residual is not None:
        residual_strides = in_elements(residual_strides, MAP_UNIT, ALIGN)
    out_strides = in_elements(out_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    TOP: tl.constexpr = (TAPS - 1) // 2
    BEFORE: tl.constexpr = TOP if HALO else 0
    MIDDLE: tl.constexpr = ROWS + TAPS - 1 if HALO else ROWS
    c, channel_mask, split = own_share(channels, BLOCK_C)
    c64 = c.to(tl.int64)
    left = (kernel_width - 1) // 2
    b1 = load_vector(key_bias + c if key_bias is not None else None, channel_mask, key_bias is not None, 0.0)
    b2 = load_vector(value_bias + c if value_bias is not None else None, channel_mask, value_bias is not None, 0.0)
    s = load_vector(scale + c if scale is not None else None, channel_mask, scale is not None, 1.0)
    for work in range(split, images * strips * column_tiles, splits):
        columns, first_output, last_output = _columns(
            work % column_tiles, column_tiles, left, kernel_width - 1 - left, BLOCK_W
        )
        start = (work // column_tiles) % strips * strip
        n = tl.cast(work // column_tiles // strips, tl.int64)
        columns64 = columns.to(tl.int64)[:, None]
        in_map = ((columns >= 0) & (columns < width))[:, None]
        own = ((columns >= first_output) & (columns < last_output) & (columns < width))[:, None]
        mask = own & channel_mask[None, :]
        query_tile = query + n * query_strides[0] + c64[None, :] * query_strides[1]
        query_tile += (columns64 - left) * query_strides[3]
        out_tile = out + n * out_strides[0] + c64[None, :] * out_strides[1] + columns64 * out_strides[3]
        if residual is not None:
            residual_tile = residual + n * residual_strides[0] + c64[None, :] * residual_strides[1]
            residual_tile = residual_tile + columns64 * residual_strides[3]
        for first_row in range(start, tl.minimum(start + strip, height), ROWS):
            middle = convolve_rows(
                zero_rows(MIDDLE, BLOCK_W, BLOCK_C), query_tile, first_row - BEFORE - TOP, columns - left,
                height, width, query_strides[2], query_strides[3],
                key + c64 * key_strides[0], key_strides[1], key_strides[2], kernel_width, channel_mask,
                TAPS, 1,
            )  # fmt: skip
            hidden = ()
            for i in tl.static_range(MIDDLE):
                row = first_row - BEFORE + i
                inside = only_if(in_map, (row >= 0) & (row < height))
                hidden = hidden + (tl.where(inside, activate(middle[i] + b1, ACTIVATION), 0.0),)
            rows = zero_rows(ROWS, BLOCK_W, BLOCK_C)
            for kx in range(kernel_width):
                pointers = value + c64 * value_strides[0] + kx * value_strides[2]
                taps = load_taps(pointers, value_strides[1], channel_mask, TAPS)
                for i in tl.static_range(MIDDLE):
                    rows = add_products(rows, shift(hidden[i], kx - left), taps, i + TOP - BEFORE, 1)
            for i in tl.static_range(ROWS):
                result = (rows[i] + b2) * s
                if residual is not None:
                    result += load_row(
                        residual_tile + row_offset(first_row + i, residual_strides[2]), first_row + i, height, mask
                    )
                pointers = out_tile + row_offset(first_row + i, out_strides[2])
                tl.store(pointers, result.to(out.dtype.element_ty), mask=only_if(mask, first_row + i < height))


@triton.jit(do_not_specialize=EXTENTS)
def ffnified_attention_backward_kernel(
    grad, grad_strides, query, query_strides, key, key_strides, key_bias, value, value_strides, scale,
    grad_query, grad_query_strides, key_partials, value_partials,
    images, channels, height, width, kernel_width, strip, strips, column_tiles, splits,
    ACTIVATION: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    MAP_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """All gradients but that of the residual in one pass; the middle map and its gradient stay in registers.

    ``key_partials`` and ``value_partials`` ``[splits, taps + 1, C]`` take each program's sums for filter and bias, the
    latter as if the scale were 1.
    """
    grad_strides = in_elements(grad_strides, MAP_UNIT, ALIGN)
    query_strides = in_elements(query_strides, MAP_UNIT, ALIGN)
    key_strides = in_elements(key_strides, 0, ALIGN)
    value_strides = in_elements(value_strides, 0, ALIGN)
    grad_query_strides = in_elements(grad_query_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    TOP: tl.constexpr = (TAPS - 1) // 2
    BOTTOM: tl.constexpr = TAPS - 1 - TOP
    BEFORE: tl.constexpr = BOTTOM if HALO else 0
    MIDDLE: tl.constexpr = ROWS + TAPS - 1 if HALO else ROWS
    c, channel_mask, split = own_share(channels, BLOCK_C)
    c64 = c.to(tl.int64)
    offset = tl.cast(split, tl.int64) * (TAPS * kernel_width + 1) * channels + c
    left = (kernel_width - 1) // 2
    right = kernel_width - 1 - left
    b1 = load_vector(key_bias + c if key_bias is not None else None, channel_mask, key_bias is not None, 0.0)
    s = load_vector(scale + c if scale is not None else None, channel_mask, scale is not None, 1.0)
    for work in range(split, images * strips * column_tiles, splits):
        columns, first_output, last_output = _columns(work % column_tiles, column_tiles, right, left, BLOCK_W)
        start = (work // column_tiles) % strips * strip
        n = tl.cast(work // column_tiles // strips, tl.int64)
        columns64 = columns.to(tl.int64)[:, None]
        in_map = ((columns >= 0) & (columns < width))[:, None]
        own = ((columns >= first_output) & (columns < last_output) & (columns < width))[:, None]
        mask = own & channel_mask[None, :]
        query_tile = query + n * query_strides[0] + c64[None, :] * query_strides[1] + columns64 * query_strides[3]
        grad_tile = grad + n * grad_strides[0] + c64[None, :] * grad_strides[1] + columns64 * grad_strides[3]
        grad_query_tile = grad_query + n * grad_query_strides[0] + c64[None, :] * grad_query_strides[1]
        grad_query_tile = grad_query_tile + columns64 * grad_query_strides[3]
        for first_row in range(start, tl.minimum(start + strip, height), ROWS):
            accumulate = (work != split) | (first_row != start)
            middle = convolve_rows(
                zero_rows(MIDDLE, BLOCK_W, BLOCK_C), query_tile - left * query_strides[3], first_row - BEFORE - TOP,
                columns - left, height, width, query_strides[2], query_strides[3],
                key + c64 * key_strides[0], key_strides[1], key_strides[2], kernel_width, channel_mask, TAPS, 1,
            )  # fmt: skip
            hidden = ()
            bias_sum = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
            for i in tl.static_range(ROWS):
                inside = only_if(own, first_row + i < height)
                hidden = hidden + (tl.where(inside, activate(middle[BEFORE + i] + b1, ACTIVATION), 0.0),)
                bias_sum += load_row(
                    grad_tile + row_offset(first_row + i, grad_strides[2]), first_row + i, height, mask
                )
            add_sum(value_partials + offset + TAPS * kernel_width * channels, bias_sum, channel_mask, accumulate)
            grad_middle = backward_rows(
                zero_rows(MIDDLE, BLOCK_W, BLOCK_C), hidden, grad_tile - right * grad_strides[3],
                first_row - BEFORE - BOTTOM, columns - right, height, width, grad_strides[2], grad_strides[3],
                value + c64 * value_strides[0] + (TAPS - 1) * value_strides[1] + (kernel_width - 1) * value_strides[2],
                value_strides[1], value_strides[2],
                value_partials + offset + (TAPS * kernel_width - 1) * channels,
                kernel_width, channels, channel_mask, accumulate, BEFORE, TAPS,
            )  # fmt: skip
            before = ()
            bias_sum = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
            for i in tl.static_range(MIDDLE):
                row = first_row - BEFORE + i
                inside = only_if(in_map, (row >= 0) & (row < height))
                gradient = tl.where(inside, grad_middle[i] * s * derivative(middle[i] + b1, ACTIVATION), 0.0)
                before = before + (gradient,)
                if i >= BEFORE and i < BEFORE + ROWS:
                    bias_sum += tl.where(own, gradient, 0.0)
            add_sum(key_partials + offset + TAPS * kernel_width * channels, bias_sum, channel_mask, accumulate)
            query_rows = ()
            for i in tl.static_range(ROWS):
                query_rows = query_rows + (
                    load_row(query_tile + row_offset(first_row + i, query_strides[2]), first_row + i, height, mask),
                )
            rows = zero_rows(ROWS, BLOCK_W, BLOCK_C)
            last_tap = key + c64 * key_strides[0] + (TAPS - 1) * key_strides[1] + (kernel_width - 1) * key_strides[2]
            last_sum = key_partials + offset + (TAPS * kernel_width - 1) * channels
            for kx in range(kernel_width):
                taps = load_taps(last_tap - kx * key_strides[2], -key_strides[1], channel_mask, TAPS)
                sums = zero_rows(TAPS, BLOCK_W, BLOCK_C)
                for i in tl.static_range(MIDDLE):
                    tile = shift(before[i], kx - right)
                    rows = add_products(rows, tile, taps, i + BOTTOM - BEFORE, 1)
                    sums = add_correlations(sums, tile, query_rows, i + BOTTOM - BEFORE, 1)
                for ky in tl.static_range(TAPS):
                    add_sum(last_sum - (ky * kernel_width + kx) * channels, sums[ky], channel_mask, accumulate)
            for i in tl.static_range(ROWS):
                pointers = grad_query_tile + row_offset(first_row + i, grad_query_strides[2])
                value_mask = only_if(mask, first_row + i < height)
                tl.store(pointers, rows[i].to(grad_query.dtype.element_ty), mask=value_mask)
            tl.debug_barrier()  # the sums are read back by other threads of the program
