"""Kernels of the depthwise convolution. Maps are [N, C, H, W] by strides; tiles and rows: see ``rows.py``."""

import triton
import triton.language as tl

from .activation import activate, derivative
from .rows import (
    CHUNK,
    EXTENTS,
    add_correlations,
    add_products,
    convolve,
    in_elements,
    load_row,
    load_taps,
    load_vector,
    only_if,
    own_share,
    row_offset,
    zero_rows,
)


@triton.jit
def _place(work, strip, strips, column_tiles, BLOCK_W: tl.constexpr):
    """The image, first row and columns of a piece of work."""
    columns = (work % column_tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    return tl.cast(work // column_tiles // strips, tl.int64), (work // column_tiles) % strips * strip, columns


@triton.jit(do_not_specialize=EXTENTS)
def depthwise_conv2d_forward_kernel(
    x, x_strides, weight, weight_strides, bias, scale, other, other_strides, out, out_strides,
    images, channels, height, width, out_height, out_width, top, left, chunks, kernel_width,
    strip, strips, column_tiles, splits,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr,
    CHUNKED: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    MAP_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``other + scale · act(DW(x) + bias)``, or ``other · act'(DW(x) + bias)`` if DERIVATIVE.

    OUTPUTS per input channel, or the sum over INPUTS per output channel (the input gradient of the former). A program
    keeps its channels and takes every ``splits``-th strip of the maps. It walks down ``strip`` output rows, ROWS at a
    time; the rows that two steps share come from the cache.
    """
    x_strides = in_elements(x_strides, MAP_UNIT, ALIGN)
    weight_strides = in_elements(weight_strides, 0, ALIGN)
    if other is not None:
        other_strides = in_elements(other_strides, MAP_UNIT, ALIGN)
    out_strides = in_elements(out_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    c, channel_mask, split = own_share(channels, BLOCK_C)
    c64 = c.to(tl.int64)
    b = load_vector(bias + c if bias is not None else None, channel_mask, bias is not None, 0.0)
    s = load_vector(scale + c if scale is not None else None, channel_mask, scale is not None, 1.0)
    for work in range(split, images * strips * column_tiles, splits):
        n, start, columns = _place(work, strip, strips, column_tiles, BLOCK_W)
        mask = (columns < out_width)[:, None] & channel_mask[None, :]
        columns64 = columns.to(tl.int64)[:, None]
        out_tile = out + n * out_strides[0] + columns64 * out_strides[3] + c64[None, :] * out_strides[1]
        if other is not None:
            other_tile = other + n * other_strides[0] + columns64 * other_strides[3] + c64[None, :] * other_strides[1]
        first_columns = columns * STRIDE_W - left
        for first_row in range(start, tl.minimum(start + strip, out_height), ROWS):
            rows = zero_rows(ROWS, BLOCK_W, BLOCK_C)
            for i in tl.static_range(INPUTS):
                x_channel = c64 * INPUTS + i if INPUTS > 1 else c64 // OUTPUTS
                filter_channel = c64 * INPUTS + i
                x_tile = x + n * x_strides[0] + first_columns.to(tl.int64)[:, None] * x_strides[3]
                rows = convolve(
                    rows, x_tile + x_channel[None, :] * x_strides[1], first_row * STRIDE_H - top, first_columns,
                    height, width, x_strides[2], x_strides[3],
                    weight + filter_channel * weight_strides[0], weight_strides[1], weight_strides[2], kernel_width,
                    channel_mask, chunks, CHUNKED, TAPS, STRIDE_H,
                )  # fmt: skip
            for i in tl.static_range(ROWS):
                row = first_row + i
                if DERIVATIVE:
                    value = derivative(rows[i] + b, ACTIVATION)
                    value = value * load_row(other_tile + row_offset(row, other_strides[2]), row, out_height, mask)
                else:
                    value = activate(rows[i] + b, ACTIVATION) * s
                    if other is not None:
                        value = value + load_row(other_tile + row_offset(row, other_strides[2]), row, out_height, mask)
                pointers = out_tile + row_offset(row, out_strides[2])
                tl.store(pointers, value.to(out.dtype.element_ty), mask=only_if(mask, row < out_height))


@triton.jit(do_not_specialize=EXTENTS)
def depthwise_conv2d_backward_kernel(
    grad, grad_strides, x, x_strides, weight, weight_strides, grad_x, grad_x_strides, partials,
    images, channels, height, width, out_height, out_width, top, left, chunks, kernel_height, kernel_width,
    strip, strips, column_tiles, splits,
    CHUNKED: tl.constexpr, TAPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    MAP_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Input, filter and bias gradients in one pass, for stride 1 and one output per channel.

    A row of the incoming gradient, loaded once for each filter column, serves the input gradient (as a convolution
    with the mirrored filter) and, against rows of x kept in registers, the filter's. ``partials[splits, taps + 1, C]``
    takes the sums of each program over its share of the map, taps first, then the bias.
    """
    grad_strides = in_elements(grad_strides, MAP_UNIT, ALIGN)
    x_strides = in_elements(x_strides, MAP_UNIT, ALIGN)
    weight_strides = in_elements(weight_strides, 0, ALIGN)
    grad_x_strides = in_elements(grad_x_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    c, channel_mask, split = own_share(channels, BLOCK_C)
    c64 = c.to(tl.int64)
    partial = partials + tl.cast(split, tl.int64) * (kernel_height * kernel_width + 1) * channels + c
    for work in range(split, images * strips * column_tiles, splits):
        n, start, columns = _place(work, strip, strips, column_tiles, BLOCK_W)
        columns64 = columns.to(tl.int64)[:, None]
        mask = (columns < width)[:, None] & channel_mask[None, :]
        own_mask = (columns < out_width)[:, None] & channel_mask[None, :]
        x_tile = x + n * x_strides[0] + columns64 * x_strides[3] + c64[None, :] * x_strides[1]
        grad_tile = grad + n * grad_strides[0] + c64[None, :] * grad_strides[1]
        own_tile = grad_tile + columns64 * grad_strides[3]
        grad_x_tile = grad_x + n * grad_x_strides[0] + columns64 * grad_x_strides[3] + c64[None, :] * grad_x_strides[1]
        first_columns = columns + left - (kernel_width - 1)
        grad_tile = grad_tile + first_columns.to(tl.int64)[:, None] * grad_strides[3]
        for first_row in range(start, tl.minimum(start + strip, tl.maximum(height, out_height)), ROWS):
            accumulate = (work != split) | (first_row != start)
            x_rows = ()
            bias_sum = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
            for i in tl.static_range(ROWS):
                x_rows = x_rows + (
                    load_row(x_tile + row_offset(first_row + i, x_strides[2]), first_row + i, height, mask),
                )
                bias_sum += load_row(
                    own_tile + row_offset(first_row + i, grad_strides[2]), first_row + i, out_height, own_mask
                )
            add_sum(partial + kernel_height * kernel_width * channels, bias_sum, channel_mask, accumulate)
            rows = zero_rows(ROWS, BLOCK_W, BLOCK_C)
            gradient_row = first_row + top - (kernel_height - 1)
            last_tap = weight + c64 * weight_strides[0] + (kernel_height - 1) * weight_strides[1]
            last_tap = last_tap + (kernel_width - 1) * weight_strides[2]
            last_sum = partial + (kernel_height * kernel_width - 1) * channels
            if CHUNKED:
                for chunk in range(chunks):
                    rows = backward_rows(
                        rows, x_rows, grad_tile, gradient_row + chunk * CHUNK, first_columns, out_height, out_width,
                        grad_strides[2], grad_strides[3], last_tap - chunk * CHUNK * weight_strides[1],
                        weight_strides[1], weight_strides[2], last_sum - chunk * CHUNK * kernel_width * channels,
                        kernel_width, channels, channel_mask, accumulate, 0, CHUNK,
                    )  # fmt: skip
            if TAPS > 0:
                rows = backward_rows(
                    rows, x_rows, grad_tile, gradient_row + chunks * CHUNK, first_columns, out_height, out_width,
                    grad_strides[2], grad_strides[3], last_tap - chunks * CHUNK * weight_strides[1],
                    weight_strides[1], weight_strides[2], last_sum - chunks * CHUNK * kernel_width * channels,
                    kernel_width, channels, channel_mask, accumulate, 0, TAPS,
                )  # fmt: skip
            for i in tl.static_range(ROWS):
                pointers = grad_x_tile + row_offset(first_row + i, grad_x_strides[2])
                tl.store(pointers, rows[i].to(grad_x.dtype.element_ty), mask=only_if(mask, first_row + i < height))
            tl.debug_barrier()  # the sums are read back by other threads of the program


@triton.jit
def backward_rows(
    rows, x_rows, grad, first_row, first_columns, height, width, row_stride, column_stride,
    last_tap, ky_stride, kx_stride, last_sum, kernel_width, channels, channel_mask, accumulate,
    BEFORE: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """TAPS rows of the mirrored filter over the incoming gradient; the filter's own sums on the way, against rows of x
    of which the first is row BEFORE of the result."""
    ROWS: tl.constexpr = len(rows)
    grad += row_offset(first_row, row_stride)
    for kx in range(kernel_width):
        taps = load_taps(last_tap - kx * kx_stride, -ky_stride, channel_mask, TAPS)
        sums = zero_rows(TAPS, rows[0].shape[0], rows[0].shape[1])
        columns = first_columns + kx
        mask = ((columns >= 0) & (columns < width))[:, None] & channel_mask[None, :]
        pointers = grad
        for r in tl.static_range(ROWS + TAPS - 1):
            tile = load_row(pointers, first_row + r, height, mask)
            rows = add_products(rows, tile, taps, r, 1)
            sums = add_correlations(sums, tile, x_rows, r - BEFORE, 1)
            pointers += row_stride
        grad += column_stride
        for ky in tl.static_range(TAPS):
            add_sum(last_sum - (ky * kernel_width + kx) * channels, sums[ky], channel_mask, accumulate)
    return rows


@triton.jit
def add_sum(pointers, tile, channel_mask, accumulate):
    """Adds the sum over a tile's pixels to a program's own partial sums."""
    before = tl.load(pointers, mask=only_if(channel_mask, accumulate), other=0.0)
    tl.store(pointers, before + tl.sum(tile, 0), mask=channel_mask)


@triton.jit(do_not_specialize=EXTENTS)
def depthwise_conv2d_backward_weight_kernel(
    grad, grad_strides, x, x_strides, partials,
    images, channels, height, width, out_height, out_width, top, left, chunks, kernel_height, kernel_width,
    strip, strips, column_tiles, splits,
    CHUNKED: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    MAP_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Filter and bias gradients alone, for any stride and OUTPUTS per input channel; ``partials`` as above.

    Rows of the incoming gradient stay in registers, those of x pass by.
    """
    grad_strides = in_elements(grad_strides, MAP_UNIT, ALIGN)
    x_strides = in_elements(x_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    c, channel_mask, split = own_share(channels, BLOCK_C)
    c64 = c.to(tl.int64)
    partial = partials + tl.cast(split, tl.int64) * (kernel_height * kernel_width + 1) * channels + c
    for work in range(split, images * strips * column_tiles, splits):
        n, start, columns = _place(work, strip, strips, column_tiles, BLOCK_W)
        mask = (columns < out_width)[:, None] & channel_mask[None, :]
        first_columns = columns * STRIDE_W - left
        grad_tile = grad + n * grad_strides[0] + columns.to(tl.int64)[:, None] * grad_strides[3]
        grad_tile = grad_tile + c64[None, :] * grad_strides[1]
        x_tile = x + n * x_strides[0] + first_columns.to(tl.int64)[:, None] * x_strides[3]
        x_tile = x_tile + (c64 // OUTPUTS)[None, :] * x_strides[1]
        for first_row in range(start, tl.minimum(start + strip, out_height), ROWS):
            accumulate = (work != split) | (first_row != start)
            grad_rows = ()
            bias_sum = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
            for i in tl.static_range(ROWS):
                grad_rows = grad_rows + (
                    load_row(grad_tile + row_offset(first_row + i, grad_strides[2]), first_row + i, out_height, mask),
                )
                bias_sum += grad_rows[i]
            add_sum(partial + kernel_height * kernel_width * channels, bias_sum, channel_mask, accumulate)
            x_row = first_row * STRIDE_H - top
            if CHUNKED:
                for chunk in range(chunks):
                    _correlate_rows(
                        grad_rows, x_tile, x_row + chunk * CHUNK, first_columns, height, width,
                        x_strides[2], x_strides[3], partial + chunk * CHUNK * kernel_width * channels,
                        kernel_width, channels, channel_mask, accumulate, CHUNK, STRIDE_H,
                    )  # fmt: skip
            if TAPS > 0:
                _correlate_rows(
                    grad_rows, x_tile, x_row + chunks * CHUNK, first_columns, height, width,
                    x_strides[2], x_strides[3], partial + chunks * CHUNK * kernel_width * channels,
                    kernel_width, channels, channel_mask, accumulate, TAPS, STRIDE_H,
                )  # fmt: skip
            tl.debug_barrier()  # the sums are read back by other threads of the program


@triton.jit
def _correlate_rows(
    grad_rows, x, first_row, first_columns, height, width, row_stride, column_stride,
    partial, kernel_width, channels, channel_mask, accumulate, TAPS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = len(grad_rows)
    x += row_offset(first_row, row_stride)
    for kx in range(kernel_width):
        sums = zero_rows(TAPS, grad_rows[0].shape[0], grad_rows[0].shape[1])
        columns = first_columns + kx
        mask = ((columns >= 0) & (columns < width))[:, None] & channel_mask[None, :]
        pointers = x
        for r in tl.static_range((ROWS - 1) * STRIDE + TAPS):
            tile = load_row(pointers, first_row + r, height, mask)
            sums = add_correlations(sums, tile, grad_rows, r, STRIDE)
            pointers += row_stride
        x += column_stride
        for ky in tl.static_range(TAPS):
            add_sum(partial + (ky * kernel_width + kx) * channels, sums[ky], channel_mask, accumulate)


@triton.jit(do_not_specialize=EXTENTS)
def sum_partials_kernel(partials, sums, splits, count, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """``sums[count] = Σ partials[splits, count]``, in a fixed order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
        total += tl.load(partials + split * count + offsets[None, :], mask=(split < splits) & mask[None, :], other=0.0)
    tl.store(sums + offsets, tl.sum(total, 0), mask=mask)


@triton.jit(do_not_specialize=EXTENTS)
def filter_gradients_kernel(
    sums, weight, weight_strides, bias, scale, grad_weight, grad_weight_strides, grad_bias, grad_scale,
    channels, kernel_height, kernel_width, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Sums ``[taps + 1, C]`` of a convolution's filter and bias gradient in the layout and dtype of the parameters.

    With ``scale`` they belong to ``scale · (DW + bias)`` and were taken as if the scale were 1; then the gradient of
    the scale is the sum of the products of the parameters with their gradients, and needs no convolution of its own.
    """
    weight_strides = in_elements(weight_strides, 0, ALIGN)
    if grad_weight is not None:
        grad_weight_strides = in_elements(grad_weight_strides, 0, ALIGN)
    channels = channels * ALIGN
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = c < channels
    s = tl.load(scale + c, mask=channel_mask, other=0.0).to(tl.float32) if scale is not None else 1.0
    taps = kernel_height * kernel_width
    bias_sum = tl.load(sums + tl.cast(taps, tl.int64) * channels + c, mask=channel_mask, other=0.0)
    if grad_bias is not None:
        tl.store(grad_bias + c, (bias_sum * s).to(grad_bias.dtype.element_ty), mask=channel_mask)
    total = tl.zeros((BLOCK_C,), tl.float32)
    if bias is not None:
        total += bias_sum * tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32)
    for first in range(0, taps, BLOCK_T):
        tap = first + tl.arange(0, BLOCK_T)
        mask = (tap < taps)[:, None] & channel_mask[None, :]
        values = tl.load(sums + tap.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0.0)
        ky, kx = (tap // kernel_width).to(tl.int64)[:, None], (tap % kernel_width).to(tl.int64)[:, None]
        c64 = c.to(tl.int64)[None, :]
        if grad_scale is not None:
            pointers = weight + c64 * weight_strides[0] + ky * weight_strides[1] + kx * weight_strides[2]
            total += tl.sum(values * tl.load(pointers, mask=mask, other=0.0).to(tl.float32), 0)
        if grad_weight is not None:
            pointers = grad_weight + c64 * grad_weight_strides[0]
            pointers = pointers + ky * grad_weight_strides[1] + kx * grad_weight_strides[2]
            scaled = values * s[None, :] if scale is not None else values
            tl.store(pointers, scaled.to(grad_weight.dtype.element_ty), mask=mask)
    if grad_scale is not None:
        tl.store(grad_scale + c, total.to(grad_scale.dtype.element_ty), mask=channel_mask)
