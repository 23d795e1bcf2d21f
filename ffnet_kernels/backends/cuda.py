"""The CUDA C++ kernels: float32, bfloat16 and float16, any layout; on tensor cores for 16-bit NCHW maps from sm_80 on.

Which kernel a call runs is decided in ``csrc/cuda/dispatch.h``. With ``FFNET_KERNELS_CUDA_HOST`` the same kernels,
compiled for the processor, take CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from . import gradients, reference
from .gradients import same_padding

_ops = torch.ops.ffnet_kernels_cuda
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (7, 5)
_DEVICE = "cpu" if native.cuda_host_library() else "cuda"


@functools.cache
def unavailable() -> str | None:
    error = native.cuda_library_error()
    if error is not None or _DEVICE == "cpu":
        return error
    if torch.cuda.device_count() == 0:
        return "there is no GPU"
    newest = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if newest >= _OLDEST else f"the GPU is sm_{newest[0]}{newest[1]}; sm_75 or newer is needed"


def refusal(operator: str, args: tuple) -> str | None:
    x = args[0]
    if x.device.type != _DEVICE:
        return f"takes {_DEVICE.upper()} tensors, got {x.device}"
    if _DEVICE == "cuda" and torch.cuda.get_device_capability(x.device) < _OLDEST:
        return f"{x.device} is older than sm_75"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return None


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


def run_forward(operator: str, out: Tensor, args: tuple) -> Tensor:
    """What the library does not register itself: the channel mixer, and every call that it refuses."""
    if operator != "channel_mixer" or refusal(operator, args) is not None or unavailable() is not None:
        return out.copy_(getattr(reference, operator)(*args))
    x, weight, bias, *pointwise = args
    mixed = convolve(x, weight, bias, (1, 1), same_padding(weight))
    return _pointwise_forward(out, mixed, *pointwise)


def run_backward(operator: str, call: tuple) -> list[Tensor]:
    """The wanted gradients of a call, as the operators' backward schemas have them."""
    if refusal(operator, call) is not None or unavailable() is not None:
        return getattr(reference, f"{operator}_backward")(*call)
    return getattr(sys.modules[__name__], f"_{operator}_backward")(*call)


def depthwise_conv2d(*args) -> Tensor:
    return _ops.depthwise_conv2d.default(*args)


def ffnified_attention(*args) -> Tensor:
    return _ops.ffnified_attention.default(*args)


def channel_mixer(*args) -> Tensor:
    return _ops.channel_mixer.default(*args)


def depthwise_conv2d_backward(*call) -> list[Tensor]:
    return _ops.depthwise_conv2d_backward.default(*call)


def ffnified_attention_backward(*call) -> list[Tensor]:
    return _ops.ffnified_attention_backward.default(*call)


def channel_mixer_backward(*call) -> list[Tensor]:
    return _ops.channel_mixer_backward.default(*call)


def convolve(x, weight, bias, stride, padding) -> Tensor:
    return _ops.depthwise_conv2d.default(x, weight, bias, stride, padding, "none")


def convolve_backward(grad, x, weight, stride, padding, mask) -> list:
    """Gradients of x, weight and bias, None where the mask says that one is not wanted."""
    grads: list[Tensor | None] = [None, None, None]
    if mask[0]:
        grads[0] = _ops.depthwise_conv2d_dgrad.default(grad, weight, x, stride, padding)
    if mask[1] or mask[2]:
        wanted = _ops.depthwise_conv2d_wgrad.default(grad, x, weight.shape[2:], stride, padding)
        grads[1:] = [g if m else None for g, m in zip(wanted, mask[1:], strict=True)]
    return grads


def _pointwise_forward(
    out, x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual
) -> Tensor:
    """The channel mixer after its depthwise convolution, into ``out``."""
    if _ops.channel_mixer_fits(x, expand_weight, project_weight, residual, out):
        _ops.channel_mixer_pointwise.default(
            x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual, out
        )
        return out
    hidden = F.conv2d(x, expand_weight[:, :, None, None])
    _ops.bias_activation_.default(hidden, expand_bias, activation)
    out.copy_(F.conv2d(hidden, project_weight[:, :, None, None]))
    _ops.scale_residual_.default(out, project_bias, scale, residual)
    return out


_, _, _channel_mixer_backward = gradients.backward_passes(sys.modules[__name__])


def _depthwise_conv2d_backward(grad, x, weight, bias, stride, padding, activation, mask) -> list[Tensor]:
    if activation != "none":
        grad = _ops.depthwise_conv2d_activation_backward.default(grad, x, weight, bias, stride, padding, activation)
    return _wanted(convolve_backward(grad, x, weight, stride, padding, mask), mask)


def _ffnified_attention_backward(
    grad, query, key, key_bias, value, value_bias, activation, scale, residual, mask
) -> list[Tensor]:
    key_pads, value_pads = same_padding(key), same_padding(value)
    query_grad = hidden = None
    if _ops.ffnified_attention_dgrad_takes(grad, query, key, value):
        maps = _ops.ffnified_attention_dgrad.default(grad, query, key, key_bias, value, activation, scale)
        query_grad, hidden, hidden_grad = maps
    else:  # the same maps by a kernel each
        if any(mask[3:6]):
            hidden = _ops.depthwise_conv2d.default(query, key, key_bias, (1, 1), key_pads, activation)
        if any(mask[:3]):
            scaled = grad if scale is None else grad * scale[:, None, None]
            hidden_grad = _ops.depthwise_conv2d_dgrad.default(scaled, value, query, (1, 1), value_pads)
            hidden_grad = _ops.depthwise_conv2d_activation_backward.default(
                hidden_grad, query, key, key_bias, (1, 1), key_pads, activation
            )
        if mask[0]:
            query_grad = _ops.depthwise_conv2d_dgrad.default(hidden_grad, key, query, (1, 1), key_pads)
    grads: list[Tensor | None] = [query_grad, None, None, None, None, None, grad]
    if mask[1] or mask[2]:
        grads[1:3] = _ops.depthwise_conv2d_wgrad.default(hidden_grad, query, key.shape[2:], (1, 1), key_pads)
    if any(mask[3:6]):
        grads[3:6] = _ops.ffnified_attention_value_grads.default(grad, hidden, value, value_bias, scale)
    return _wanted(grads, mask)


def _wanted(grads: list[Tensor | None], mask) -> list[Tensor]:
    return [g for g, wanted in zip(grads, mask, strict=True) if wanted and g is not None]
