"""The activations and their derivatives inside kernels; they compute in float32."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(_tanh_argument(x))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)  # NaN stays
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        u = _tanh_argument(x)
        s = tl.sigmoid(u)  # 1 - s would cancel
        return s + x * s * tl.sigmoid(-u) * (1.5957691216057308 + 0.21406444881780073 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * tl.sigmoid(-x))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _tanh_argument(x):
    """2·√(2/π)·(x + 0.044715·x³), since (1 + tanh u) / 2 = sigmoid(2·u)."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)
