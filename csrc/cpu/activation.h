// The activations, one vector at a time, and applied to a row that a convolution has just left in L1.
#pragma once

#include "gelu_coefficients.h"
#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

FFNET_INLINE Vec relu(Vec x) { return at_least(x, Vec::fill(0)); }

#if defined(__AVX512F__)
// Where a t >= 0 lies in the tables: adding 1.5 * 2^23 rounds to the nearest segment and leaves its number in the low
// bits.
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

// x / 2 + |x| * H(|x|). NaN for -inf, as torch has it.
FFNET_INLINE Vec gelu(Vec x) {
  const Vec t = abs(x);
  return fma(t, half_erf(t), x * Vec::fill(0.5f));
}

// exp on [-87, inf]; below it stays at exp(-87), which 1 + exp does not see.
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

template <Vec (*function)(Vec)>
FFNET_INLINE void map_row(float* row, int64_t pixel, int64_t width) {
  for (int64_t i = 0; i < width; ++i, row += pixel) function(Vec::load(row)).store(row);
}

// Applies the activation in place to `width` vectors that lie `pixel` floats apart.
inline void activate_row(float* row, int64_t pixel, int64_t width, Activation activation) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return map_row<relu>(row, pixel, width);
    case Activation::gelu: return map_row<gelu>(row, pixel, width);
    case Activation::gelu_tanh: return map_row<gelu_tanh>(row, pixel, width);
    case Activation::silu: return map_row<silu>(row, pixel, width);
  }
}

}  // namespace ffnet::FFNET_ISA
