"""Depthwise convolutions of one map, each with its batch normalisation, and the activation of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..backends import reference as plain
from ..backends.activations import ACTIVATE, ACTIVATE_BACKWARD
from ..backends.maps import same_padding
from . import batch_norm
from ._operator import TrainingOperator

Branch = tuple[nn.Module, nn.Module]


def branched_depthwise(x: Tensor, branches: Sequence[Branch], activation: str = "none") -> Tensor:
    """``act(Σ norm(conv(x)))`` over (conv, norm) pairs, which are called as they are where the kernel does not apply.

    It applies to one or two depthwise convolutions without bias, with odd filters padded by half their size, each
    followed by an affine ``nn.BatchNorm2d`` in training mode. Nothing but x is kept for the backward pass. Running
    statistics move as those of ``nn.BatchNorm2d`` do. Layers with hooks are called.

    Args:
        x: ``[N, C, H, W]``.
        branches: pairs of modules whose results have one shape.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.

    Returns:
        ``[N, O, H', W']``.
    """
    if not batch_norm.runs_natively(x) or not _branches_apply(x, branches):
        outputs = [norm(conv(x)) for conv, norm in branches]
        return ACTIVATE[activation](sum(outputs[1:], outputs[0]))
    convs: list = [conv for conv, _ in branches]
    norms: list = [norm for _, norm in branches]
    parameters: list = []
    for conv, norm in zip(convs, norms, strict=True):
        parameters += (conv.weight, norm.weight.contiguous(), norm.bias.contiguous())
    parameters += [None] * (6 - len(parameters))
    eps = [norm.eps for norm in norms]
    out, mean, variance = OPERATOR.on("cpu", x, *parameters, eps, convs[0].stride, activation)
    batch_norm.track(norms, mean, variance, out.numel() // out.shape[1])
    return out


def _branches_apply(x: Tensor, branches: Sequence[Branch]) -> bool:
    if not 1 <= len(branches) <= 2 or not all(_is_plain_convolution(conv) for conv, _ in branches):
        return False
    first: Any = branches[0][0]
    pixels = x.shape[0] * -(-x.shape[2] // first.stride[0]) * -(-x.shape[3] // first.stride[1])
    conv: Any
    for conv, norm in branches:
        if (
            not batch_norm.norm_applies(norm, x, conv.out_channels, pixels)
            or batch_norm.is_hooked(conv)
            or conv.bias is not None
            or conv.groups != conv.in_channels
            or conv.in_channels != x.shape[1]
            or conv.out_channels not in (conv.in_channels, 2 * conv.in_channels)
            or any(k % 2 == 0 for k in conv.kernel_size)
            or conv.padding != tuple(k // 2 for k in conv.kernel_size)
            or conv.dilation != (1, 1)
            or conv.padding_mode != "zeros"
            or not set(conv.stride) <= {1, 2}
            or (conv.stride, conv.out_channels) != (first.stride, first.out_channels)
            or conv.weight.dtype != x.dtype
            or conv.weight.device != x.device
        ):
            return False
    return True


def _is_plain_convolution(conv: nn.Module) -> bool:
    if type(conv) is nn.Conv2d:
        return True
    from ..modules import DepthwiseConv2d  # which is made of operators, so not above

    return type(conv) is DepthwiseConv2d and conv.activation == "none"


def reference(
    x, weight, gamma, beta, other_weight, other_gamma, other_beta, eps, stride, activation
) -> Tensor:  # fmt: skip
    def branch(weight, gamma, beta, eps):
        return batch_norm.reference(
            plain.convolve(x, weight, None, stride, same_padding(weight)), gamma, beta, eps, "none"
        )

    total = branch(weight, gamma, beta, eps[0])
    if other_weight is not None:
        total = total + branch(other_weight, other_gamma, other_beta, eps[1])
    return ACTIVATE[activation](total)


def empty(x, weight, gamma, beta, other_weight, other_gamma, other_beta, eps, stride, activation) -> tuple:
    size = [(extent - 1) // s + 1 for extent, s in zip(x.shape[2:], stride, strict=True)]
    outputs = weight.shape[0]
    statistics = (1 if other_weight is None else 2, outputs)
    return batch_norm.empty_map(x, outputs, size), x.new_empty(statistics), x.new_empty(statistics)


def empty_gradients(
    grad, x, weight, gamma, beta, other_weight, other_gamma, other_beta, mean, variance, eps, activation, wants_x
) -> list[Tensor]:
    grads = [batch_norm.empty_map(x, x.shape[1])] if wants_x else []
    parameters = (weight, gamma, beta, other_weight, other_gamma, other_beta)
    return grads + [x.new_empty(p.shape) for p in parameters if p is not None]


def kernel_gradients(backward, grad, args, kept, mask) -> list:
    *tensors, eps, stride, activation = args
    call: list = [grad, *tensors, *kept, eps]
    if tuple(stride) == (1, 1) and tensors[1].shape[0] == tensors[0].shape[1]:
        grads = backward(*call, activation, mask[0])
    else:
        call += [stride, activation, mask[0]]
        grads = _strided_gradients(*call)
    return grads if mask[0] else [None, *grads]


def _strided_gradients(
    grad, x, weight, gamma, beta, other_weight, other_gamma, other_beta, mean, variance, eps, stride, activation,
    wants_x,
) -> list[Tensor]:  # fmt: skip
    """As ``csrc/cpu/branched_depthwise_backward.cpp``, whose comment has the formulas, for every stride."""
    others = [(other_weight, other_gamma, other_beta)] if other_weight is not None else []
    weights, gammas, betas = zip((weight, gamma, beta), *others, strict=True)
    deviations = [(v + e).sqrt() for v, e in zip(variance, eps, strict=True)]
    # The convolutions minus their means.
    centred = [cpu.convolve(x, w, -m, stride, same_padding(w)) for w, m in zip(weights, mean, strict=True)]
    if activation != "none":
        parts = [
            torch.addcmul(beta[:, None, None], y, (gamma / deviation)[:, None, None])
            for y, gamma, beta, deviation in zip(centred, gammas, betas, deviations, strict=True)
        ]
        total = sum(parts[1:], parts[0])
        grad = ACTIVATE_BACKWARD[activation](grad, total)
    count = grad.numel() // grad.shape[1]
    beta_grad = grad.sum((0, 2, 3))
    grads: list[Tensor] = []
    x_grad: Tensor | None = None
    for weight, gamma, deviation, y in zip(weights, gammas, deviations, centred, strict=True):
        gamma_grad = (grad * y).sum((0, 2, 3)) / deviation
        scale = gamma / deviation
        shift, slope = -scale * beta_grad / count, -scale * gamma_grad / (deviation * count)
        y_grad = torch.addcmul(shift[:, None, None], grad, scale[:, None, None]).addcmul_(y, slope[:, None, None])
        mask = (wants_x, True, False)
        x_part, weight_grad, _ = cpu.convolve_backward(y_grad, x, weight, stride, same_padding(weight), mask)
        x_grad = x_part if x_grad is None else x_grad + x_part
        grads += [weight_grad, gamma_grad, beta_grad.clone()]
    return grads if x_grad is None else [x_grad, *grads]


_BRANCHES = (
    "Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor? other_weight, Tensor? other_gamma, Tensor? other_beta"
)
OPERATOR = TrainingOperator(
    __name__,
    f"{_BRANCHES}, float[] eps, int[2] stride, str activation",
    results="Tensor, Tensor, Tensor",
    backward_arguments=f"{_BRANCHES}, Tensor mean, Tensor variance, float[] eps, str activation",
    weights=("weight", "other_weight"),
    parallel=True,
)
