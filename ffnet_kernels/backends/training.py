"""The operators of training steps in plain PyTorch: their meaning, and what second derivatives go through."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATE, ACTIVATE_BACKWARD
from .gradients import Primitives, same_padding


def batch_norm(x, gamma, beta, eps, activation) -> Tensor:
    return ACTIVATE[activation](F.batch_norm(x, None, None, gamma, beta, True, 0.0, eps))


def branched_depthwise(
    x, weight, gamma, beta, other_weight, other_gamma, other_beta, eps, stride, activation
) -> Tensor:
    def branch(weight, gamma, beta, eps):
        y = F.conv2d(x, weight, None, tuple(stride), same_padding(weight)[::2], groups=x.shape[1])
        return batch_norm(y, gamma, beta, eps, "none")

    total = branch(weight, gamma, beta, eps[0])
    if other_weight is not None:
        total = total + branch(other_weight, other_gamma, other_beta, eps[1])
    return ACTIVATE[activation](total)


def feed_forward(
    x, expand_weight, expand_bias, project_weight, project_bias, activation, scale=None, residual=None
) -> Tensor:
    hidden = ACTIVATE[activation](F.conv2d(x, expand_weight[:, :, None, None], expand_bias))
    out = F.conv2d(hidden, project_weight[:, :, None, None], project_bias)
    if scale is not None:
        out = out * scale[:, None, None]
    return out if residual is None else residual + out


def branched_depthwise_backward(
    p: Primitives, grad, x, weight, gamma, beta, other_weight, other_gamma, other_beta, mean, variance, eps, stride,
    activation, wants_x,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, where wanted, then of weight, gamma and beta of each branch, on the primitives of a backend.

    As ``csrc/cpu/branched_depthwise_backward.cpp``, whose comment has the formulas, for every stride.
    """
    others = [(other_weight, other_gamma, other_beta)] if other_weight is not None else []
    weights, gammas, betas = zip((weight, gamma, beta), *others, strict=True)
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
    """Gradients of ``function(*args)`` with a graph of their own, None for what is no tensor that wants one."""
    with torch.enable_grad():
        # Aliases keep apart what depends on an argument directly and what depends on it through the incoming gradient.
        aliases = [arg.view_as(arg) if isinstance(arg, Tensor) else arg for arg in args]
        is_wanted = [isinstance(alias, Tensor) and alias.requires_grad for alias in aliases]
        wanted = list(itertools.compress(aliases, is_wanted))
        found = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in is_wanted]
