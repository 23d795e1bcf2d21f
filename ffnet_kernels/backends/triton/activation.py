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
    elif ACTIVATION == "relu6":
        return _clamp6(x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        return x * (_clamp6(x + 3.0) * 0.16666667)
    elif ACTIVATION == "hardsigmoid":
        return _clamp6(x + 3.0) * 0.16666667
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * 0.01)
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
    elif ACTIVATION == "relu6":
        return tl.where((x <= 0) | (x >= 6), 0.0, 1.0)
    elif ACTIVATION == "hardswish":
        return tl.where(x <= -3, 0.0, tl.where(x < 3, x * 0.33333333 + 0.5, 1.0))
    elif ACTIVATION == "hardsigmoid":
        return tl.where((x > -3) & (x < 3), 0.16666667, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, 1.0, 0.01)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * tl.sigmoid(-x))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _clamp6(x):
    return tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))  # NaN stays


@triton.jit
def _tanh_argument(x):
    """2·√(2/π)·(x + 0.044715·x³), since (1 + tanh u) / 2 = sigmoid(2·u)."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)
