"""Fused kernels for large depthwise convolution and FFNet's two mixers, with a plain PyTorch fallback for all."""

from . import operators as operators  # registers torch.ops.ffnet_kernels
from . import training as training  # ... and torch.ops.ffnet_kernels_training
from .dispatch import BackendError, available_backends, use_backend
from .functional import channel_mixer, conv2d, depthwise_conv2d, explain, ffnified_attention
from .info import info
from .modules import ChannelMixer, DepthwiseConv2d, FFNifiedAttention
from .optimize import optimize
from .selftest import selftest
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ChannelMixer",
    "DepthwiseConv2d",
    "FFNifiedAttention",
    "available_backends",
    "channel_mixer",
    "conv2d",
    "depthwise_conv2d",
    "explain",
    "ffnified_attention",
    "info",
    "optimize",
    "selftest",
    "training",
    "use_backend",
    "warmup",
]
