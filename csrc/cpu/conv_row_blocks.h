// The inner kernel of every depthwise operator, for all filters, strides and taps: conv_row.cpp and conv_row_pairs.cpp
// instantiate it once for all operators.
#pragma once

#include <type_traits>
#include <utility>

#include "conv_row.h"

namespace ffnet::FFNET_ISA {

// How many pixels in reach of a block lie before and after the row; kUnknown: each is compared.
constexpr int kUnknown = -1;
template <int kBefore, int kAfter>
struct Outside {
  static constexpr bool known = kBefore != kUnknown;
  static constexpr bool has(int pixel, int reach) { return pixel < kBefore || pixel >= reach - kAfter; }
};
using NoneOutside = Outside<0, 0>;
using OutsideUnknown = Outside<kUnknown, kUnknown>;

// Adds taps [0, T) of one filter row, T <= 7, to a block whose first input pixel under these taps is `begin`.
template <class Taps, int T, int S, class Outside, int B>
FFNET_INLINE void add_taps(Vec (&sum)[B], const float* row, int64_t begin, int64_t pixel, int64_t width,
                           const float* weights) {
  constexpr int kReach = S * (B - 1) + T;
  Vec w[T];
#pragma GCC unroll 16
  for (int kx = 0; kx < T; ++kx) w[kx] = Vec::load(weights + kx * Vec::lanes);
  int64_t offset = begin * pixel;
#pragma GCC unroll 64
  for (int j = 0; j < kReach; ++j, offset += pixel) {
    if (Outside::known ? Outside::has(j, kReach) : static_cast<uint64_t>(begin + j) >= static_cast<uint64_t>(width))
      continue;
    const Vec x = Vec::load(row + offset);
#pragma GCC unroll 16
    for (int kx = 0; kx < T; ++kx)
      if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < B) sum[(j - kx) / S] = Taps::add(x, w[kx], sum[(j - kx) / S]);
  }
}

// Adds a row of a filter K wide, if it lies on the map, to outputs [first, first + B).
template <class Taps, int K, int S, class Outside, int B>
FFNET_INLINE void add_filter_row(Vec (&sum)[B], const RowInput& in, const PackedFilter& filter, int ky, int64_t begin) {
  const float* weights = filter.weights + ky * K * Vec::lanes;
  if (in.rows[ky]) add_taps<Taps, K, S, Outside>(sum, in.rows[ky], begin, in.pixel, in.width, weights);
}

// Outputs [first, first + B) of a row, for a filter K wide.
template <class Taps, int K, int S, int B, class Outside>
void conv_block(const RowInput& in, const PackedFilter& filter, int64_t first, float* out, int64_t out_pixel) {
  // With few sums, latency dominates: then every other filter row has its own sums.
  constexpr bool kTwice = 2 * B <= kMaxBlock && Vec::registers == 32;
  Vec sum[B], other[kTwice ? B : 1];
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) sum[b] = Vec::load(filter.bias);
  const int64_t begin = first * S - filter.pad_left;
  if constexpr (kTwice) {
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) other[b] = Vec::fill(0);
    for (int ky = 0; ky < filter.kh; ky += 2) {
      add_filter_row<Taps, K, S, Outside>(sum, in, filter, ky, begin);
      if (ky + 1 < filter.kh) add_filter_row<Taps, K, S, Outside>(other, in, filter, ky + 1, begin);
    }
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) sum[b] = sum[b] + other[b];
  } else {
    for (int ky = 0; ky < filter.kh; ++ky) add_filter_row<Taps, K, S, Outside>(sum, in, filter, ky, begin);
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) sum[b].store(out + b * out_pixel);
}

using Block = void (*)(const RowInput&, const PackedFilter&, int64_t first, float* out, int64_t out_pixel);

// The code for blocks of B outputs: some of it knows the edges of a row. With 16 registers a block has few sums to each
// pixel that would be compared, which tells where another thread shares the core.
template <class Taps, int K, int S, int B>
struct BlockCode {
  static constexpr bool kEdges = Vec::registers == 16 && B + 1 >= kMaxBlock, kInside = kEdges || K <= 4;
  template <bool known, int kBefore, int kAfter>
  static constexpr Block code =
      conv_block<Taps, K, S, B, std::conditional_t<known, Outside<kBefore, kAfter>, OutsideUnknown>>;
  // "Same" padding, at stride 2 of an even width.
  static constexpr int kBefore = K / 2, kAfter = S == 1 ? K / 2 : K / 2 - 1;

  static FFNET_INLINE Block select(int64_t begin, int64_t width) {
    const int64_t before = -begin, after = begin + S * (B - 1) + K - width;
    if (before <= 0 && after <= 0) return code<kInside, 0, 0>;
    if (before == kBefore && after <= 0) return code<kEdges, kBefore, 0>;
    if (before <= 0 && after == kAfter) return code<kEdges, 0, kAfter>;
    if (before == kBefore && after == kAfter) return code<kEdges, kBefore, kAfter>;
    return code<false, 0, 0>;
  }
};

