"""The operators of training steps in torch's dispatcher: schemas, shapes (fakes) and autograd of the native kernels.

Users call :mod:`ffnet_kernels.training`, which checks the arguments and takes plain PyTorch where no kernel can run.
Results are channels-last. Second derivatives go through plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd
from .backends import cpu
from .backends import training as plain

LIBRARY = torch.library.Library("ffnet_kernels_training", "DEF")
_ops: Any = torch.ops.ffnet_kernels_training


def _map(like: Tensor, channels: int, height: int | None = None, width: int | None = None) -> Tensor:
    size = (like.shape[0], channels, height or like.shape[2], width or like.shape[3])
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _define(schema: str, fake, differentiate=None, setup_context=None) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    if differentiate is not None:
        autograd.register(LIBRARY, name, differentiate, setup_context)


def _fake_batch_norm(x, gamma, *_):
    return _map(x, x.shape[1]), torch.empty_like(gamma), torch.empty_like(gamma)


def _fake_batch_norm_backward(grad, x, gamma, beta, mean, variance, eps, activation, wants_x):
    grads = [_map(x, x.shape[1])] if wants_x else []
    return [*grads, torch.empty_like(gamma), torch.empty_like(gamma)]


def _save_batch_norm(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_batch_norm(ctx, grad, *_of_statistics):
    *tensors, mean, variance = ctx.saved_tensors
    if grad is None:
        return (None,) * 5
    if torch.is_grad_enabled():
        return tuple(plain.differentiably(plain.batch_norm, grad, (*tensors, ctx.eps, ctx.activation)))
    wants_x = ctx.needs_input_grad[0]
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = _ops.batch_norm_backward.default(grad, *tensors, mean, variance, ctx.eps, ctx.activation, wants_x)
    return *(grads if wants_x else (None, *grads)), None, None


def _fake_branched(x, weight, gamma, beta, other_weight, other_gamma, other_beta, eps, stride, activation):
    height, width = ((size - 1) // s + 1 for size, s in zip(x.shape[2:], stride, strict=True))
    outputs = weight.shape[0]
    statistics = (1 if other_weight is None else 2, outputs)
    return _map(x, outputs, height, width), x.new_empty(statistics), x.new_empty(statistics)


def _fake_branched_backward(
    grad, x, weight, gamma, beta, other_weight, other_gamma, other_beta, mean, variance, eps, activation, wants_x
):
    grads = [_map(x, x.shape[1])] if wants_x else []
    parameters = (weight, gamma, beta, other_weight, other_gamma, other_beta)
    return grads + [x.new_empty(p.shape) for p in parameters if p is not None]


def _save_branched(ctx, inputs, output):
    *tensors, ctx.eps, ctx.stride, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_branched(ctx, grad, *_of_statistics):
    x, *parameters, mean, variance = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    if torch.is_grad_enabled():
        inputs = (x, *parameters, ctx.eps, ctx.stride, ctx.activation)
        return tuple(plain.differentiably(plain.branched_depthwise, grad, inputs))
    wants_x = ctx.needs_input_grad[0]
    args: list = [grad, x, *parameters, mean, variance, ctx.eps]
    if tuple(ctx.stride) == (1, 1) and parameters[0].shape[0] == x.shape[1]:
        grads = _ops.branched_depthwise_backward.default(*args, ctx.activation, wants_x)
    else:
        args += [ctx.stride, ctx.activation, wants_x]
        grads = plain.branched_depthwise_backward(cpu, *args)
    if not wants_x:
        grads = [None, *grads]
    return *grads, *(None,) * (10 - len(grads))


def _fake_feed_forward(x, expand_weight, expand_bias, project_weight, *_):
    return _map(x, project_weight.shape[0]), _map(x, expand_weight.shape[0])


def _fake_feed_forward_backward(
    grad, x, z, expand_weight, expand_bias, project_weight, project_bias, activation, scale, wants_x
):
    grads = [_map(x, x.shape[1])] if wants_x else []
    for weight in (expand_weight, project_weight):
        grads += [x.new_empty(weight.shape), x.new_empty((weight.shape[0],))]
    return grads if scale is None else [*grads, x.new_empty(scale.shape)]


def _save_feed_forward(ctx, inputs, output):
    *tensors, ctx.activation, scale, _ = inputs
    ctx.save_for_backward(*tensors, scale, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_feed_forward(ctx, grad, _of_z):
    *tensors, scale, z = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    x, _, expand_bias, _, project_bias = tensors
    residual_grad = grad if ctx.needs_input_grad[7] else None
    if torch.is_grad_enabled():
        grads = plain.differentiably(plain.feed_forward, grad, (*tensors, ctx.activation, scale))
        return *grads, residual_grad
    wants_x = ctx.needs_input_grad[0]
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = _ops.feed_forward_backward.default(grad, x, z, *tensors[1:], ctx.activation, scale, wants_x)
    x_grad, grads = (grads[0], grads[1:]) if wants_x else (None, grads)
    return (
        x_grad,
        grads[0],
        None if expand_bias is None else grads[1],
        grads[2],
        None if project_bias is None else grads[3],
        None,
        None if scale is None else grads[4],
        residual_grad,
    )


_NORM = "Tensor gamma, Tensor beta"
_BRANCHES = f"Tensor weight, {_NORM}, Tensor? other_weight, Tensor? other_gamma, Tensor? other_beta"
_FEED_FORWARD = (
    "Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, Tensor? project_bias, str activation, "
    "Tensor? scale"
)

_define(
    f"batch_norm(Tensor x, {_NORM}, float eps, str activation) -> (Tensor, Tensor, Tensor)",
    _fake_batch_norm,
    _differentiate_batch_norm,
    _save_batch_norm,
)
_define(
    f"batch_norm_backward(Tensor grad, Tensor x, {_NORM}, Tensor mean, Tensor variance, float eps, str activation, "
    "bool wants_x) -> Tensor[]",
    _fake_batch_norm_backward,
)
_define(
    f"branched_depthwise(Tensor x, {_BRANCHES}, float[] eps, int[2] stride, str activation) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_branched,
    _differentiate_branched,
    _save_branched,
)
_define(
    f"branched_depthwise_backward(Tensor grad, Tensor x, {_BRANCHES}, Tensor mean, Tensor variance, float[] eps, "
    "str activation, bool wants_x) -> Tensor[]",
    _fake_branched_backward,
)
_define(
    f"feed_forward(Tensor x, {_FEED_FORWARD}, Tensor? residual) -> (Tensor, Tensor)",
    _fake_feed_forward,
    _differentiate_feed_forward,
    _save_feed_forward,
)
_define(
    f"feed_forward_backward(Tensor grad, Tensor x, Tensor z, {_FEED_FORWARD}, bool wants_x) -> Tensor[]",
    _fake_feed_forward_backward,
)
