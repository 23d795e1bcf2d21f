// One output row of a depthwise convolution, for one vector of channels: the inner kernel of every operator here.
//
// Outputs are computed in blocks held in registers; every input pixel is loaded once per filter row and added to all
// outputs it reaches. Taps that fall on padding are skipped, not multiplied by zero, and the order of additions depends
// only on the filter and the width of the row, so results do not change with tiling or threads.
#pragma once

#include "kernels.h"
#include "storage.h"

namespace ffnet::FFNET_ISA {

// One multiply-add of a tap: what a lane of a map row and of a filter holds (rows.h tells which).
struct FloatTaps {
  static constexpr int rows = 1;
  static FFNET_INLINE Vec add(Vec x, Vec w, Vec sum) { return fma(x, w, sum); }
};
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;  // whether rows of bfloat16 maps are processed in pairs
struct PairTaps {
  static constexpr int rows = 2;
  static FFNET_INLINE Vec add(Vec x, Vec w, Vec sum) { return dot(x, w, sum); }
};
#else
constexpr bool kPairs = false;
#endif

// Input of an output row: kh row pointers (null where the row is padding) of `width` vectors, `pixel` floats apart.
struct RowInput {
  const float* const* rows;
  int64_t pixel, width;
};

// Weights packed [kh][kw][lanes], for each row of a group that a window may start at; bias [lanes].
struct PackedFilter {
  const float* weights;
  const float* bias;
  int64_t parity_floats;
  int kh, kw, stride, pad_left;
  PackedFilter starting_at(int64_t row) const {
    PackedFilter shifted = *this;
    shifted.weights += row * parity_floats;
    return shifted;
  }
};

// Outputs [first, last) of a row; `data` is output 0.
struct RowOutput {
  float* data;
  int64_t pixel, first, last;
};

using ConvRow = void (*)(const RowInput&, const PackedFilter&, const RowOutput&);

// Outputs per register block. With 16 registers: 8 sums, 7 weights of a filter row and the pixel.
constexpr int kMaxBlock = Vec::registers == 32 ? 16 : 8;

// Whether a filter has unrolled code of its own; beyond nine rows one running sum would round worse than conv_row_any.
FFNET_INLINE bool is_unrolled(int64_t kh, int64_t kw) { return kh <= 9 && (kw == 3 || kw == 5 || kw == 7); }

// The code for rows of a filter.
template <class Taps>
ConvRow select_conv_row(const Filter& filter, int64_t stride);

// The same at stride 1 for a part of a filter, of a few columns also.
ConvRow select_part_row(int64_t kh, int64_t kw);

}  // namespace ffnet::FFNET_ISA
