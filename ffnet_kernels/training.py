"""Layers of training steps, each as one operator that keeps little for the backward pass.

On the CPU native kernels run them, in float32 and, as under autocast, on maps of 16 bits with normalisation in float32;
elsewhere, and in transforms, plain PyTorch does. Native results are channels-last. All functions are differentiable to
any order.
"""

from .ops.batch_norm import Norm, batch_norm
from .ops.branched_depthwise import branched_depthwise
from .ops.feed_forward import feed_forward

__all__ = ["Norm", "batch_norm", "branched_depthwise", "feed_forward"]