// Any filter size, seven taps of a row at a time, like conv_block. One running sum over a large filter would accumulate
// rounding errors, so after every kRunningTaps or more it is added to a total and restarted.
template <class Taps, int S, int B>
void conv_block_any(const RowInput& in, const PackedFilter& filter, int64_t first, int count, float* out,
                    int64_t out_pixel) {
  constexpr int kRunningTaps = 49;
  Vec total[B], sum[B];
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) total[b] = Vec::load(filter.bias), sum[b] = Vec::fill(0);
  const int64_t begin = first * S - filter.pad_left;
  int taps = 0;
  for (int ky = 0; ky < filter.kh; ++ky) {
    const float* row = in.rows[ky];
    taps += Taps::rows * filter.kw;
    if (row) {
      const float* w = filter.weights + ky * filter.kw * Vec::lanes;
      int kx = 0;
      for (; kx + 7 <= filter.kw; kx += 7) {
        const int64_t from = begin + kx, to = from + S * (B - 1) + 7;
        if (from >= in.width || to <= 0) continue;
        if (from >= 0 && to <= in.width)
          add_taps<Taps, 7, S, NoneOutside>(sum, row, from, in.pixel, in.width, w + kx * Vec::lanes);
        else
          add_taps<Taps, 7, S, OutsideUnknown>(sum, row, from, in.pixel, in.width, w + kx * Vec::lanes);
      }
      const float* rest = w + kx * Vec::lanes;
      switch (filter.kw - kx) {
        case 1: add_taps<Taps, 1, S, OutsideUnknown>(sum, row, begin + kx, in.pixel, in.width, rest); break;
        case 2: add_taps<Taps, 2, S, OutsideUnknown>(sum, row, begin + kx, in.pixel, in.width, rest); break;
        case 3: add_taps<Taps, 3, S, OutsideUnknown>(sum, row, begin + kx, in.pixel, in.width, rest); break;
        case 4: add_taps<Taps, 4, S, OutsideUnknown>(sum, row, begin + kx, in.pixel, in.width, rest); break;
        case 5: add_taps<Taps, 5, S, OutsideUnknown>(sum, row, begin + kx, in.pixel, in.width, rest); break;
        case 6: add_taps<Taps, 6, S, OutsideUnknown>(sum, row, begin + kx, in.pixel, in.width, rest); break;
      }
    }
    if (taps >= kRunningTaps || ky + 1 == filter.kh) {
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) total[b] = total[b] + sum[b], sum[b] = Vec::fill(0);
      taps = 0;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b)
    if (b < count) total[b].store(out + b * out_pixel);
}

template <class Taps, int K, int S, size_t... I>
FFNET_INLINE void conv_row_blocks(const RowInput& in, const PackedFilter& filter, const RowOutput& out,
                                  std::index_sequence<I...>) {
  using Select = Block (*)(int64_t begin, int64_t width);
  static constexpr Select select[] = {BlockCode<Taps, K, S, I + 1>::select...};
  const auto run = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    const Block block = select[last - first - 1](first * S - filter.pad_left, in.width);
    block(in, filter, first, out.data + first * out.pixel, out.pixel);
  };
  const int64_t width = out.last - out.first, blocks = (width + kMaxBlock - 1) / kMaxBlock;  // of nearly equal size
  if (blocks == 1) return run(out.first, out.last);                                          // without divisions
  for (int64_t i = 0; i < blocks; ++i) run(out.first + i * width / blocks, out.first + (i + 1) * width / blocks);
}

template <class Taps, int K, int S>
void conv_row(const RowInput& in, const PackedFilter& filter, const RowOutput& out) {
  conv_row_blocks<Taps, K, S>(in, filter, out, std::make_index_sequence<kMaxBlock>());
}

// Blocks are whole or half: of a half-filled one the outputs past the end are computed and dropped.
template <class Taps, int S>
void conv_row_any(const RowInput& in, const PackedFilter& filter, const RowOutput& out) {
  constexpr int kHalf = kMaxBlock / 2;
  int64_t first = out.first;
  for (; out.last - first > kHalf; first += kMaxBlock) {
    const int64_t left = out.last - first;
    conv_block_any<Taps, S, kMaxBlock>(in, filter, first, left < kMaxBlock ? static_cast<int>(left) : kMaxBlock,
                                       out.data + first * out.pixel, out.pixel);
  }
  if (first < out.last)
    conv_block_any<Taps, S, kHalf>(in, filter, first, static_cast<int>(out.last - first), out.data + first * out.pixel,
                                   out.pixel);
}

template <class Taps>
ConvRow select_conv_row(const Filter& filter, int64_t stride) {
  if (!is_unrolled(filter.kh, filter.kw)) return stride == 1 ? conv_row_any<Taps, 1> : conv_row_any<Taps, 2>;
  if (filter.kw == 7) return stride == 1 ? conv_row<Taps, 7, 1> : conv_row<Taps, 7, 2>;
  if (filter.kw == 5) return stride == 1 ? conv_row<Taps, 5, 1> : conv_row<Taps, 5, 2>;
  return stride == 1 ? conv_row<Taps, 3, 1> : conv_row<Taps, 3, 2>;
}

}  // namespace ffnet::FFNET_ISA
