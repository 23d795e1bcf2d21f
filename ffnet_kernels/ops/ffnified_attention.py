"""FFNified attention, FFNet's token mixer: two depthwise convolutions with an activation between them."""

from __future__ import annotations

from torch import Tensor

from ..backends import reference as plain
from ..backends.activations import ACTIVATE
from ..backends.maps import empty_output, same_padding
from . import _arguments
from ._operator import Operator


def ffnified_attention(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    value: Tensor,
    value_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """FFNified attention, FFNet's token mixer after its query projection (arXiv 2406.02021, section 3):
    ``residual + scale · (DW(act(DW(query; key) + key_bias); value) + value_bias)``.

    Fused backends never write the middle map to memory, but round it to the maps' dtype all the same.

    Args:
        query: ``[N, C, H, W]``, the projected input.
        key, value: static keys and values, depthwise filters ``[C, 1, kh, kw]``, stride 1, "same" padding.
        key_bias, value_bias: ``[C]`` or None.
        activation: between the two convolutions; as in :func:`ffnet_kernels.depthwise_conv2d`.
        scale: layer scale ``[C]`` or ``[C, 1, 1]``, or None.
        residual: ``[N, C, H, W]`` or None.

    Returns:
        ``[N, C, H, W]``.
    """
    return OPERATOR.run(query, key, key_bias, value, value_bias, activation, scale, residual)


def checked(query, key, key_bias, value, value_bias, activation, scale, residual) -> tuple:
    _arguments.check_map("query", query)
    _arguments.check_own_filter("key", key, query, of="query")
    _arguments.check_own_filter("value", value, query, of="query")
    channels = query.shape[1]
    key_bias = _arguments.channel_vector("key_bias", key_bias, channels, query)
    value_bias = _arguments.channel_vector("value_bias", value_bias, channels, query)
    scale = _arguments.channel_vector("scale", scale, channels, query)
    _arguments.check_residual(residual, query, channels)
    _arguments.check_activation(activation)
    return query, key, key_bias, value, value_bias, activation, scale, residual


spelled = _arguments.spelled_mixer


def reference(query, key, key_bias, value, value_bias, activation, scale, residual) -> Tensor:
    hidden = ACTIVATE[activation](plain.convolve(query, key, key_bias, (1, 1), same_padding(key)))
    out = plain.convolve(hidden, value, value_bias, (1, 1), same_padding(value))
    return plain.scaled_residual(out, scale, residual)


def empty(query, key, key_bias, value, *_) -> Tensor:
    return empty_output(query.shape, (query, key, value))


def gradient(p, grad, query, key, key_bias, value, value_bias, activation, scale, residual, mask) -> list:
    """Gradients. A backend may have ``attention_maps``: one kernel for the query's gradient, the hidden map and the
    gradient before its activation, or None for calls that it does not take."""
    one, key_pads, value_pads = (1, 1), same_padding(key), same_padding(value)
    key_grads: list = [None, None, None]
    value_grads: list = [None, None, None]
    hidden = None
    if any(mask[:3]):
        fused = getattr(p, "attention_maps", None)
        maps = fused(grad, query, key, key_bias, value, activation, scale) if fused else None
        if maps is not None:
            query_grad, hidden, before_grad = maps
            filter_mask = (False, *mask[1:3])
            key_grads = [query_grad, *p.convolve_backward(before_grad, query, key, one, key_pads, filter_mask)[1:]]
        else:
            incoming, input_mask = plain.scaled(grad, scale), (True, False, False)
            hidden_grad = p.convolve_backward(incoming, query, value, one, value_pads, input_mask)[0]
            before_grad = p.activation_backward(hidden_grad, query, key, key_bias, one, key_pads, activation)
            key_grads = p.convolve_backward(before_grad, query, key, one, key_pads, mask[:3])
    if any(mask[3:6]):
        if hidden is None:
            hidden = p.activated(query, key, key_bias, one, key_pads, activation)
        value_grads = p.scaled_filter_gradients(grad, hidden, value, value_bias, scale, value_pads, mask[3:6])
    return [*key_grads, *value_grads]


OPERATOR = Operator(__name__, weights=("key", "value"))
