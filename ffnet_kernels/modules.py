"""The operators as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .backends.activations import ACTIVATE, ACTIVATIONS
from .ops.channel_mixer import channel_mixer
from .ops.depthwise_conv2d import depthwise_conv2d
from .ops.ffnified_attention import ffnified_attention

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class DepthwiseConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` with ``groups == in_channels`` that runs on :func:`ffnet_kernels.depthwise_conv2d`.

    Parameters, state dict and results are those of the ``nn.Conv2d``; :meth:`from_conv` converts one as it is. Maps
    without a batch dimension are accepted, too.

    Args:
        channels: input channels.
        kernel_size, stride, padding, bias: as ``nn.Conv2d``; padding defaults to "same" (any stride, see
            :func:`ffnet_kernels.depthwise_conv2d`).
        multiplier: outputs per input channel, 1 or 2.
        activation: applied to the result, one of ``ffnet_kernels.ACTIVATIONS``.

    Raises:
        ValueError: for a multiplier, stride or activation that the operator does not support.

    Shape: ``[N, C, H, W]`` to ``[N, C·multiplier, H', W']``.
    """

    activation: str

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        *,
        multiplier: int = 1,
        bias: bool = True,
        activation: str = "none",
        device=None,
        dtype=None,
    ) -> None:
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if padding is None:
            if any(k % 2 == 0 for k in kernel):
                raise ValueError(f"padding: an even kernel {kernel} needs an explicit padding")
            padding = (kernel[0] // 2, kernel[1] // 2)
        _check_activation(activation)
        super().__init__(
            channels, channels * multiplier, kernel_size, stride, padding, groups=channels, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.activation = activation
        if not _computable(self):
            raise ValueError(f"expected multiplier and stride 1 or 2, got multiplier={multiplier}, stride={stride}")

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, activation: str = "none") -> Self:
        """A module that shares the parameters, buffers and hooks of ``conv``, which must satisfy :meth:`takes`."""
        if not cls.takes(conv):
            raise ValueError(f"from_conv: expected a depthwise convolution that the operator takes, got {conv}")
        module = cls.__new__(cls)
        module.__dict__ = dict(conv.__dict__)
        module.activation = activation
        return module

    @staticmethod
    def takes(conv: nn.Module) -> bool:
        """Whether ``conv`` is a depthwise convolution that the operator computes."""
        return type(conv) is nn.Conv2d and _computable(conv)

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, input, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")


def convolve(conv: nn.Conv2d, input: Tensor, activation: str = "none") -> Tensor:
    """``act(conv(input))``, on the operator if that takes the call."""
    if input.dim() == 3:
        return convolve(conv, input[None], activation)[0]
    if not (_computable(conv) and _fits(conv, input)):
        return ACTIVATE[activation](nn.Conv2d.forward(conv, input))  # or its error
    return depthwise_conv2d(
        input, conv.weight, conv.bias,
        stride=conv.stride, padding=conv.padding, activation=activation,  # type: ignore[arg-type]
    )  # fmt: skip


def _fits(conv: nn.Conv2d, input: Tensor) -> bool:
    """Whether a map fits a layer; if not, plain PyTorch raises its own error."""
    weight = conv.weight
    like = input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type)
    return (
        input.dim() == 4
        and input.shape[1] == conv.groups
        and like
        and input.device == weight.device
        and input.is_floating_point()
    )


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _computable(conv: nn.Conv2d) -> bool:
    """Whether the operator computes a layer in its present state: users may have changed its attributes."""
    stride, weight = _integers(conv.stride), conv.weight.shape
    return (
        weight[1] == 1
        and weight[0] in (conv.groups, 2 * conv.groups)
        and _integers(conv.dilation) in ((1, 1), (1,))
        and stride is not None
        and set(stride) <= {1, 2}
        and conv.padding_mode == "zeros"
        and (
            (conv.padding == "same" and set(stride) == {1})
            or conv.padding == "valid"
            or (not isinstance(conv.padding, str) and _integers(conv.padding) is not None)
        )
        and "_conv_forward" not in vars(conv)
    )


def _integers(value: object) -> tuple[int, ...] | None:
    """An integer or a pair of integers as a tuple; None for anything else, NumPy integers included."""
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(values) if len(values) <= 2 and all(type(v) is int for v in values) else None


def _layer_scale(channels: int, value: float | None, factory: dict) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((channels,), value, **factory))


class FFNifiedAttention(nn.Module):
    """The token mixer after its query projection, see :func:`ffnet_kernels.ffnified_attention`.

    Args:
        channels: C.
        kernel_size: of keys and values.
        activation: between them.
        bias: whether keys and values have biases.
        layer_scale: initial value of a learned scale per channel, or None for none.

    Shape: query ``[N, C, H, W]``, optional residual ``[N, C, H, W]``, to ``[N, C, H, W]``.
    """

    key_bias: nn.Parameter | None
    value_bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        *,
        activation: str = "gelu",
        bias: bool = True,
        layer_scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        _check_activation(activation)
        shape = (channels, 1, kernel_size, kernel_size)
        self.activation = activation
        self.key = nn.Parameter(torch.empty(shape, **factory))
        self.value = nn.Parameter(torch.empty(shape, **factory))
        self.register_parameter("key_bias", nn.Parameter(torch.zeros(channels, **factory)) if bias else None)
        self.register_parameter("value_bias", nn.Parameter(torch.zeros(channels, **factory)) if bias else None)
        self.register_parameter("scale", _layer_scale(channels, layer_scale, factory))
        for weight in (self.key, self.value):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, query: Tensor, residual: Tensor | None = None) -> Tensor:
        return ffnified_attention(
            query, self.key, self.key_bias, self.value, self.value_bias,
            activation=self.activation, scale=self.scale, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.key.shape[0]}, kernel_size={self.key.shape[2]}, activation={self.activation}"


class ChannelMixer(nn.Module):
    """The convolutional feed-forward network, see :func:`ffnet_kernels.channel_mixer`.

    Args:
        channels: C, of input and output.
        kernel_size: of the depthwise convolution.
        expansion: hidden channels per channel.
        activation: on the hidden map.
        bias: whether the three convolutions have biases.
        layer_scale: initial value of a learned scale per channel, or None for none.

    Shape: ``[N, C, H, W]``, optional residual of the same shape, to ``[N, C, H, W]``.
    """

    bias: nn.Parameter | None
    expand_bias: nn.Parameter | None
    project_bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        expansion: float = 3,
        *,
        activation: str = "gelu",
        bias: bool = True,
        layer_scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        _check_activation(activation)
        hidden = int(channels * expansion)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty((channels, 1, kernel_size, kernel_size), **factory))
        self.expand_weight = nn.Parameter(torch.empty((hidden, channels), **factory))
        self.project_weight = nn.Parameter(torch.empty((channels, hidden), **factory))
        for name, size in (("bias", channels), ("expand_bias", hidden), ("project_bias", channels)):
            self.register_parameter(name, nn.Parameter(torch.zeros(size, **factory)) if bias else None)
        self.register_parameter("scale", _layer_scale(channels, layer_scale, factory))
        for weight in (self.weight, self.expand_weight, self.project_weight):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return channel_mixer(
            x, self.weight, self.bias, self.expand_weight, self.expand_bias, self.project_weight, self.project_bias,
            activation=self.activation, scale=self.scale, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        hidden, channels = self.expand_weight.shape
        return f"{channels}, hidden={hidden}, kernel_size={self.weight.shape[2]}, activation={self.activation}"
