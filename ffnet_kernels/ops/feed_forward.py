"""Two 1×1 convolutions with an activation between them, in a training step: a channel mixer's second half."""

from __future__ import annotations

from torch import Tensor

from . import _arguments
from ._operator import TrainingOperator
from .batch_norm import channels_last, empty_map, runs_natively
from .channel_mixer import checked_pointwise
from .channel_mixer import pointwise_reference as reference


def feed_forward(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + scale · (W₂ · act(W₁ · x + b₁) + b₂)``, a channel mixer behind its depthwise convolution.

    Of the hidden map only the form before the activation is kept for the backward pass.

    Args:
        x: ``[N, C, H, W]``.
        expand_weight, expand_bias: ``[D, C]`` (or ``[D, C, 1, 1]``) and ``[D]`` or None.
        project_weight, project_bias: ``[O, D]`` (or ``[O, D, 1, 1]``) and ``[O]`` or None.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.
        scale: layer scale ``[O]`` or ``[O, 1, 1]``, or None.
        residual: ``[N, O, H, W]`` or None.

    Returns:
        ``[N, O, H, W]``.
    """
    args = checked(
        *_arguments.autocast(x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual)
    )
    if not runs_natively(args[0]):
        return reference(*args)
    laid_out = [
        a if not isinstance(a, Tensor) else channels_last(a) if a.dim() == 4 else a.contiguous() for a in args
    ]  # fmt: skip
    return OPERATOR.on("cpu", *laid_out)[0]


def checked(x, *pointwise) -> tuple:
    _arguments.check_map("x", x, may_be_empty=True)
    return x, *checked_pointwise(x, *pointwise)


def empty(x, expand_weight, expand_bias, project_weight, *_) -> tuple[Tensor, Tensor]:
    return empty_map(x, project_weight.shape[0]), empty_map(x, expand_weight.shape[0])


def empty_gradients(
    grad, x, z, expand_weight, expand_bias, project_weight, project_bias, activation, scale, wants_x
) -> list[Tensor]:
    grads = [empty_map(x, x.shape[1])] if wants_x else []
    for weight in (expand_weight, project_weight):
        grads += [x.new_empty(weight.shape), x.new_empty((weight.shape[0],))]
    return grads if scale is None else [*grads, x.new_empty(scale.shape)]


def kernel_gradients(backward, grad, args, kept, mask) -> list:
    x, *weights, activation, scale, _ = args
    grads = backward(channels_last(grad), x, *kept, *weights, activation, scale, mask[0])
    return grads if mask[0] else [None, *grads]


OPERATOR = TrainingOperator(__name__, weights=("expand_weight", "project_weight"))
