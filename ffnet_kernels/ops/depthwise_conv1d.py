"""Depthwise convolution of series with its activation: `depthwise_conv2d` with 1×k kernels on maps of one row.

Not an operator of its own: backends, gradients and registration are those of `depthwise_conv2d`.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import choice
from . import _arguments
from ._operator import OPERATORS

NAME = "depthwise_conv2d"


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str | int = "same",
    activation: str = "none",
) -> Tensor:
    """Depthwise convolution of series with its activation: ``act(DW(x; weight) + bias)``.

    Kernels run it with a 1×k filter (tested up to k = 64); plain PyTorch runs calls that none takes.

    Args:
        x: ``[N, C, L]``.
        weight: ``[C, 1, k]`` or, for two outputs per input channel, ``[2·C, 1, k]``.
        bias: ``[C]`` (or ``[2·C]``) or None.
        stride: 1 or 2.
        padding: zeros around the series: ``"same"`` (``k - 1`` in all, for an even kernel the odd one at the end;
            stride 2 then halves, rounding up), ``"causal"`` (``k - 1`` in front: no result sees a later value),
            ``"valid"`` (none), or a number of values on each side.
        activation: one of ``ffnet_kernels.ACTIVATIONS``.

    Returns:
        ``[N, C or 2·C, L']``.

    Raises:
        TypeError: for an argument that is not a tensor.
        ValueError: for a wrong shape, dtype, device, stride, padding or activation.
        BackendError: if a backend was forced that does not take the call.
    """
    call = checked(*_arguments.autocast(x, weight, bias, stride, padding, activation))
    return OPERATORS[NAME].on(choice.select(NAME, call).NAME, *call).squeeze(2)


def checked(x, weight, bias, stride, padding, activation) -> tuple:
    """The arguments for `depthwise_conv2d`'s schema, with tensors of one row."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"x: expected series [N, C, L], got {x.dim()} dimensions (shape {list(x.shape)})")
    if x.shape[2] == 0:
        raise ValueError(f"x: expected series of at least one value, got the shape {list(x.shape)}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    if weight.dim() != 3 or weight.shape[1] != 1 or weight.shape[2] == 0:
        raise ValueError(f"weight: expected a depthwise filter [channels, 1, k], got the shape {list(weight.shape)}")
    if type(stride) is not int or stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    length, taps = x.shape[2], weight.shape[2]
    first, last = _padding(padding, taps)
    if length + first + last < taps:
        raise ValueError(
            f"weight: the kernel of {taps} is longer than the padded series of {length + first + last} "
            f"(x has the shape {list(x.shape)}, padding={padding!r})"
        )
    # Symmetric padding, for the 2-D operator's checks of everything else.
    rows = x.unsqueeze(2), weight.unsqueeze(2), bias
    *tensors, _, _, activation = OPERATORS[NAME].defined.checked(*rows, (1, stride), (0, taps), activation)
    return *tensors, (1, stride), (0, 0, first, last), activation


def _padding(padding, taps: int) -> tuple[int, int]:
    if padding == "same":
        return (taps - 1) // 2, taps // 2
    if padding == "causal":
        return taps - 1, 0
    if padding == "valid":
        return 0, 0
    if type(padding) is not int:
        raise ValueError(f"padding: expected 'same', 'causal', 'valid' or a number of values, got {padding!r}")
    if padding < 0:
        raise ValueError(f"padding: expected no negative number, got {padding}")
    return padding, padding
