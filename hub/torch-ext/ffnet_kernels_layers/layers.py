"""Layers without state: their forward takes the place of that of a module with the attributes that it reads."""

import torch
from torch import nn

from ffnet_kernels import channel_mixer, ffnified_attention
from ffnet_kernels.modules import convolve

__all__ = ["ChannelMixer", "Conv2d", "FFNifiedAttention"]


class Conv2d(nn.Module):
    """Of an ``nn.Conv2d``: on the operator where it is depthwise and what the operator takes, else as it was."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return convolve(self, input)


class FFNifiedAttention(nn.Module):
    """Of a module with ``key``, ``key_bias``, ``value``, ``value_bias``, ``activation`` and ``scale``."""

    has_backward = True
    can_torch_compile = True

    def forward(self, query: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return ffnified_attention(
            query, self.key, self.key_bias, self.value, self.value_bias,
            activation=self.activation, scale=self.scale, residual=residual,
        )  # fmt: skip


class ChannelMixer(nn.Module):
    """Of a module with the parameters of ``ffnet_kernels.ChannelMixer``."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return channel_mixer(
            x, self.weight, self.bias, self.expand_weight, self.expand_bias, self.project_weight, self.project_bias,
            activation=self.activation, scale=self.scale, residual=residual,
        )  # fmt: skip
