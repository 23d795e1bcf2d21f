// Transposing square blocks of vectors in registers: the step between "vectors of channels" and "vectors of pixels".
#pragma once

#include <utility>

#include "simd.h"

namespace ffnet::FFNET_ISA {

// Exchanges the off-diagonal S x S blocks of every 2S x 2S block that the vectors a (upper) and b (lower) belong to.
template <int S, size_t... L>
FFNET_INLINE void exchange(Vec& a, Vec& b, std::index_sequence<L...>) {
  constexpr int n = Vec::lanes;
  const auto upper = __builtin_shufflevector(a.v, b.v, ((L & S) ? n + L - S : L)...);
  const auto lower = __builtin_shufflevector(a.v, b.v, ((L & S) ? n + L : L + S)...);
  a.v = upper, b.v = lower;
}

template <int S>
FFNET_INLINE void exchange_all(Vec (&rows)[Vec::lanes]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec::lanes; ++i)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<Vec::lanes>());
    exchange_all<S / 2>(rows);
  }
}

// rows[i] lane j <-> rows[j] lane i
FFNET_INLINE void transpose(Vec (&rows)[Vec::lanes]) { exchange_all<Vec::lanes / 2>(rows); }

// Copies the lanes x lanes block at `from` (rows `from_stride` floats apart) transposed to `to`.
FFNET_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec rows[Vec::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::lanes; ++i) rows[i] = Vec::load(from + i * from_stride);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < Vec::lanes; ++i) rows[i].store(to + i * to_stride);
}

}  // namespace ffnet::FFNET_ISA
