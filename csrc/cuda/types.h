// Storage types of maps and weights. Kernels compute in float; two 16-bit values travel packed in a register.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FFNET_DEVICE __device__ __forceinline__
#define FFNET_BOTH __host__ __device__ __forceinline__  // called on the host, too
#else
#define FFNET_DEVICE inline
#define FFNET_BOTH inline
#endif

namespace ffnet {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
FFNET_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FFNET_DEVICE float to_float(float value) { return value; }
FFNET_DEVICE float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

#ifdef __CUDACC__
FFNET_DEVICE float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
#else
FFNET_DEVICE float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1f, fraction = value.bits & 0x3ff;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  return bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
#endif

template <class T>
FFNET_DEVICE T from_float(float value);

template <>
FFNET_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
FFNET_DEVICE Half from_float<Half>(float value) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves units of 2^-24 in the lowest bits, rounded
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  const uint32_t even = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((even - 0x38000000u) >> 13))};
#endif
}

template <>
FFNET_DEVICE BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

// The first value in the lower half, as matrix fragments have it.
template <class T>
FFNET_DEVICE uint32_t pack(float low, float high);

template <>
FFNET_DEVICE uint32_t pack<Half>(float low, float high) {
#ifdef __CUDACC__
  return bit_cast<uint32_t>(__floats2half2_rn(low, high));
#else
  return from_float<Half>(low).bits | static_cast<uint32_t>(from_float<Half>(high).bits) << 16;
#endif
}

template <>
FFNET_DEVICE uint32_t pack<BFloat16>(float low, float high) {
#ifdef __CUDACC__
  return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
#else
  return from_float<BFloat16>(low).bits | static_cast<uint32_t>(from_float<BFloat16>(high).bits) << 16;
#endif
}

template <class T>
FFNET_DEVICE float low_float(uint32_t packed) {
  return to_float(T{static_cast<uint16_t>(packed)});
}

template <class T>
FFNET_DEVICE float high_float(uint32_t packed) {
  return to_float(T{static_cast<uint16_t>(packed >> 16)});
}

}  // namespace ffnet
