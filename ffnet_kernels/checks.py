"""Turns what a user passed to an operator into its normalised arguments, or into one exception that says what is wrong.

Each function returns the argument tuple of the operator's schema (see ``operators.py``): strides and paddings spelled
out, per-channel vectors one-dimensional, 1×1 weights two-dimensional. Backends take these tuples; the native CPU
operators check again what memory safety needs, and are called without these checks in eager inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")


def depthwise_conv2d(x, weight, bias, stride, padding, activation) -> tuple:
    _check_map("x", x)
    _check_extent("x", x)
    channels = x.shape[1]
    kernel = _check_filter("weight", weight, x)
    outputs = weight.shape[0]
    if outputs != channels and outputs != 2 * channels:
        raise ValueError(
            f"weight: expected {channels} or {2 * channels} filters (1 or 2 for each of x's {channels} channels), "
            f"got {outputs} (shape {list(weight.shape)})"
        )
    bias = _channel_vector("bias", bias, outputs, x)
    return x, weight, bias, *_geometry(x, kernel, stride, padding), _activation(activation)


def conv2d(x, weight, bias, stride, padding, activation) -> tuple:
    _check_map("x", x)
    _check_extent("x", x)
    _check_like("weight", weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != x.shape[1] or 0 in shape:
        raise ValueError(f"weight: expected the shape [out, {x.shape[1]}, kh, kw], got {list(shape)}")
    bias = _channel_vector("bias", bias, shape[0], x)
    return x, weight, bias, *_geometry(x, (shape[2], shape[3]), stride, padding), _activation(activation)


def ffnified_attention(query, key, key_bias, value, value_bias, activation, scale, residual) -> tuple:
    _check_map("query", query)
    channels = query.shape[1]
    _check_extent("query", query)
    for name, weight in (("key", key), ("value", value)):
        _check_filter(name, weight, query)
        if weight.shape[0] != channels:
            raise ValueError(
                f"{name}: expected {channels} filters (one for each channel of query), got {list(weight.shape)}"
            )
    key_bias = _channel_vector("key_bias", key_bias, channels, query)
    value_bias = _channel_vector("value_bias", value_bias, channels, query)
    scale = _channel_vector("scale", scale, channels, query)
    _check_residual(residual, query, channels)
    return query, key, key_bias, value, value_bias, _activation(activation), scale, residual


def channel_mixer(
    x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> tuple:
    _check_map("x", x)
    _check_extent("x", x)
    channels = x.shape[1]
    _check_filter("weight", weight, x)
    if weight.shape[0] != channels:
        raise ValueError(f"weight: expected {channels} filters (one for each channel of x), got {list(weight.shape)}")
    bias = _channel_vector("bias", bias, channels, x)
    expand_weight = _matrix("expand_weight", expand_weight, channels, x)
    hidden = expand_weight.shape[0]
    expand_bias = _channel_vector("expand_bias", expand_bias, hidden, x)
    project_weight = _matrix("project_weight", project_weight, hidden, x)
    outputs = project_weight.shape[0]
    project_bias = _channel_vector("project_bias", project_bias, outputs, x)
    scale = _channel_vector("scale", scale, outputs, x)
    _check_residual(residual, x, outputs)
    activation = _activation(activation)
    return x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual


def feed_forward(x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual) -> tuple:
    _check_map("x", x)
    expand_weight = _matrix("expand_weight", expand_weight, x.shape[1], x)
    hidden = expand_weight.shape[0]
    project_weight = _matrix("project_weight", project_weight, hidden, x)
    outputs = project_weight.shape[0]
    expand_bias = _channel_vector("expand_bias", expand_bias, hidden, x)
    project_bias = _channel_vector("project_bias", project_bias, outputs, x)
    scale = _channel_vector("scale", scale, outputs, x)
    _check_residual(residual, x, outputs)
    return x, expand_weight, expand_bias, project_weight, project_bias, _activation(activation), scale, residual


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check_map(name: str, x) -> None:
    _check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected a map [N, C, H, W], got {x.dim()} dimensions (shape {list(x.shape)})")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one channel, got the shape {list(x.shape)}")


def _check_extent(name: str, x: Tensor) -> None:
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: expected a map with height and width, got the shape {list(x.shape)}")


def _check_like(name: str, value, like: Tensor) -> None:
    _check_tensor(name, value)
    if value.dtype != like.dtype:
        raise ValueError(f"{name}: expected the map's dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected the map's device {like.device}, got {value.device}")


def _check_filter(name: str, weight, x: Tensor) -> tuple[int, int]:
    _check_like(name, weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != 1 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{name}: expected a depthwise filter [channels, 1, kh, kw], got the shape {list(shape)}")
    return shape[2], shape[3]


def _channel_vector(name: str, vector, channels: int, like: Tensor) -> Tensor | None:
    """Accepts [C] and, as layer scales are stored, [C, 1, 1]."""
    if vector is None:
        return None
    _check_like(name, vector, like)
    if vector.dim() != 1:
        if vector.dim() == 3 and vector.shape[1] == 1 and vector.shape[2] == 1:
            vector = vector.reshape(-1)
        else:
            raise ValueError(f"{name}: expected the shape [{channels}], got {list(vector.shape)}")
    if vector.shape[0] != channels:
        raise ValueError(f"{name}: expected {channels} elements, got {vector.shape[0]}")
    return vector


def _matrix(name: str, weight, inputs: int, like: Tensor) -> Tensor:
    """Accepts [O, I] and, as 1×1 convolutions store it, [O, I, 1, 1]."""
    _check_like(name, weight, like)
    shape = weight.shape
    if len(shape) == 4 and shape[2] == 1 and shape[3] == 1:
        weight = weight.flatten(1)
    elif len(shape) != 2:
        raise ValueError(f"{name}: expected the shape [out, {inputs}] or [out, {inputs}, 1, 1], got {list(shape)}")
    if shape[1] != inputs:
        raise ValueError(f"{name}: expected {inputs} input channels, got {shape[1]} (shape {list(shape)})")
    if shape[0] == 0:
        raise ValueError(f"{name}: expected at least one output channel, got the shape {list(shape)}")
    return weight


def strides_and_padding(kernel, stride, padding) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Spelled out: (vertical, horizontal) and (top, bottom, left, right)."""
    strides = _pair("stride", stride)
    if strides[0] not in (1, 2) or strides[1] not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    return strides, _padding(padding, kernel)


