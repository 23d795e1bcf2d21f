// Activations and their derivatives: exact to float32 for float32 storage, by exp2 and a reciprocal for 16-bit storage.
#pragma once

#include <cmath>

#include "device.h"
#include "kernels.h"

namespace ffnet {

// ---- those made of pieces; comparisons are such that NaN stays, and the derivative there is 1, as torch's ----

FFNET_DEVICE bool is_smooth(Activation activation) {
  return activation == Activation::gelu || activation == Activation::gelu_tanh || activation == Activation::silu;
}

FFNET_DEVICE float bounded(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

FFNET_DEVICE float hardswish(float x) { return x * (bounded(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f)); }

// What bounds those that are the identity between two values.
FFNET_DEVICE float least_of(Activation activation) { return activation == Activation::none ? -INFINITY : 0.0f; }
FFNET_DEVICE float most_of(Activation activation) { return activation == Activation::relu6 ? 6.0f : INFINITY; }

FFNET_DEVICE float activate_pieces(Activation activation, float x) {
  if (activation == Activation::hardswish) return hardswish(x);
  return bounded(x, least_of(activation), most_of(activation));
}

FFNET_DEVICE float derivative_of_pieces(Activation activation, float x) {
  if (activation == Activation::hardswish) return x <= -3.0f ? 0.0f : x < 3.0f ? x * (1.0f / 3.0f) + 0.5f : 1.0f;
  if (activation == Activation::none) return 1.0f;
  return x <= 0.0f || x >= most_of(activation) ? 0.0f : 1.0f;
}

// ---- float32, as torch computes them ----

FFNET_DEVICE float activate_exact(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + expf(-x));
    default: return activate_pieces(activation, x);
  }
}

FFNET_DEVICE float derivative_exact(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
    }
    case Activation::silu: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    default: return derivative_of_pieces(activation, x);
  }
}

// ---- 16-bit storage ----
//
// The smooth activations are x·σ(u) with u = x·P(x²), P of degree 5: exact for SiLU and the tanh form of GELU. For GELU
// itself P is fitted (tools/fit_cuda_gelu.py): the error is below 2^-12 of the value wherever float16 has its full precision, half
// of what rounding the result costs.

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
  if (!is_smooth(p.kind)) return activate_pieces(p.kind, x);
  float square;
  return x * sigmoid_fast(p, x, square);
}

// The derivative at x, and the activation itself in `value`.
FFNET_DEVICE float derivative_fast(const ActivationParameters& p, float x, float& value) {
  if (!is_smooth(p.kind)) {
    value = activate_pieces(p.kind, x);
    return derivative_of_pieces(p.kind, x);
  }
  float square;
  const float s = sigmoid_fast(p, x, square);
  value = x * s;
  if (p.kind == Activation::gelu) return s + x * 0.39894228f * fast_exp2(-0.72134752f * x * x);
  // σ(u)' = σ(1 - σ)·u' with u' = c0 + 3·c1·x²; the constant takes -log2(e) out again.
  return s + value * (1.0f - s) * -0.69314718f * (p.c[0] + 3.0f * p.c[1] * square);
}

// Over a few values at once: the kind is asked for once.
template <int COUNT>
FFNET_DEVICE void activate_fast(const ActivationParameters& p, const float (&x)[COUNT], float (&y)[COUNT]) {
  if (is_smooth(p.kind)) {
    float square;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) y[i] = x[i] * sigmoid_fast(p, x[i], square);
  } else if (p.kind == Activation::hardswish) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) y[i] = hardswish(x[i]);
  } else {
    const float least = least_of(p.kind), most = most_of(p.kind);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) y[i] = bounded(x[i], least, most);
  }
}

template <int COUNT>
FFNET_DEVICE void derivative_fast(const ActivationParameters& p, const float (&x)[COUNT], float (&derivative)[COUNT],
                                  float (&value)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) derivative[i] = derivative_fast(p, x[i], value[i]);
}

}  // namespace ffnet
