"""The operators as functions: check the arguments, choose a backend, run it.

Maps are ``[N, C, H, W]`` in any layout; the result has the memory format that ``torch.nn.functional.conv2d`` would
give. float64, float32, bfloat16 and float16 are taken; sums are accumulated in float32 or wider. All functions are
differentiable to any order and honour ``torch.autocast`` as a convolution does.

A NaN or an infinity in a map is never lost. It may show in more results than plain PyTorch would show it in: the CUDA
kernels for 16-bit NCHW maps multiply rows of a map with banded matrices, whose zeros make NaN of it in all columns of
the window of 8 results around it (and, where strides or a second convolution widen the window, next to that), in the
rows that a filter of 3 or of 7 rows reaches, and in gradients of taps that do not read it. An infinite weight makes NaN
where it meets the zeros of padding.

Raises (all functions): TypeError for an argument that is no tensor; ValueError for a wrong shape, dtype, device,
stride, padding or activation; :class:`ffnet_kernels.BackendError` where a backend was forced that does not take the
call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, dispatch

_ops = torch.ops.ffnet_kernels


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    activation: str = "none",
) -> Tensor:
    """Depthwise convolution with its activation: ``act(DW(x; weight) + bias)``.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, 1, kh, kw]`` or, for two outputs per input channel, ``[2·C, 1, kh, kw]``.
        bias: ``[C]`` (or ``[2·C]``) or None.
        stride: 1 or 2, or a pair of them.
        padding: zeros around the map: ``"same"`` (``kernel - 1`` in all, for an even kernel the odd one at the bottom
            and right; stride 2 then halves, rounding up), ``"valid"`` (none), or pixels on each side.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C or 2·C, H', W']``.
    """
    if dispatch.is_plain_cpu_call("depthwise_conv2d", x, (weight,), (bias,)) and weight.dim() == 4:
        strides, pads = checks.strides_and_padding(weight.shape[2:], stride, padding)
        return _at_once(
            "depthwise_conv2d",
            (x, weight, bias, strides, pads, activation),
            (x, weight, bias, stride, padding, activation),
        )
    x, weight, bias = autocast(x, weight, bias)
    args = checks.depthwise_conv2d(x, weight, bias, stride, padding, activation)
    return dispatch.select("depthwise_conv2d", args).depthwise_conv2d(*args)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    activation: str = "none",
) -> Tensor:
    """Convolution of one group with its activation: ``act(conv(x; weight) + bias)``, for what stands around depthwise
    layers: 1×1 projections and strided stems.

    It has a kernel on the CPU, and one for the gradients of 1×1 convolutions of channels-last float32 maps without
    activation; elsewhere plain PyTorch runs.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[O, C, kh, kw]``.
        bias: ``[O]`` or None.
        stride, padding, activation: as in :func:`depthwise_conv2d`.

    Returns:
        ``[N, O, H', W']``.
    """
    if dispatch.is_plain_cpu_call("conv2d", x, (weight,), (bias,)) and weight.dim() == 4:
        strides, pads = checks.strides_and_padding(weight.shape[2:], stride, padding)
        return _at_once(
            "conv2d", (x, weight, bias, strides, pads, activation), (x, weight, bias, stride, padding, activation)
        )
    x, weight, bias = autocast(x, weight, bias)
    args = checks.conv2d(x, weight, bias, stride, padding, activation)
    return dispatch.select("conv2d", args).conv2d(*args)


def ffnified_attention(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    value: Tensor,
    value_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """FFNified attention, FFNet's token mixer after its query projection (arXiv 2406.02021, section 3):
    ``residual + scale · (DW(act(DW(query; key) + key_bias); value) + value_bias)``.

    Fused backends never write the middle map to memory; it is rounded to the dtype of the maps all the same.

    Args:
        query: ``[N, C, H, W]``, the projected input.
        key, value: static keys and values, depthwise filters ``[C, 1, kh, kw]``, stride 1, "same" padding.
        key_bias, value_bias: ``[C]`` or None.
        activation: between the two convolutions; as in :func:`depthwise_conv2d`.
        scale: layer scale ``[C]`` or ``[C, 1, 1]``, or None.
        residual: ``[N, C, H, W]`` or None.

    Returns:
        ``[N, C, H, W]``.
    """
    call = (query, key, key_bias, value, value_bias, activation, scale, residual)
    filters = (key, value) if residual is None else (key, value, residual)
    if dispatch.is_plain_cpu_call("ffnified_attention", query, filters, (key_bias, value_bias, scale)):
        return _at_once("ffnified_attention", call, call)
    query, key, key_bias, value, value_bias, scale, residual = autocast(
        query, key, key_bias, value, value_bias, scale, residual
    )
    args = checks.ffnified_attention(query, key, key_bias, value, value_bias, activation, scale, residual)
    return dispatch.select("ffnified_attention", args).ffnified_attention(*args)


def channel_mixer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolutional feed-forward network, FFNet's channel mixer (arXiv 2406.02021, section 3):
    ``residual + scale · (W₂ · act(W₁ · (DW(x; weight) + bias) + b₁) + b₂)``.

    The hidden map is rounded to the dtype of the maps, also where a fused backend never writes it to memory.

    Args:
        x: ``[N, C, H, W]``.
        weight, bias: depthwise filter ``[C, 1, kh, kw]``, "same" padding, and ``[C]`` or None.
        expand_weight, expand_bias: ``[D, C]`` (or ``[D, C, 1, 1]``) and ``[D]`` or None.
        project_weight, project_bias: ``[O, D]`` (or ``[O, D, 1, 1]``) and ``[O]`` or None.
        activation: on the hidden map; as in :func:`depthwise_conv2d`.
        scale: layer scale ``[O]`` or ``[O, 1, 1]``, or None.
        residual: ``[N, O, H, W]`` or None.

    Returns:
        ``[N, O, H, W]``.
    """
    call = (
        x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
    )  # fmt: skip
    weights = (
        (weight, expand_weight, project_weight)
        if residual is None
        else (weight, expand_weight, project_weight, residual)
    )
    if dispatch.is_plain_cpu_call("channel_mixer", x, weights, (bias, expand_bias, project_bias, scale)):
        return _at_once("channel_mixer", call, call)
    x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, scale, residual = autocast(
        x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, scale, residual
    )
    args = checks.channel_mixer(
        x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
    )
    return dispatch.select("channel_mixer", args).channel_mixer(*args)


