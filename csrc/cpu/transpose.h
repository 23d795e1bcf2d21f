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

// Lanes 0 0 1 1 2 2 ... of x.
template <size_t... L>
FFNET_INLINE Vec duplicate_lanes(Vec x, std::index_sequence<L...>) {
  return {__builtin_shufflevector(x.v, x.v, L / 2 ...)};
}

// Transposes `in_rows` vectors, returned by read(i) (the rest are zero), and passes the first `out_rows` of the result
// to write(i, vector).
template <class Read, class Write>
FFNET_INLINE void transpose_block(Read read, int64_t in_rows, Write write, int64_t out_rows) {
  Vec rows[Vec::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::lanes; ++i) rows[i] = i < in_rows ? read(i) : Vec::fill(0);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < Vec::lanes; ++i)
    if (i < out_rows) write(i, rows[i]);
}

}  // namespace ffnet::FFNET_ISA
