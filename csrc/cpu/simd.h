// One vector of float32 channels per instruction set. Each translation unit is compiled for one instruction set, and
// everything here is in that one's namespace, so that the linker can never use an AVX inline function in the baseline
// code.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define FFNET_ISA avx512bf16
#elif defined(__AVX512F__)
#include <immintrin.h>
#define FFNET_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define FFNET_ISA avx2
#else
#define FFNET_ISA baseline
#endif

#define FFNET_INLINE inline __attribute__((always_inline))

namespace ffnet::FFNET_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  __m512 v;
  static FFNET_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FFNET_INLINE Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  FFNET_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  // The first n lanes only; the others load as zero.
  static FFNET_INLINE Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps((1u << n) - 1, p)}; }
  FFNET_INLINE void store_first(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
};
FFNET_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FFNET_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FFNET_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FFNET_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FFNET_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// x86 min and max return their second operand where one is NaN: the variable goes second.
FFNET_INLINE Vec at_most(Vec x, Vec limit) { return {_mm512_min_ps(limit.v, x.v)}; }
FFNET_INLINE Vec at_least(Vec x, Vec limit) { return {_mm512_max_ps(limit.v, x.v)}; }
FFNET_INLINE Vec abs(Vec x) { return {_mm512_abs_ps(x.v)}; }
FFNET_INLINE Vec round(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for integral n in [-126, 128]; overflows to infinity.
FFNET_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

#elif defined(__AVX2__) && defined(__FMA__)

struct Vec {
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  __m256 v;
  static FFNET_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FFNET_INLINE Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  FFNET_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  static FFNET_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FFNET_INLINE Vec load_first(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  // A masked store is slow on AMD's processors, whatever its mask.
  FFNET_INLINE void store_first(float* p, int64_t n) const {
    n == lanes ? store(p) : _mm256_maskstore_ps(p, first(n), v);
  }
};
FFNET_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FFNET_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FFNET_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FFNET_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FFNET_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FFNET_INLINE Vec at_most(Vec x, Vec limit) { return {_mm256_min_ps(limit.v, x.v)}; }
FFNET_INLINE Vec at_least(Vec x, Vec limit) { return {_mm256_max_ps(limit.v, x.v)}; }
FFNET_INLINE Vec abs(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), x.v)}; }
FFNET_INLINE Vec round(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// Two steps of half the power each: 2^128 itself is not a float.
FFNET_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}

#else

// Compiler vectors: SSE2 on x86-64, NEON on ARM, scalars elsewhere.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));

struct Vec {
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  Floats v;
  static FFNET_INLINE Vec load(const float* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static FFNET_INLINE Vec fill(float x) { return {Floats{x, x, x, x}}; }
  FFNET_INLINE void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
  static FFNET_INLINE Vec load_first(const float* p, int64_t n) {
    Vec r = fill(0);
    for (int64_t i = 0; i < n && i < lanes; ++i) r.v[i] = p[i];
    return r;
  }
  FFNET_INLINE void store_first(float* p, int64_t n) const {
    for (int64_t i = 0; i < n && i < lanes; ++i) p[i] = v[i];
  }
};
FFNET_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FFNET_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FFNET_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FFNET_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FFNET_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FFNET_INLINE Vec at_most(Vec x, Vec limit) { return {limit.v < x.v ? limit.v : x.v}; }
FFNET_INLINE Vec at_least(Vec x, Vec limit) { return {limit.v > x.v ? limit.v : x.v}; }
FFNET_INLINE Vec abs(Vec x) { return {(Floats)((Ints)x.v & INT32_MAX)}; }
FFNET_INLINE Vec round(Vec x) {  // |x| < 2^22
  const Floats magic = {12582912.f, 12582912.f, 12582912.f, 12582912.f};
  return {(x.v + magic) - magic};
}
FFNET_INLINE Vec scale_by_power(Vec x, Vec n) {
  const Ints whole = __builtin_convertvector(n.v, Ints), half = whole >> 1;
  const auto power = [](Ints e) { return (Floats)((e + 127) << 23); };
  return {x.v * power(half) * power(whole - half)};
}

#endif

}  // namespace ffnet::FFNET_ISA
