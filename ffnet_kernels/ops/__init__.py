"""The operators, one file each: the public function, its checks, its meaning, its schema and its gradient.

Maps are ``[N, C, H, W]``, series ``[N, C, L]``, in any layout; the result of a map has the memory format that
``torch.nn.functional.conv2d`` would give. float64, float32, bfloat16 and float16 are taken; sums are accumulated in
float32 or wider. All functions are differentiable to any order and honour ``torch.autocast`` as a convolution does.

NaN and infinities in a map are never lost, but may spread to more results than in plain PyTorch: the CUDA kernels for
16-bit NCHW maps multiply rows of a map with banded matrices, whose zeros make NaN of it in all columns of the window of
8 results around it (and, where strides or a second convolution widen the window, next to that), in the rows that a
filter of 3 or of 7 rows reaches, and in gradients of taps that do not read it. An infinite weight makes NaN where it
meets the zeros of padding.

Raises (all functions): TypeError for an argument that is no tensor; ValueError for a wrong shape, dtype, device,
stride, padding or activation; :class:`ffnet_kernels.BackendError` where a backend was forced that does not take the
call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from ..backends import choice
from . import _arguments, _flops
from . import batch_norm as batch_norm
from . import branched_depthwise as branched_depthwise
from . import channel_mixer as channel_mixer
from . import conv2d as conv2d
from . import depthwise_conv1d as depthwise_conv1d
from . import depthwise_conv2d as depthwise_conv2d
from . import feed_forward as feed_forward
from . import ffnified_attention as ffnified_attention
from ._operator import OPERATORS as OPERATORS

_PUBLIC: dict[str, Callable[..., Tensor]] = {
    "depthwise_conv2d": depthwise_conv2d.depthwise_conv2d,
    "depthwise_conv1d": depthwise_conv1d.depthwise_conv1d,
    "conv2d": conv2d.conv2d,
    "ffnified_attention": ffnified_attention.ffnified_attention,
    "channel_mixer": channel_mixer.channel_mixer,
}

_flops.register(OPERATORS.values())


def explain(operator: str | Callable[..., Tensor], *args, **kwargs) -> choice.Decision:
    """Explains which backend and variant would run ``operator(*args, **kwargs)``, and why not the others.

    Nothing is computed.

    Args:
        operator: ``depthwise_conv2d``, ``depthwise_conv1d``, ``conv2d``, ``ffnified_attention`` or ``channel_mixer``,
            or its name.

    Raises:
        ValueError: for an unknown operator, and whatever the call itself would raise.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in _PUBLIC:
        raise ValueError(f"explain: expected one of {', '.join(_PUBLIC)}, got {operator!r}")
    bound = inspect.signature(_PUBLIC[name]).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = _arguments.autocast(*bound.arguments.values())
    if name == "depthwise_conv1d":  # it runs as depthwise_conv2d on maps of one row
        return choice.decide(depthwise_conv1d.NAME, depthwise_conv1d.checked(*arguments))
    return choice.decide(name, OPERATORS[name].defined.checked(*arguments))
