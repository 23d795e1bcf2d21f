"""Depthwise convolutions of one map, each with its batch normalisation, and the activation of their sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import cpu
from ..backends import reference as plain
from ..backends.activations import ACTIVATE, ACTIVATE_BACKWARD
from ..backends.maps import same_padding
from . import _arguments, batch_norm
from ._operator import TrainingOperator
from .batch_norm import Norm


def branched_depthwise(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Norm],
    stride: tuple[int, int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """``act(Σ norm(DW(x; weight)))`` over one or two depthwise branches, each with its batch normalisation.

    Only x is kept for the backward pass. Running statistics are updated as by ``nn.BatchNorm2d``.

    Args:
        x: ``[N, C, H, W]``.
        weights: odd filters ``[O, 1, kh, kw]`` of one or two outputs a channel, each padded by half its size.
        norms: parameters and running statistics, ``[O]`` each.
        stride: 1 or 2, vertical and horizontal.
        activation: as in :func:`ffnet_kernels.depthwise_conv2d`.

    Returns:
        ``[N, O, H', W']``.
    """
    x, *weights = _arguments.autocast(x, *weights)
    outputs = weights[0].shape[0]
    pixels = x.shape[0] * -(-x.shape[2] // stride[0]) * -(-x.shape[3] // stride[1])
    applies = all(norm.applies(x, outputs, pixels) for norm in norms) and all(w.dtype == x.dtype for w in weights)
    if not batch_norm.runs_natively(x) or not applies:
        maps = [
            norm(torch.conv2d(x, weight, None, stride, [k // 2 for k in weight.shape[2:]], 1, x.shape[1]))
            for weight, norm in zip(weights, norms, strict=True)
        ]
        return ACTIVATE[activation](sum(maps[1:], maps[0]))
    parameters: list = []
    for weight, norm in zip(weights, norms, strict=True):
        parameters += (weight, *norm.parameters())
    parameters += [None] * (6 - len(parameters))
    eps = [norm.eps for norm in norms]
    out, mean, variance = OPERATOR.on("cpu", x, *parameters, eps, stride, activation)
    batch_norm.track(norms, mean, variance, pixels)
    return out


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
    mean, variance = (gamma.new_empty(statistics) for _ in range(2))
    return batch_norm.empty_map(x, outputs, size), mean, variance


def empty_gradients(
    grad, x, weight, gamma, beta, other_weight, other_gamma, other_beta, mean, variance, eps, activation, wants_x
) -> list[Tensor]:
    grads = [batch_norm.empty_map(x, x.shape[1])] if wants_x else []
    parameters = (weight, gamma, beta, other_weight, other_gamma, other_beta)
    return grads + [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters if p is not None]


def kernel_gradients(backward, grad, args, kept, mask) -> list:
    *tensors, eps, stride, activation = args
    call: list = [grad, *tensors, *kept, eps]
    if tuple(stride) == (1, 1) and tensors[1].shape[0] == tensors[0].shape[1]:
        grads = backward(*call, activation, mask[0])
    else:
        call = [value.float() if isinstance(value, Tensor) else value for value in (*call, stride, activation, mask[0])]
        grads = _strided_gradients(*call)
        grads = [g if g.dim() == 1 else g.to(grad.dtype) for g in grads]
    return grads if mask[0] else [None, *grads]


def _strided_gradients(
    grad, x, weight, gamma, beta, other_weight, other_gamma, other_beta, mean, variance, eps, stride, activation,
    wants_x,
) -> list[Tensor]:  # fmt: skip
    """The formulas in ``csrc/cpu/branched_depthwise_backward.cpp``, for every stride."""
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


OPERATOR = TrainingOperator(__name__, weights=("weight", "other_weight"), parallel=True)
