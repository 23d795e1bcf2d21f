"""Kernels of the channel mixer: products with 1×1 weights over the pixels of maps, and what is fused around them.

A map is a matrix [P, C] of pixels by channels for each image, wherever its strides put them, as long as its pixels lie
evenly in memory. Where the images do too, the host passes all of them as one.
"""

import triton
import triton.language as tl

from .activation import activate, derivative
from .rows import EXTENTS, in_elements


@triton.jit
def _matrix(map, strides, image, p, c):
    """Pointers to pixels p and channels c of an image, a matrix [P, C]."""
    pixels = p.to(tl.int64)[:, None] * strides[3]
    return map + tl.cast(image, tl.int64) * strides[0] + pixels + c.to(tl.int64)[None, :] * strides[1]


@triton.jit
def _block(program, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program, in groups of rows that share their operands in the cache."""
    size = GROUP * columns
    first = program // size * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + program % size % height, program % size // height


@triton.jit(do_not_specialize=EXTENTS)
def pointwise_forward_kernel(
    x, x_strides, weight, weight_strides, bias, scale, residual, residual_strides, out, out_strides,
    images, count, channels, outputs,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    MAP_UNIT: tl.constexpr, MATRIX_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``residual + scale · act(W·x + bias)`` for every pixel; weight [outputs, channels] by strides."""
    x_strides = in_elements(x_strides, MAP_UNIT, ALIGN)
    weight_strides = in_elements(weight_strides, MATRIX_UNIT, ALIGN)
    if residual is not None:
        residual_strides = in_elements(residual_strides, MAP_UNIT, ALIGN)
    out_strides = in_elements(out_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    outputs = outputs * ALIGN
    blocks = tl.cdiv(count, BLOCK_P)
    row, column = _block(tl.program_id(0), images * blocks, tl.cdiv(outputs, BLOCK_O), 8)
    image, p = row // blocks, row % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    pixel_mask = p < count
    o = column * BLOCK_O + tl.arange(0, BLOCK_O)
    output_mask = o < outputs
    o64 = o.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_tile = _matrix(x, x_strides, image, p, k)
    weight_tile = weight + o64[None, :] * weight_strides[0] + k.to(tl.int64)[:, None] * weight_strides[1]
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for first in range(0, channels, BLOCK_K):
        inside = first + k < channels
        a = tl.load(x_tile, mask=pixel_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight_tile, mask=inside[:, None] & output_mask[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_tile += tl.cast(BLOCK_K, tl.int64) * x_strides[1]
        weight_tile += tl.cast(BLOCK_K, tl.int64) * weight_strides[1]
    if bias is not None:
        total += tl.load(bias + o, mask=output_mask, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    if scale is not None:
        total *= tl.load(scale + o, mask=output_mask, other=0.0).to(tl.float32)[None, :]
    mask = pixel_mask[:, None] & output_mask[None, :]
    if residual is not None:
        pointers = _matrix(residual, residual_strides, image, p, o)
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers = _matrix(out, out_strides, image, p, o)
    tl.store(pointers, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=EXTENTS)
def channel_mixer_forward_kernel(
    mixed, mixed_strides, expand_weight, expand_weight_strides, expand_bias,
    project_weight, project_weight_strides, project_bias, scale, residual, residual_strides, out, out_strides,
    images, count, channels, hidden, outputs,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    MAP_UNIT: tl.constexpr, MATRIX_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``residual + scale · (W₂ · act(W₁·mixed + b₁) + b₂)``; the hidden map stays on chip.

    BLOCK_K covers all channels and BLOCK_O all outputs; the hidden channels pass by, BLOCK_H at a time, and round to
    the dtype of the maps for the second product.
    """
    mixed_strides = in_elements(mixed_strides, MAP_UNIT, ALIGN)
    expand_weight_strides = in_elements(expand_weight_strides, MATRIX_UNIT, ALIGN)
    project_weight_strides = in_elements(project_weight_strides, MATRIX_UNIT, ALIGN)
    if residual is not None:
        residual_strides = in_elements(residual_strides, MAP_UNIT, ALIGN)
    out_strides = in_elements(out_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    hidden = hidden * ALIGN
    outputs = outputs * ALIGN
    blocks = tl.cdiv(count, BLOCK_P)
    image, p = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    pixel_mask = p < count
    k = tl.arange(0, BLOCK_K)
    o = tl.arange(0, BLOCK_O)
    d = tl.arange(0, BLOCK_H)
    mixed_tile = _matrix(mixed, mixed_strides, image, p, k)
    a = tl.load(mixed_tile, mask=pixel_mask[:, None] & (k < channels)[None, :], other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    expand_tile = expand_weight + k.to(tl.int64)[:, None] * expand_weight_strides[1]
    project_tile = project_weight + o.to(tl.int64)[None, :] * project_weight_strides[0]
    for first in range(0, hidden, BLOCK_H):
        rows = first + d
        inside = rows < hidden
        expand = expand_tile + rows.to(tl.int64)[None, :] * expand_weight_strides[0]
        b = tl.load(expand, mask=(k < channels)[:, None] & inside[None, :], other=0.0)
        middle = tl.dot(a, b, input_precision=PRECISION)
        if expand_bias is not None:
            middle += tl.load(expand_bias + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
        middle = activate(middle, ACTIVATION).to(mixed.dtype.element_ty)
        project = project_tile + rows.to(tl.int64)[:, None] * project_weight_strides[1]
        c = tl.load(project, mask=inside[:, None] & (o < outputs)[None, :], other=0.0)
        total = tl.dot(middle, c, total, input_precision=PRECISION)
    output_mask = o < outputs
    if project_bias is not None:
        total += tl.load(project_bias + o, mask=output_mask, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        total *= tl.load(scale + o, mask=output_mask, other=0.0).to(tl.float32)[None, :]
    mask = pixel_mask[:, None] & output_mask[None, :]
    if residual is not None:
        pointers = _matrix(residual, residual_strides, image, p, o)
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers = _matrix(out, out_strides, image, p, o)
    tl.store(pointers, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=EXTENTS)
def channel_mixer_backward_kernel(
    grad, grad_strides, mixed, mixed_strides, expand_weight, expand_weight_strides, expand_bias, project_weight,
    project_weight_strides, hidden_map, hidden_map_strides, grad_before, grad_before_strides,
    images, count, channels, hidden, outputs,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    MAP_UNIT: tl.constexpr, MATRIX_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The hidden map ``act(W₁·mixed + b₁)`` again, and the gradient before its activation, ``(W₂ᵀ·grad) · act'``.

    ``project_weight`` carries the scale already.
    """
    grad_strides = in_elements(grad_strides, MAP_UNIT, ALIGN)
    mixed_strides = in_elements(mixed_strides, MAP_UNIT, ALIGN)
    expand_weight_strides = in_elements(expand_weight_strides, MATRIX_UNIT, ALIGN)
    project_weight_strides = in_elements(project_weight_strides, MATRIX_UNIT, ALIGN)
    hidden_map_strides = in_elements(hidden_map_strides, MAP_UNIT, ALIGN)
    grad_before_strides = in_elements(grad_before_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    hidden = hidden * ALIGN
    outputs = outputs * ALIGN
    blocks = tl.cdiv(count, BLOCK_P)
    row, column = _block(tl.program_id(0), images * blocks, tl.cdiv(hidden, BLOCK_O), 8)
    image, p = row // blocks, row % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    pixel_mask = p < count
    d = column * BLOCK_O + tl.arange(0, BLOCK_O)
    hidden_mask = d < hidden
    d64 = d.to(tl.int64)[None, :]
    k = tl.arange(0, BLOCK_K)
    k64 = k.to(tl.int64)
    before = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    tile = _matrix(mixed, mixed_strides, image, p, k)
    weight_tile = expand_weight + d64 * expand_weight_strides[0] + k64[:, None] * expand_weight_strides[1]
    for first in range(0, channels, BLOCK_K):
        inside = first + k < channels
        a = tl.load(tile, mask=pixel_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight_tile, mask=inside[:, None] & hidden_mask[None, :], other=0.0)
        before = tl.dot(a, b, before, input_precision=PRECISION)
        tile += tl.cast(BLOCK_K, tl.int64) * mixed_strides[1]
        weight_tile += tl.cast(BLOCK_K, tl.int64) * expand_weight_strides[1]
    if expand_bias is not None:
        before += tl.load(expand_bias + d, mask=hidden_mask, other=0.0).to(tl.float32)[None, :]
    mask = pixel_mask[:, None] & hidden_mask[None, :]
    pointers = _matrix(hidden_map, hidden_map_strides, image, p, d)
    tl.store(pointers, activate(before, ACTIVATION).to(hidden_map.dtype.element_ty), mask=mask)
    grad_hidden = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    tile = _matrix(grad, grad_strides, image, p, k)
    weight_tile = project_weight + k64[:, None] * project_weight_strides[0] + d64 * project_weight_strides[1]
    for first in range(0, outputs, BLOCK_K):
        inside = first + k < outputs
        a = tl.load(tile, mask=pixel_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight_tile, mask=inside[:, None] & hidden_mask[None, :], other=0.0)
        grad_hidden = tl.dot(a, b, grad_hidden, input_precision=PRECISION)
        tile += tl.cast(BLOCK_K, tl.int64) * grad_strides[1]
        weight_tile += tl.cast(BLOCK_K, tl.int64) * project_weight_strides[0]
    pointers = _matrix(grad_before, grad_before_strides, image, p, d)
    result = grad_hidden * derivative(before, ACTIVATION)
    tl.store(pointers, result.to(grad_before.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=EXTENTS)
def pointwise_backward_weight_kernel(
    grad, grad_strides, x, x_strides, partials, bias_partials,
    images, count, channels, outputs, splits,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    MAP_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient [outputs, channels] of a 1×1 weight and [outputs] of its bias, summed over pixels.

    ``partials[splits, outputs, channels]`` and ``bias_partials[splits, outputs]`` take the sums over each program's
    share of the pixels.
    """
    grad_strides = in_elements(grad_strides, MAP_UNIT, ALIGN)
    x_strides = in_elements(x_strides, MAP_UNIT, ALIGN)
    channels = channels * ALIGN
    outputs = outputs * ALIGN
    columns = tl.cdiv(channels, BLOCK_K)
    rows = tl.cdiv(outputs, BLOCK_O)
    split = tl.program_id(0) // (rows * columns)
    block = tl.program_id(0) % (rows * columns)
    o = block // columns * BLOCK_O + tl.arange(0, BLOCK_O)
    k = block % columns * BLOCK_K + tl.arange(0, BLOCK_K)
    output_mask, channel_mask = o < outputs, k < channels
    o64, k64 = o.to(tl.int64), k.to(tl.int64)
    total = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    bias_total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    blocks = tl.cdiv(count, BLOCK_P)
    for work in range(split, images * blocks, splits):
        image, p = work // blocks, work % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        pixel_mask = p < count
        grad_tile = _matrix(grad, grad_strides, image, p, o)
        a = tl.load(grad_tile, mask=pixel_mask[:, None] & output_mask[None, :], other=0.0)
        x_tile = _matrix(x, x_strides, image, p, k)
        b = tl.load(x_tile, mask=pixel_mask[:, None] & channel_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        bias_total += a.to(tl.float32)
    split64 = tl.cast(split, tl.int64)
    pointers = partials + (split64 * outputs + o64[:, None]) * channels + k64[None, :]
    tl.store(pointers, total, mask=output_mask[:, None] & channel_mask[None, :])
    if block % columns == 0:
        tl.store(bias_partials + split64 * outputs + o, tl.sum(bias_total, 0), mask=output_mask)


@triton.jit(do_not_specialize=EXTENTS)
def pointwise_gradients_kernel(
    sums, bias_sums, weight, weight_strides, bias, scale, grad_weight, grad_weight_strides, grad_bias, grad_scale,
    channels, outputs, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    MATRIX_UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Sums [outputs, channels] and [outputs] in the layout and dtype of the parameters; the scale as with
    ``filter_gradients_kernel``: the sums are those without it, and its gradient is made of them."""
    weight_strides = in_elements(weight_strides, MATRIX_UNIT, ALIGN)
    if grad_weight is not None:
        grad_weight_strides = in_elements(grad_weight_strides, MATRIX_UNIT, ALIGN)
    channels = channels * ALIGN
    outputs = outputs * ALIGN
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    output_mask = o < outputs
    o64 = o.to(tl.int64)[:, None]
    s = tl.load(scale + o, mask=output_mask, other=0.0).to(tl.float32) if scale is not None else 1.0
    bias_sum = tl.load(bias_sums + o, mask=output_mask, other=0.0)
    if grad_bias is not None:
        tl.store(grad_bias + o, (bias_sum * s).to(grad_bias.dtype.element_ty), mask=output_mask)
    total = tl.zeros((BLOCK_O,), tl.float32)
    if bias is not None:
        total += bias_sum * tl.load(bias + o, mask=output_mask, other=0.0).to(tl.float32)
    for first in range(0, channels, BLOCK_K):
        k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = output_mask[:, None] & (k < channels)
        values = tl.load(sums + o64 * channels + k, mask=mask, other=0.0)
        if grad_scale is not None:
            pointers = weight + o64 * weight_strides[0] + k * weight_strides[1]
            total += tl.sum(values * tl.load(pointers, mask=mask, other=0.0).to(tl.float32), 1)
        if grad_weight is not None:
            pointers = grad_weight + o64 * grad_weight_strides[0] + k * grad_weight_strides[1]
            scaled = values * s[:, None] if scale is not None else values
            tl.store(pointers, scaled.to(grad_weight.dtype.element_ty), mask=mask)
    if grad_scale is not None:
        tl.store(grad_scale + o, total.to(grad_scale.dtype.element_ty), mask=output_mask)
