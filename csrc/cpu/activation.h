// The activations and their derivatives, one vector at a time, and applied to a row that a convolution has just left in
// L1. Each in activations.h has a function of its name, and one that also returns the derivative, `<name>_with_slope`.
//
// Derivatives of the smooth ones are NaN at infinities, as in torch: `nan_of_infinity` adds 0 * x.
#pragma once

#include "gelu_coefficients.h"
#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

FFNET_INLINE Vec none(Vec x) { return x; }
FFNET_INLINE Vec relu(Vec x) { return at_least(x, Vec::fill(0)); }
FFNET_INLINE Vec relu6(Vec x) { return at_most(relu(x), Vec::fill(6)); }
FFNET_INLINE Vec hardsigmoid(Vec x) { return relu6(x + Vec::fill(3)) * Vec::fill(1.f / 6); }
FFNET_INLINE Vec hardswish(Vec x) { return x * hardsigmoid(x); }

constexpr float kLeak = 0.01f;  // PyTorch's default
FFNET_INLINE Vec leaky_relu(Vec x) { return at_least(x, x * Vec::fill(kLeak)); }

#if defined(__AVX512F__)
// The table segment of t >= 0: adding 1.5 * 2^23 rounds to the nearest segment and leaves its number in the low bits.
struct Segment {
  __m512i number;
  Vec offset;
};
FFNET_INLINE Segment segment_of(Vec t) {
  namespace k = gelu_coefficients;
  const Vec magic = Vec::fill(12582912.f);
  const Vec s = at_most(t * Vec::fill(k::inverse_width), Vec::fill(k::last));
  const Vec shifted = s + magic;
  return {_mm512_castps_si512(shifted.v), s - (shifted - magic)};
}
FFNET_INLINE Vec look_up(const float (&table)[6][16], const Segment& at) {
  const auto coefficient = [&](int d) { return Vec{_mm512_permutexvar_ps(at.number, _mm512_load_ps(table[d]))}; };
  Vec y = coefficient(5);
  y = fma(y, at.offset, coefficient(4));
  y = fma(y, at.offset, coefficient(3));
  y = fma(y, at.offset, coefficient(2));
  y = fma(y, at.offset, coefficient(1));
  return fma(y, at.offset, coefficient(0));
}
#endif

// H(t) = erf(t / sqrt 2) / 2 for t >= 0.
FFNET_INLINE Vec half_erf(Vec t) {
  namespace k = gelu_coefficients;
#if defined(__AVX512F__)
  return look_up(k::table, segment_of(t));
#else
  const Vec s = at_most(t, Vec::fill(k::limit)), u = s * s;
  Vec p = Vec::fill(k::p[5]), q = Vec::fill(k::q[5]);
  for (int d = 4; d >= 0; --d) {
    p = fma(p, u, Vec::fill(k::p[d]));
    q = fma(q, u, Vec::fill(k::q[d]));
  }
  return at_most(s * p / q, Vec::fill(0.5f));
#endif
}

// x / 2 + |x| * H(|x|). NaN for -inf, as in torch.
FFNET_INLINE Vec gelu(Vec x) {
  const Vec t = abs(x);
  return fma(t, half_erf(t), x * Vec::fill(0.5f));
}

// exp on [-87, inf]; below, it stays at exp(-87), which does not change 1 + exp.
FFNET_INLINE Vec exp_for_sigmoid(Vec x) {
  x = at_least(at_most(x, Vec::fill(89.f)), Vec::fill(-87.f));
  const Vec n = round(x * Vec::fill(1.44269504f));
  // ln 2 in two parts, so that n * ln2 cancels exactly against x.
  const Vec r = fma(n, Vec::fill(2.12194440e-4f), fma(n, Vec::fill(-0.693359375f), x));
  constexpr float taylor[] = {1, 1, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
  Vec e = Vec::fill(taylor[7]);
  for (int d = 6; d >= 0; --d) e = fma(e, r, Vec::fill(taylor[d]));
  return scale_by_power(e, n);
}

FFNET_INLINE Vec sigmoid(Vec x) {
  const Vec one = Vec::fill(1);
  return one / (one + exp_for_sigmoid(Vec::fill(0) - x));
}

FFNET_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3)
FFNET_INLINE Vec gelu_tanh(Vec x) {
  const Vec inner = fma(x * x * x, Vec::fill(0.044715f), x);
  return x * sigmoid(inner * Vec::fill(1.59576912f));
}

// Calls f with the activation as a function object, so that loops are compiled for each activation.
template <class F>
FFNET_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
#define FFNET_CASE(name) \
  case Activation::name: return f([](Vec x) __attribute__((always_inline)) { return name(x); });
    FFNET_ACTIVATIONS(FFNET_CASE)
