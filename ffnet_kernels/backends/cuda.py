"""The CUDA C++ kernels: float32, bfloat16 and float16, any layout; on tensor cores for 16-bit NCHW maps from sm_80 on.

Which kernel a call runs is decided in ``csrc/cuda/dispatch.h``. With ``FFNET_KERNELS_CUDA_HOST`` the same kernels,
compiled for the processor, take CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import reference
from .maps import empty_output, same_padding, suggests_channels_last

NAME = "cuda"
_ops = torch.ops.ffnet_kernels_cuda
OPERATORS = ("depthwise_conv2d", "ffnified_attention", "channel_mixer")
#: Which a program may have that is loaded where there is no Python, which puts channel mixers together.
IN_LIBRARY = ("depthwise_conv2d", "ffnified_attention")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (7, 5)
#: Those of csrc/cuda/activation.h.
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")
_MOST, _MOST_PIXELS = 2**28, 2**30
_DEVICE = "cpu" if native.cuda_host_library() else "cuda"


@functools.cache
def unavailable() -> str | None:
    error = native.cuda_library_error()
    if error is None and _DEVICE == "cuda" and torch.cuda.device_count() == 0:
        return "there is no GPU"
    return error


def _device_error(index: int) -> str | None:
    """Why the library does not run on a GPU: not built for it, or the driver is older than the library's CUDA."""
    if _DEVICE == "cuda" and torch.cuda.get_device_capability(index) < _OLDEST:
        return f"takes GPUs from sm_75 on, and cuda:{index} is older"
    return native.cuda_device_error(index)


# What torch.compiler.assume_constant_result sets, which imports the compiler: it cannot trace a call of the library.
_device_error._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.device.type != _DEVICE:
        return f"takes {_DEVICE.upper()} tensors, got {x.device}"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    images = 1 if torch.compiler.is_exporting() else x.shape[0]  # a program has one way for any number
    if max(x.shape[1:]) > _MOST or images * x.shape[2] * x.shape[3] > _MOST_PIXELS:
        return f"takes up to 2^28 channels, rows and columns and 2^30 pixels, got the shape {list(x.shape)}"
    for activation in (a for a in args if isinstance(a, str)):
        if activation not in ACTIVATIONS:
            return f"has no kernel for the activation {activation}"
    return _device_error(x.device.index or 0)


def slower(operator: str, args: tuple) -> str | None:
    return "run on the processor, for tests" if _DEVICE == "cpu" else None


def describe(operator: str, args: tuple) -> str:
    if operator == "depthwise_conv2d":
        x, weight, _, stride, padding, _ = args
        return _ops.describe_depthwise_conv2d(x, weight, stride, padding)
    if operator == "ffnified_attention":
        query, key, _, value, *_, residual = args
        return _ops.describe_ffnified_attention(query, key, value, residual)
    x, weight, _, expand_weight, _, project_weight, *_, residual = args
    depthwise = _ops.describe_depthwise_conv2d(x, weight, (1, 1), same_padding(weight))
    fused = _ops.channel_mixer_fits(x, expand_weight, project_weight, residual, x)
    products = "both 1×1 convolutions in one kernel" if fused else "1×1 convolutions by torch, one pass after each"
    return f"depthwise on {depthwise}; {products}"


def run_forward(operator: Any, out: Tensor, args: tuple) -> Tensor:
    """What the library does not register itself: the channel mixer, and every call that it refuses."""
    if operator.name != "channel_mixer" or refusal(operator.name, args) is not None or unavailable() is not None:
        return out.copy_(operator.reference(*args))
    x, weight, bias, *pointwise = args
    mixed = convolve(x, weight, bias, (1, 1), same_padding(weight))
    return _pointwise_forward(out, mixed, *pointwise)


def run_backward(operator: Any, call: tuple) -> list:
    """The gradients of a call, None where one is not wanted; ``operator`` is an ``ops.Operator``."""
    if refusal(operator.name, call) is not None or unavailable() is not None:
        return operator.defined.gradient(reference, *call)
    if operator.name == "channel_mixer":
        return _channel_mixer_backward(*call)
    # Without an activation convolve_backward decides: one gradient alone is read faster by its own kernel.
    if operator.name == "depthwise_conv2d" and call[6] != "none" and (grads := _depthwise_backward(*call)) is not None:
        return grads
    if operator.name == "ffnified_attention" and (grads := _attention_backward(*call)) is not None:
        return grads
    return operator.defined.gradient(sys.modules[__name__], *call)


def convolve(x, weight, bias, stride, padding) -> Tensor:
    return activated(x, weight, bias, stride, padding, "none")


def activated(x, weight, bias, stride, padding, activation) -> Tensor:
    return _ops.depthwise_conv2d.default(x, weight, bias, stride, padding, activation)


def activation_backward(grad, x, weight, bias, stride, padding, activation) -> Tensor:
    """The gradient of the convolution's result, from that of its activation."""
    return _ops.depthwise_conv2d_activation_backward.default(grad, x, weight, bias, stride, padding, activation)


def convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias, None where the mask says that one is not wanted."""
    if mask[0] and any(mask[1:]):
        fused = _depthwise_backward(grad, x, weight, None, stride, padding, "none", mask)
        if fused is not None:
            return fused
    grads: list[Tensor | None] = [None, None, None]
    if mask[0]:
        grads[0] = _ops.depthwise_conv2d_dgrad.default(grad, weight, x, stride, padding)
    if mask[1] or mask[2]:
        wanted = _ops.depthwise_conv2d_wgrad.default(grad, x, weight.shape[2:], stride, padding)
        grads[1:] = [g if m else None for g, m in zip(wanted, mask[1:], strict=True)]
    return grads


def scaled_filter_gradients(grad, x, weight, bias, scale, padding, mask) -> list:
    """Gradients of weight, bias and scale of ``scale · (DW(x; weight) + bias)``."""
    grads = _ops.ffnified_attention_value_grads.default(grad, x, weight, bias, scale)
    return [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]


def _depthwise_backward(grad, x, weight, bias, stride, padding, activation, mask) -> list[Tensor | None] | None:
    """All gradients in one kernel, where it takes the call."""
    if not _ops.depthwise_conv2d_gradients_take(grad, x, weight, stride, padding):
        return None
    grads = _ops.depthwise_conv2d_gradients.default(grad, x, weight, bias, stride, padding, activation)
    return [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]


def _attention_backward(
    grad, query, key, key_bias, value, value_bias, activation, scale, residual, mask
) -> list[Tensor | None] | None:
    """All gradients in one kernel, where it takes the call and the first filter's or the map's are wanted."""
    if not any(mask[:3]) or not _ops.ffnified_attention_gradients_take(grad, query, key, value):
        return None
    grads = _ops.ffnified_attention_gradients.default(grad, query, key, key_bias, value, value_bias, activation, scale)
    return [g if wanted else None for g, wanted in zip(grads, mask[:6], strict=True)]


def _pointwise_forward(
    out, x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> Tensor:
    """The channel mixer after its depthwise convolution, into ``out``."""
    if _ops.channel_mixer_fits(x, expand_weight, project_weight, residual, out):
        _ops.channel_mixer_pointwise.default(
            x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual, out
        )
        return out
    hidden = _product(expand_weight, x, _map_like(x, expand_weight.shape[0]))
    _ops.bias_activation_.default(hidden, expand_bias, activation)
    _product(project_weight, hidden, out)
    _ops.scale_residual_.default(out, project_bias, scale, residual)
    return out


def _product(weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The 1×1 convolution of a dense map into another: cuDNN would transpose NCHW maps for it, a GEMM need not."""
    if suggests_channels_last(out):
        torch.matmul(x.permute(0, 2, 3, 1).flatten(0, 2), weight.T, out=out.permute(0, 2, 3, 1).flatten(0, 2))
    else:
        torch.matmul(weight, x.flatten(2), out=out.flatten(2))
    return out


def _map_like(x: Tensor, channels: int) -> Tensor:
    return empty_output((x.shape[0], channels, *x.shape[2:]), (x,))


def _channel_mixer_backward(
    grad, x, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual, mask
) -> list:
    """torch multiplies; the activation and its derivative are one pass over the hidden map and its gradient."""
    pads = same_padding(weight)
    mixed = convolve(x, weight, bias, (1, 1), pads)
    last = suggests_channels_last(mixed)
    grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    hidden = _product(expand_weight, mixed, _map_like(mixed, expand_weight.shape[0]))
    scaled = reference.scaled(grad, scale)
    hidden_grad = _product(project_weight.T, scaled, torch.empty_like(hidden))
    _ops.activation_backward_.default(hidden, expand_bias, hidden_grad, activation)
    grads: list[Tensor | None] = [None] * 8
    if mask[5] or mask[6]:
        grads[5:7] = _pointwise_wgrad(scaled, hidden)
    if mask[7]:
        out = _product(project_weight, hidden, _map_like(mixed, grad.shape[1]))
        _ops.scale_residual_.default(out, project_bias, None, None)
        grads[7] = (grad * out).sum((0, 2, 3))
    if mask[3] or mask[4]:
        grads[3:5] = _pointwise_wgrad(hidden_grad, mixed)
    if any(mask[:3]):
        mixed_grad = _product(expand_weight.T, hidden_grad, torch.empty_like(mixed))
        grads[:3] = convolve_backward(mixed_grad, x, weight, (1, 1), pads, mask[:3])
    return grads


def _pointwise_wgrad(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a 1×1 convolution's weight and bias, by one GEMM: cuDNN's might add up in any order."""
    if suggests_channels_last(x):
        product = grad.permute(0, 2, 3, 1).flatten(0, 2).T @ x.permute(0, 2, 3, 1).flatten(0, 2)
    else:
        product = grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T
    return product, grad.sum((0, 2, 3))