def _geometry(x: Tensor, kernel: tuple[int, int], stride, padding) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """As :func:`strides_and_padding`, for a map that the kernel fits into."""
    strides, pads = strides_and_padding(kernel, stride, padding)
    height, width = x.shape[2] + pads[0] + pads[1], x.shape[3] + pads[2] + pads[3]
    if height < kernel[0] or width < kernel[1]:
        raise ValueError(
            f"weight: the {kernel[0]}×{kernel[1]} kernel is larger than the padded map {height}×{width} "
            f"(x has the shape {list(x.shape)}, padding={padding!r})"
        )
    return strides, pads


def _check_residual(residual, x: Tensor, channels: int) -> None:
    if residual is None:
        return
    _check_like("residual", residual, x)
    expected = [x.shape[0], channels, x.shape[2], x.shape[3]]
    if list(residual.shape) != expected:
        raise ValueError(f"residual: expected the shape {expected}, got {list(residual.shape)}")


def _activation(activation) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def _pair(name: str, value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not (isinstance(pair, tuple | list | torch.Size) and len(pair) == 2 and all(isinstance(v, int) for v in pair)):
        raise ValueError(f"{name}: expected an integer or a pair of integers, got {value!r}")
    return pair[0], pair[1]


def _padding(padding, kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right). "same" pads kernel - 1 in all, the odd one at the end, as torch does."""
    if padding == "same":
        top, left = (kernel[0] - 1) // 2, (kernel[1] - 1) // 2
        return top, kernel[0] - 1 - top, left, kernel[1] - 1 - left
    if padding == "valid":
        return 0, 0, 0, 0
    if isinstance(padding, str):
        raise ValueError(f"padding: expected 'same', 'valid' or a number of pixels, got {padding!r}")
    height, width = _pair("padding", padding)
    if height < 0 or width < 0:
        raise ValueError(f"padding: expected no negative number, got {padding!r}")
    return height, height, width, width