#undef FFNET_CASE
  }
}

// Applies the activation in place to `width` vectors that lie `pixel` floats apart.
inline void activate_row(float* row, int64_t pixel, int64_t width, Activation activation) {
  if (activation == Activation::none) return;
  with_activation(activation, [&](auto act) {
    for (float* end = row + width * pixel; row != end; row += pixel) act(Vec::load(row)).store(row);
  });
}

// ---- with derivatives ----

struct Activated {
  Vec value, slope;
};

FFNET_INLINE Vec nan_of_infinity(Vec x, Vec otherwise) { return fma(x, Vec::fill(0), otherwise); }

// `otherwise` where x is greater than the limit or NaN, else `below`.
FFNET_INLINE Vec above(Vec x, float limit, Vec otherwise, Vec below) {
  return {x.v <= Vec::fill(limit).v ? below.v : otherwise.v};
}

// The magnitude of one argument with the sign of the other.
FFNET_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
  return {sign.v < Vec::fill(0).v ? (Vec::fill(0) - magnitude).v : magnitude.v};
}

FFNET_INLINE Activated none_with_slope(Vec x) { return {x, Vec::fill(1)}; }

FFNET_INLINE Activated relu_with_slope(Vec x) { return {relu(x), above(x, 0, Vec::fill(1), Vec::fill(0))}; }

FFNET_INLINE Activated relu6_with_slope(Vec x) {
  const Vec one = Vec::fill(1), zero = Vec::fill(0);
  return {relu6(x), {x.v < Vec::fill(6).v ? above(x, 0, one, zero).v : zero.v}};  // 0 at NaN, as torch's
}

FFNET_INLINE Activated hardswish_with_slope(Vec x) {
  const Vec one = Vec::fill(1), between = fma(x, Vec::fill(1.f / 3), Vec::fill(0.5f));
  return {hardswish(x), above(x, -3, {x.v >= Vec::fill(3).v ? one.v : between.v}, Vec::fill(0))};
}

FFNET_INLINE Activated hardsigmoid_with_slope(Vec x) {
  const Vec sixth = Vec::fill(1.f / 6), zero = Vec::fill(0);
  return {hardsigmoid(x), {x.v < Vec::fill(3).v ? above(x, -3, sixth, zero).v : zero.v}};  // 0 at NaN, as torch's
}

FFNET_INLINE Activated leaky_relu_with_slope(Vec x) {
  return {leaky_relu(x), {x.v > Vec::fill(0).v ? Vec::fill(1).v : Vec::fill(kLeak).v}};
}

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

// y = sigmoid(v) and y * (1 - y) = e^-v y^2, without cancellation; the sigmoid never reaches 0, so this is safe.
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

// Calls f with the activation that also gives its derivative, like `with_activation`.
template <class F>
FFNET_INLINE void with_slope(Activation activation, const F& f) {
  switch (activation) {
#define FFNET_CASE(name) \
  case Activation::name: return f([](Vec x) __attribute__((always_inline)) { return name##_with_slope(x); });
    FFNET_ACTIVATIONS(FFNET_CASE)
#undef FFNET_CASE
  }
}

// For `width` adjacent vectors, writes the activation to `value`, unless null, and its derivative in place. Does
// nothing for Activation::none.
inline void slope_row(float* row, float* value, int64_t width, Activation activation) {
  if (activation == Activation::none) return;
  with_slope(activation, [&](auto function) {
    for (int64_t i = 0; i < width * Vec::lanes; i += Vec::lanes) {
      const Activated at = function(Vec::load(row + i));
      if (value) at.value.store(value + i);
      at.slope.store(row + i);
    }
  });
}

// Whether a derivative of 0 stops any gradient, even an infinite one, as in torch for piecewise activations.
constexpr bool is_piecewise(Activation activation) {
  return activation == Activation::relu || activation == Activation::relu6 || activation == Activation::hardswish ||
         activation == Activation::hardsigmoid;
}

FFNET_INLINE Vec times_slope(Vec grad, Vec slope, bool piecewise) {
  const auto zero = Vec::fill(0).v;
  return piecewise ? Vec{slope.v == zero ? zero : (grad * slope).v} : grad * slope;
}

// out = grad times the derivative, over `width` adjacent vectors.
inline void apply_slope_row(const float* grad, const float* slope, float* out, int64_t width, Activation activation) {
  const auto apply = [&](bool piecewise) __attribute__((always_inline)) {
    for (int64_t i = 0; i < width * Vec::lanes; i += Vec::lanes)
      times_slope(Vec::load(grad + i), Vec::load(slope + i), piecewise).store(out + i);
  };
  is_piecewise(activation) ? apply(true) : apply(false);
}

}  // namespace ffnet::FFNET_ISA
