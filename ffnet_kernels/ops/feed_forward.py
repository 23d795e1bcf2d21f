"""Two 1×1 convolutions with an activation between them, for training steps: the second half of a channel mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import reference as plain
from ..backends.activations import ACTIVATE, ACTIVATE_BACKWARD
from ..backends.maps import as_map, as_pixels
from . import _arguments
from ._operator import TrainingOperator, gradients_of, is_batched, is_eager
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
    """``residual + scale · (W₂ · act(W₁ · x + b₁) + b₂)``, a channel mixer after its depthwise convolution.

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
    if laid_out[0].dtype == torch.float32:
        return OPERATOR.on("cpu", *laid_out)[0]
    return _Narrow.apply(*laid_out) if is_eager() else reference(*laid_out)


class _Narrow(torch.autograd.Function):
    """For channels-last maps of 16 bits, which are matrices of pixels. PyTorch's products of these are at least as fast
    as any kernel here, above all on processors that multiply tiles; what remains to be gained is the memory of the
    activated hidden map."""

    @staticmethod
    def forward(ctx, x, expand_weight, expand_bias, project_weight, project_bias, activation, scale, residual):
        z = F.linear(as_pixels(x), expand_weight, expand_bias)
        out = as_map(F.linear(ACTIVATE[activation](z), project_weight, project_bias), x)
        ctx.save_for_backward(x, z, expand_weight, project_weight, scale)
        # Like plain layers, keeps no biases, so these may change before the backward pass.
        ctx.bias = project_bias if scale is None or project_bias is None else project_bias.detach().clone()
        ctx.biases = [(b, b._version) for b in (expand_bias, project_bias) if b is not None]
        ctx.given, ctx.activation = (expand_bias, project_bias), activation
        out = plain.scaled_residual(out, scale, residual)
        # No view: those that a function of ours makes cannot be changed in place afterwards.
        storage = out.untyped_storage(), out.storage_offset(), out.shape, out.stride()
        return torch.empty(0, dtype=out.dtype, device=out.device).set_(*storage)

    @staticmethod
    def backward(ctx, grad):
        x, z, expand_weight, project_weight, scale = ctx.saved_tensors
        expand_bias, project_bias = ctx.given
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(grad):
            if any(bias._version != version for bias, version in ctx.biases):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    "a bias of feed_forward, for second derivatives"
                )
            args = [x, expand_weight, expand_bias, project_weight, project_bias, ctx.activation, scale]
            return *gradients_of(reference, grad, args, needed[:7]), grad if needed[7] else None
        incoming = as_pixels(channels_last(grad))
        scale_grad = None
        hidden = ACTIVATE[ctx.activation](z)
        if needed[6]:
            scale_grad = (incoming * F.linear(hidden, project_weight, ctx.bias)).sum(0)
        incoming = incoming if scale is None else incoming * scale
        project_grads = _matrix_gradients(incoming, hidden, needed[3:5])
        del hidden
        x_grad: Tensor | None = None
        expand_grads: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(needed[:3]):
            z_grad = ACTIVATE_BACKWARD[ctx.activation](incoming @ project_weight, z)
            x_grad = as_map(z_grad @ expand_weight, x) if needed[0] else None
            expand_grads = _matrix_gradients(z_grad, as_pixels(x), needed[1:3])
        return x_grad, *expand_grads, *project_grads, None, scale_grad, grad if needed[7] else None


def _matrix_gradients(grad: Tensor, rows: Tensor, needed: tuple) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, where needed."""
    return grad.t() @ rows if needed[0] else None, grad.sum(0) if needed[1] else None


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
