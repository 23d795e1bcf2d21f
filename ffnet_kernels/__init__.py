"""Fused kernels for large depthwise convolution and FFNet's two mixers, with a plain PyTorch fallback for all."""

from . import ops as ops  # registers torch.ops.ffnet_kernels and those of training steps
from . import training as training
from .backends.activations import ACTIVATIONS
from .backends.choice import BackendError, available_backends, use_backend
from .export import export
from .info import info
from .modules import ChannelMixer, DepthwiseConv2d, FFNifiedAttention
from .ops import explain
from .ops.channel_mixer import channel_mixer
from .ops.conv2d import conv2d
from .ops.depthwise_conv1d import depthwise_conv1d
from .ops.depthwise_conv2d import depthwise_conv2d
from .ops.ffnified_attention import ffnified_attention
from .optimize import optimize, refresh, restore
from .report import report
from .selftest import selftest
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "ChannelMixer",
    "DepthwiseConv2d",
    "FFNifiedAttention",
    "available_backends",
    "channel_mixer",
    "conv2d",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "explain",
    "export",
    "ffnified_attention",
    "info",
    "optimize",
    "refresh",
    "report",
    "restore",
    "selftest",
    "training",
    "use_backend",
    "warmup",
]
