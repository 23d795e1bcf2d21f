// Activations and their derivatives: exact to float32 for float32 storage, by exp2 and a reciprocal for 16-bit storage.
#pragma once

#include <cmath>

#include "device.h"
#include "kernels.h"

namespace ffnet {

// ---- float32, as torch computes them ----

FFNET_DEVICE float activate_exact(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // keeps NaN
    case Activation::silu: return x / (1.0f + expf(-x));
    default: return x;
  }
}

FFNET_DEVICE float derivative_exact(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
    }
    case Activation::relu: return x <= 0.0f ? 0.0f : 1.0f;  // 1 at NaN, as torch's
    case Activation::silu: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    default: return 1.0f;
  }
}

// ---- 16-bit storage ----
//
// The smooth activations are x·σ(u) with u = x·P(x²), P of degree 5: exact for SiLU and the tanh form of GELU. For GELU
// itself P is fitted (tools/fit_cuda_gelu.py): the error is below 2^-12 of the value wherever float16 has its full
// precision, half of what rounding the result costs.

struct ActivationParameters {
  Activation kind;
  float c[6];  // of P, times -log2(e): exp(-u) is then a power of two
};

inline ActivationParameters activation_parameters(Activation kind) {
  constexpr float k = -1.44269504f;
  switch (kind) {
    case Activation::gelu:
      return {kind,
              {k * 1.59492468f, k * 7.37572741e-2f, k * -4.88870310e-4f, k * -3.88674801e-5f, k * 1.99622598e-6f,
               k * -3.00885992e-8f}};
    case Activation::gelu_tanh: return {kind, {k * 1.59576912f, k * 7.13548163e-2f}};
    case Activation::silu: return {kind, {k}};
    default: return {kind, {}};
  }
}

// σ(u); beyond |x| = 5.5, where GELU's is 0 or 1 to float16, P is held.
FFNET_DEVICE float sigmoid_fast(const ActivationParameters& p, float x, float& square) {
  square = fminf(x * x, 30.25f);
  float polynomial = p.c[5];
#pragma unroll
  for (int i = 4; i >= 0; --i) polynomial = polynomial * square + p.c[i];
  return fast_reciprocal(1.0f + fast_exp2(x * polynomial));
}

FFNET_DEVICE float activate_fast(const ActivationParameters& p, float x) {
  if (p.kind == Activation::none) return x;
  if (p.kind == Activation::relu) return x < 0.0f ? 0.0f : x;
  float square;
  return x * sigmoid_fast(p, x, square);
}

// x times the density of the normal distribution: GELU' = σ + this.
FFNET_DEVICE float gelu_slope(float x) { return x * 0.39894228f * fast_exp2(-0.72134752f * x * x); }

// The derivative at x, and the activation itself in `value`.
FFNET_DEVICE float derivative_fast(const ActivationParameters& p, float x, float& value) {
  value = x;
  if (p.kind == Activation::none) return 1.0f;
  if (p.kind == Activation::relu) {
    value = x < 0.0f ? 0.0f : x;
    return x <= 0.0f ? 0.0f : 1.0f;  // 1 at NaN, as torch's
  }
  float square;
  const float s = sigmoid_fast(p, x, square);
  value = x * s;
  if (p.kind == Activation::gelu) return s + gelu_slope(x);
  // σ(u)' = σ(1 - σ)·u' with u' = c0 + 3·c1·x²; the constant takes -log2(e) out again.
  return s + value * (1.0f - s) * -0.69314718f * (p.c[0] + 3.0f * p.c[1] * square);
}

// Over a few values at once: the kind is checked once, or known to be smooth or not.
FFNET_BOTH bool is_smooth(Activation kind) { return kind != Activation::none && kind != Activation::relu; }

template <int COUNT>
FFNET_DEVICE void activate_smooth(const ActivationParameters& p, const float (&x)[COUNT], float (&y)[COUNT]) {
  float square;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) y[i] = x[i] * sigmoid_fast(p, x[i], square);
}

template <int COUNT>
FFNET_DEVICE void activate_clamped(const ActivationParameters& p, const float (&x)[COUNT], float (&y)[COUNT]) {
  const float least = p.kind == Activation::relu ? 0.0f : -INFINITY;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) y[i] = x[i] < least ? least : x[i];  // keeps NaN
}

template <int COUNT>
FFNET_DEVICE void activate_fast(const ActivationParameters& p, const float (&x)[COUNT], float (&y)[COUNT]) {
  is_smooth(p.kind) ? activate_smooth(p, x, y) : activate_clamped(p, x, y);
}

template <int COUNT>
FFNET_DEVICE void derivative_fast(const ActivationParameters& p, const float (&x)[COUNT], float (&derivative)[COUNT],
                                  float (&value)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) derivative[i] = derivative_fast(p, x[i], value[i]);
}

template <int COUNT>
FFNET_DEVICE void derivative_gelu(const ActivationParameters& p, const float (&x)[COUNT], float (&derivative)[COUNT],
                                  float (&value)[COUNT]) {
  float square;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float s = sigmoid_fast(p, x[i], square);
    value[i] = x[i] * s;
    derivative[i] = s + gelu_slope(x[i]);
  }
}

}  // namespace ffnet
