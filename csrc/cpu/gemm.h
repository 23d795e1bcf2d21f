// Products with the weight on the left, C[outputs][pixels] = W[outputs][depth] * B[depth][pixels]: the weight is read
// from torch's storage, the map comes in panels of kPanel pixels. For large weights and few pixels.
#pragma once

#include "weight_rows.h"

namespace ffnet::FFNET_ISA {

// For every block of rows, which begin at even ones, and every panel of B (b_panel floats apart): start(panel, first
// row, rows, block) fills block [rows][kPanel], W * B is added to it and it is given to finish(panel, first row, rows,
// block). A block of W stays in L1 while all panels pass.
template <class Taps, class T, class Start, class Finish>
FFNET_INLINE void gemm(const Weight& weight, const WeightRows<T, Taps>& left, const float* b, int64_t b_panel,
                       int64_t panels, const Start& start, const Finish& finish) {
  const int64_t pairs = ceil_div(weight.outputs, 2),
                blocks = ceil_div(pairs, kProductRows / 2);  // of nearly equal size
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * pairs / blocks * 2, rows = min_of((i + 1) * pairs / blocks * 2, weight.outputs) - first;
    const float* from = left.block(first, rows);
    for (int64_t p = 0; p < panels; ++p) {
      alignas(64) float block[kProductRows * kPanel];
      start(p, first, rows, block);
      add_product<Taps, Order::by_rows_ahead>(rows, kPanel, {from, left.stride(), left.depth()}, b + p * b_panel,
                                              block);
      finish(p, first, rows, block);  // separate from the sums, which would spill otherwise
    }
  }
}

FFNET_INLINE void copy_block(const float* from, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows * kPanel; i += Vec::lanes) Vec::load(from + i).store(to + i);
}

// Rows [first, first + rows) of a product, [rows][kPanel], as the B of the next; `first` is even.
template <class Taps>
void store_panel(const float* block, int64_t first, int64_t rows, float* panel) {
  if constexpr (Taps::rows == 1) {
    copy_block(block, rows, panel + first * kPanel);
  } else {
#if defined(__AVX512BF16__)
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t i = 0; i < kPanel; i += Vec::lanes) {
        const Vec low = Vec::load(block + r * kPanel + i);
        const Vec high = r + 1 < rows ? Vec::load(block + (r + 1) * kPanel + i) : Vec::fill(0);
        interleave(low, high).store(panel + (first + r) / 2 * kPanel + i);
      }
    }
#endif
  }
}

}  // namespace ffnet::FFNET_ISA
