"""Normalises the arguments that a user passed to an operator, or raises one exception that says what is wrong.

Normalised arguments follow the operators' schemas: explicit strides and paddings, one-dimensional vectors, and
two-dimensional 1×1 weights. Backends rely on them; native operators check again what memory safety needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.activations import ACTIVATIONS


def autocast(*args) -> tuple:
    """Casts tensors other than float64 to autocast's dtype, as for convolutions; the first one determines the
    device."""
    if not isinstance(args[0], Tensor):
        return args
    device = args[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return args
    dtype = torch.get_autocast_dtype(device)

    def cast(value):
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    return tuple(map(cast, args))


def check_map(name: str, x, *, may_be_empty: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name}: expected a map [N, C, H, W], got {len(shape)} dimensions (shape {list(shape)})")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if shape[1] == 0:
        raise ValueError(f"{name}: expected at least one channel, got the shape {list(shape)}")
    if not may_be_empty and (shape[2] == 0 or shape[3] == 0):
        raise ValueError(f"{name}: expected a map with height and width, got the shape {list(shape)}")


def check_like(name: str, value, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != like.dtype:
        raise ValueError(f"{name}: expected the map's dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected the map's device {like.device}, got {value.device}")


def check_filter(name: str, weight, x: Tensor) -> None:
    """Checks a depthwise filter, of any number of channels."""
    check_like(name, weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != 1 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{name}: expected a depthwise filter [channels, 1, kh, kw], got the shape {list(shape)}")


def check_own_filter(name: str, weight, x: Tensor, of: str) -> None:
    """Checks a depthwise filter with one output for each channel of a map, named ``of`` in errors."""
    check_filter(name, weight, x)
    if weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"{name}: expected {x.shape[1]} filters (one for each channel of {of}), got {list(weight.shape)}"
        )


def channel_vector(name: str, vector, channels: int, like: Tensor) -> Tensor | None:
    """Accepts [C] and, as layer scales are stored, [C, 1, 1]."""
    if vector is None:
        return None
    check_like(name, vector, like)
    shape = vector.shape
    if len(shape) != 1:
        if len(shape) != 3 or shape[1] != 1 or shape[2] != 1:
            raise ValueError(f"{name}: expected the shape [{channels}], got {list(shape)}")
        vector = vector.reshape(-1)
    if shape[0] != channels:
        raise ValueError(f"{name}: expected {channels} elements, got {shape[0]}")
    return vector


def matrix(name: str, weight, inputs: int, like: Tensor) -> Tensor:
    """Accepts [O, I] and, as 1×1 convolutions store it, [O, I, 1, 1]."""
    check_like(name, weight, like)
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


def check_residual(residual, x: Tensor, channels: int, size: tuple[int, ...] | None = None) -> None:
    """Checks a residual of so many channels, of x's size or another."""
    if residual is None:
        return
    check_like("residual", residual, x)
    expected = (x.shape[0], channels, *(size or x.shape[2:]))
    if residual.shape != expected:
        raise ValueError(f"residual: expected the shape {list(expected)}, got {list(residual.shape)}")


def check_activation(activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def strides_and_padding(kernel, stride, padding) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Stride as (vertical, horizontal), padding as (top, bottom, left, right)."""
    strides = _pair("stride", stride)
    if strides[0] not in (1, 2) or strides[1] not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    return strides, _padding(padding, kernel)


def spelled_convolution(x, weight, bias, stride, padding, activation) -> tuple:
    return x, weight, bias, *strides_and_padding(weight.shape[2:], stride, padding), activation


def result_size(x: Tensor, weight: Tensor, stride, padding) -> tuple[int, int]:
    """Height and width of a convolution's result."""
    height = (x.shape[2] + padding[0] + padding[1] - weight.shape[2]) // stride[0] + 1
    width = (x.shape[3] + padding[2] + padding[3] - weight.shape[3]) // stride[1] + 1
    return height, width


def spelled_mixer(*arguments) -> tuple:
    """Normalises arguments that end with scale and residual; the CPU kernel accepts 1×1 weights in any form."""
    *rest, scale, residual = arguments
    return arguments if scale is None or scale.dim() != 3 else (*rest, scale.reshape(scale.shape[0]), residual)


def geometry(x: Tensor, weight: Tensor, stride, padding) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Like :func:`strides_and_padding`, and checks that the kernel fits into the map."""
    kernel, shape = weight.shape[2:], x.shape
    strides, pads = strides_and_padding(kernel, stride, padding)
    height, width = shape[2] + pads[0] + pads[1], shape[3] + pads[2] + pads[3]
    if height < kernel[0] or width < kernel[1]:
        raise ValueError(
            f"weight: the {kernel[0]}×{kernel[1]} kernel is larger than the padded map {height}×{width} "
            f"(x has the shape {list(shape)}, padding={padding!r})"
        )
    return strides, pads


def _pair(name: str, value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not (isinstance(pair, tuple | list | torch.Size) and len(pair) == 2 and all(isinstance(v, int) for v in pair)):
        raise ValueError(f"{name}: expected an integer or a pair of integers, got {value!r}")
    return pair[0], pair[1]


def _padding(padding, kernel) -> tuple[int, int, int, int]:
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
