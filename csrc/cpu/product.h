// The inner kernel of all matrix products: sums of A[rows][depth] * B[depth][kPanel] in registers.
//
// A is read one tap (rows.h) at a time as it lies in memory and broadcast: a float32, or two adjacent bfloat16. B is a
// panel of kPanel columns: [depth][kPanel] floats, or as many pairs of bfloat16.
#pragma once

#include "activation.h"
#include "rows.h"

namespace ffnet::FFNET_ISA {

constexpr int kPanel = 2 * Vec::lanes;
// Rows per register block: 2 * rows sums, two vectors of B and one broadcast fill the register file.
constexpr int kProductRows = Vec::registers == 32 ? 14 : 6;

// Tap k of row r lies at data[r * stride + k], or, where the operand is read by columns, at data[k * stride + r].
// `by_rows_ahead` prefetches the following rows while multiplying: for a matrix that is not in cache, with more streams
// than hardware prefetchers follow.
enum class Order { by_rows, by_rows_ahead, by_columns };

// The left operand: `depth` taps a row, or as many several times, `run_stride` floats apart: the rows of a window.
struct LeftOperand {
  const float* data;
  int64_t stride, depth;
  int64_t runs = 1, run_stride = 0;
};

// C += A * B for up to kProductRows rows and a panel of which `columns` count: C is [rows][kPanel]. What C has in other
// columns may change. product.cpp holds the code.
template <class Taps, Order order = Order::by_rows>
void add_product(int64_t rows, int64_t columns, const LeftOperand& a, const float* b, float* c);

// What C may start from: each column's element, or each row's; either array may be null.
FFNET_INLINE void start_with_row(const float* row, int64_t rows, float* block) {
  const Vec low = row ? Vec::load(row) : Vec::fill(0), high = row ? Vec::load(row + Vec::lanes) : Vec::fill(0);
  for (int64_t r = 0; r < rows; ++r, block += kPanel) low.store(block), high.store(block + Vec::lanes);
}
FFNET_INLINE void start_with_column(const float* column, int64_t rows, float* block) {
  for (int64_t r = 0; r < rows; ++r, block += kPanel) {
    const Vec value = Vec::fill(column ? column[r] : 0);
    value.store(block), value.store(block + Vec::lanes);
  }
}

// f(first row, rows) for blocks of nearly equal size.
template <class F>
FFNET_INLINE void each_block(int64_t rows, const F& f) {
  const int64_t blocks = ceil_div(rows, kProductRows);
  for (int64_t i = 0; i < blocks; ++i) f(i * rows / blocks, (i + 1) * rows / blocks - i * rows / blocks);
}

}  // namespace ffnet::FFNET_ISA
