// Map elements as they are stored, and as vectors of float32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

// ---- one element: any processor -------------------------------------------------------------------------------------

template <class To, class From>
FFNET_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &value, sizeof to);
  return to;
}

FFNET_INLINE float to_float(float x) { return x; }
FFNET_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// A float16's exponent and mantissa, moved to a float32's, are its value times 2^-112; infinities and NaN are told
// apart.
FFNET_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f) | special | sign);
}

FFNET_INLINE void from_float(float x, float& to) { to = x; }
FFNET_INLINE void from_float(float x, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40);
}
// Adding 2^13 units in the result's last place makes the addition round to nearest even, for denormals too.
FFNET_INLINE void from_float(float x, Float16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and more, infinities, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else {
    const uint32_t exponent = magnitude < 0x38800000u ? 0x38800000u : magnitude & 0x7f800000u;  // at least 2^-14
    const float shift = bit_cast<float>(exponent + (13u << 23));
    half = (bit_cast<uint32_t>(bit_cast<float>(magnitude) + shift) & 0x7fffffu) + ((exponent - 0x38800000u) >> 13);
  }
  to.bits = static_cast<uint16_t>(half | sign);
}

// ---- vectors --------------------------------------------------------------------------------------------------------

FFNET_INLINE Vec load(const float* p) { return Vec::load(p); }
FFNET_INLINE Vec load_first(const float* p, int64_t n) { return Vec::load_first(p, n); }
FFNET_INLINE void store(Vec x, float* p) { x.store(p); }
FFNET_INLINE void store_first(Vec x, float* p, int64_t n) { x.store_first(p, n); }

#if defined(__AVX512F__)

FFNET_INLINE Vec widen(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FFNET_INLINE Vec widen(__m256i bits, Float16) { return {_mm512_cvtph_ps(bits)}; }
FFNET_INLINE __m256i narrow(Vec x, Float16) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
FFNET_INLINE __m256i narrow(Vec x, BFloat16) {
#if defined(__AVX512BF16__)
  return bit_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
#endif
}

template <class T>
FFNET_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T());
}
template <class T>
FFNET_INLINE Vec load_first(const T* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p), T());
}
template <class T>
FFNET_INLINE void store(Vec x, T* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T()));
}
template <class T>
FFNET_INLINE void store_first(Vec x, T* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow(x, T()));
}

#else

#if defined(__AVX2__) && defined(__FMA__)

FFNET_INLINE Vec widen(__m128i bits, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
FFNET_INLINE Vec widen(__m128i bits, Float16) { return {_mm256_cvtph_ps(bits)}; }
FFNET_INLINE __m128i narrow(Vec x, Float16) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
FFNET_INLINE __m128i narrow(Vec x, BFloat16) {
  const __m256i bits = _mm256_castps_si256(x.v), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i both = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

template <class T>
FFNET_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T());
}
template <class T>
FFNET_INLINE void store(Vec x, T* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T()));
}

#else

template <class T>
FFNET_INLINE Vec load(const T* p) {
  Vec r;
  for (int l = 0; l < Vec::lanes; ++l) r.v[l] = to_float(p[l]);
  return r;
}
template <class T>
FFNET_INLINE void store(Vec x, T* p) {
  for (int l = 0; l < Vec::lanes; ++l) from_float(x.v[l], p[l]);
}

#endif

template <class T>
FFNET_INLINE Vec load_first(const T* p, int64_t n) {
  if (n == Vec::lanes) return load(p);
  T whole[Vec::lanes] = {};
  __builtin_memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load(whole);
}
template <class T>
FFNET_INLINE void store_first(Vec x, T* p, int64_t n) {
  if (n == Vec::lanes) return store(x, p);
  T whole[Vec::lanes];
  store(x, whole);
  __builtin_memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}

#endif

// ---- two rows at a time ---------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// Lanes of two bfloat16 each, the low half from one row and the high half from the other.
FFNET_INLINE Vec interleave(__m256i low, __m256i high) {
  const __m512i even = _mm512_cvtepu16_epi32(low), odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(even, odd))};
}
FFNET_INLINE Vec interleave(Vec low, Vec high) { return interleave(narrow(low, BFloat16()), narrow(high, BFloat16())); }

FFNET_INLINE Vec low_half(Vec x) { return {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(narrow(x, BFloat16())))}; }
FFNET_INLINE Vec with_high_half(Vec low, Vec x) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x, BFloat16())), 16);
  return {_mm512_or_ps(low.v, _mm512_castsi512_ps(high))};
}

// sum + x.low * w.low + x.high * w.high
FFNET_INLINE Vec dot(Vec x, Vec w, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, bit_cast<__m512bh>(x.v), bit_cast<__m512bh>(w.v))};
}

#endif

}  // namespace ffnet::FFNET_ISA
