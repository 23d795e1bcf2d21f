// The activations together with their derivatives, one vector at a time and over rows.
//
// Derivatives of the smooth ones are NaN at infinities, as torch has them: `nan_of_infinity` adds 0 * x.
#pragma once

#include "activation.h"

namespace ffnet::FFNET_ISA {

struct Activated {
  Vec value, slope;
};

FFNET_INLINE Vec nan_of_infinity(Vec x, Vec otherwise) { return fma(x, Vec::fill(0), otherwise); }

// `grad` where x is positive or NaN, else 0 whatever grad is.
FFNET_INLINE Vec where_positive(Vec x, Vec grad) {
  const auto zero = Vec::fill(0).v;
  return {x.v <= zero ? zero : grad.v};
}

// The magnitude of one with the sign of the other.
FFNET_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
  return {sign.v < Vec::fill(0).v ? (Vec::fill(0) - magnitude).v : magnitude.v};
}

FFNET_INLINE Activated relu_with_slope(Vec x) { return {relu(x), where_positive(x, Vec::fill(1))}; }

// 1/2 + sign(x) * G(|x|), G(t) = H(t) + t * phi(t)
FFNET_INLINE Activated gelu_with_slope(Vec x) {
  const Vec t = abs(x), half = Vec::fill(0.5f);
  const Vec h = half_erf(t);
#if defined(__AVX512F__)
  const Vec g = look_up(gelu_coefficients::slopes, segment_of(t));
#else
  const Vec s = at_most(t, Vec::fill(13));  // beyond, phi vanishes
  const Vec g = fma(s * Vec::fill(0.398942280f), exp_for_sigmoid(s * s * Vec::fill(-0.5f)), h);
#endif
  return {fma(t, h, x * half), nan_of_infinity(x, half) + with_sign_of(g, x)};
}

// y = sigmoid(v) and y * (1 - y) = e^-v y^2, without cancellation; a sigmoid never gets to 0, so that this holds.
struct Sigmoid {
  Vec value, slope;
};
FFNET_INLINE Sigmoid sigmoid_with_slope(Vec v) {
  const Vec e = exp_for_sigmoid(at_most(Vec::fill(0) - v, Vec::fill(87)));
  const Vec y = Vec::fill(1) / (Vec::fill(1) + e);
  return {y, e * y * y};
}

FFNET_INLINE Activated silu_with_slope(Vec x) {
  const Sigmoid s = sigmoid_with_slope(x);
  const Vec bounded = at_least(at_most(x, Vec::fill(87)), Vec::fill(-87));  // beyond, s.slope vanishes
  return {silu(x), nan_of_infinity(x, fma(bounded, s.slope, s.value))};
}

// x * sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3)
FFNET_INLINE Activated gelu_tanh_with_slope(Vec x) {
  const Vec bounded = at_least(at_most(x, Vec::fill(16)), Vec::fill(-16)), square = bounded * bounded;
  const Vec inner = fma(square * bounded, Vec::fill(0.044715f), bounded);
  const Vec inner_slope = fma(square, Vec::fill(0.134145f), Vec::fill(1));
  const Sigmoid s = sigmoid_with_slope(inner * Vec::fill(1.59576912f));
  const Vec slope = fma(bounded * inner_slope * Vec::fill(1.59576912f), s.slope, s.value);
  return {gelu_tanh(x), nan_of_infinity(x, slope)};
}

template <Activated (*function)(Vec)>
FFNET_INLINE void map_row_with_slope(float* row, float* value, int64_t width) {
  for (int64_t i = 0; i < width * Vec::lanes; i += Vec::lanes) {
    const Activated at = function(Vec::load(row + i));
    if (value) at.value.store(value + i);
    at.slope.store(row + i);
  }
}

// Of `width` adjacent vectors: writes the activation to `value`, where there is one, and its derivative in place.
// Nothing is done for Activation::none.
inline void slope_row(float* row, float* value, int64_t width, Activation activation) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return map_row_with_slope<relu_with_slope>(row, value, width);
    case Activation::gelu: return map_row_with_slope<gelu_with_slope>(row, value, width);
    case Activation::gelu_tanh: return map_row_with_slope<gelu_tanh_with_slope>(row, value, width);
    case Activation::silu: return map_row_with_slope<silu_with_slope>(row, value, width);
  }
}

// out = grad times the derivative, over `width` adjacent vectors; ReLU stops any gradient, an infinite one too.
inline void apply_slope_row(const float* grad, const float* slope, float* out, int64_t width, Activation activation) {
  const int64_t floats = width * Vec::lanes;
  if (activation == Activation::relu) {
    for (int64_t i = 0; i < floats; i += Vec::lanes)
      where_positive(Vec::load(slope + i), Vec::load(grad + i)).store(out + i);
  } else {
    for (int64_t i = 0; i < floats; i += Vec::lanes) (Vec::load(grad + i) * Vec::load(slope + i)).store(out + i);
  }
}

}  // namespace ffnet::FFNET_ISA