def _at_once(operator: str, args: tuple, checked: tuple) -> Tensor:
    """The native operator's result. It checks its arguments itself, which spares small maps the checks in Python; those
    say in better words what is wrong."""
    try:
        return getattr(_ops, operator).default(*args)
    except (RuntimeError, TypeError):
        getattr(checks, operator)(*checked)
        raise


_PUBLIC: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (depthwise_conv2d, conv2d, ffnified_attention, channel_mixer)
}


def explain(operator: str | Callable[..., Tensor], *args, **kwargs) -> dispatch.Decision:
    """Which backend would run ``operator(*args, **kwargs)``, which variant of it, and why not the others.

    Nothing is computed. The result prints as text.

    Args:
        operator: one of the functions of this module, or its name.

    Raises:
        ValueError: for an unknown operator, and whatever the call itself would raise.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in _PUBLIC:
        raise ValueError(f"explain: expected one of {', '.join(_PUBLIC)}, got {operator!r}")
    bound = inspect.signature(_PUBLIC[name]).bind(*args, **kwargs)
    bound.apply_defaults()
    return dispatch.decide(name, getattr(checks, name)(*autocast(*bound.arguments.values())))


def autocast(x, *others) -> tuple:
    """Under autocast, tensors in its dtype but for float64, as convolutions do it."""
    if not isinstance(x, Tensor):
        return (x, *others)
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)

    def cast(value):
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    return tuple(map(cast, (x, *others)))
