"""The operators of training steps in plain PyTorch: their meaning, and what second derivatives go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATE, ACTIVATE_BACKWARD
from .gradients import Primitives, same_padding


def branched_depthwise(x, weights, gammas, betas, eps, stride, activation) -> Tensor:
    outputs = []
    for weight, gamma, beta, epsilon in zip(weights, gammas, betas, eps, strict=True):
        y = F.conv2d(x, weight, None, tuple(stride), same_padding(weight)[::2], groups=x.shape[1])
        outputs.append(F.batch_norm(y, None, None, gamma, beta, True, 0.0, epsilon))
    return ACTIVATE[activation](sum(outputs[1:], outputs[0]))


def feed_forward(
    x, expand_weight, expand_bias, project_weight, project_bias, activation, scale=None, residual=None
) -> Tensor:
    hidden = ACTIVATE[activation](F.conv2d(x, expand_weight[:, :, None, None], expand_bias))
    out = F.conv2d(hidden, project_weight[:, :, None, None], project_bias)
    if scale is not None:
        out = out * scale[:, None, None]
    return out if residual is None else residual + out


def branched_depthwise_backward(
    p: Primitives, grad, x, weights, gammas, betas, mean, variance, eps, stride, activation, wants_x
) -> list[Tensor]:
    """Gradients of x, where wanted, then of weight, gamma and beta of each branch, on the primitives of a backend.

    As ``csrc/cpu/branched_depthwise_backward.cpp``, whose comment has the formulas, for every stride.
    """
    deviations = [(v + e).sqrt() for v, e in zip(variance, eps, strict=True)]
    # The convolutions minus their means.
    centred = [p.convolve(x, w, -m, stride, same_padding(w)) for w, m in zip(weights, mean, strict=True)]
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
        x_part, weight_grad, _ = p.convolve_backward(y_grad, x, weight, stride, same_padding(weight), mask)
        x_grad = x_part if x_grad is None else x_grad + x_part
        grads += [weight_grad, gamma_grad, beta_grad.clone()]
    return grads if x_grad is None else [x_grad, *grads]


def differentiably(function, grad: Tensor, args: Sequence) -> list[Tensor | None]:
    """Gradients of ``function(*args)`` with a graph of their own: one for each tensor, those in lists too."""
    # Aliases keep apart what depends on an argument directly and what depends on it through the incoming gradient.
    flat: list[Tensor] = []

    def alias(value):
        if isinstance(value, Tensor):
            flat.append(value.view_as(value))
            return flat[-1]
        return [alias(v) for v in value] if isinstance(value, list | tuple) else value

    with torch.enable_grad():
        out = function(*[alias(value) for value in args])
        wanted = [t for t in flat if t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in flat]
