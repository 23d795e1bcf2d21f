// Matrix product for 1x1 convolutions: C[rows][pixels] = A[rows][depth] * B[depth][pixels].
//
// A is the weight as torch stores it, read one scalar at a time: it needs no packing. B and C are panels of kPanel
// pixels ([channel][kPanel]), which the depthwise stage writes in that form, and the product of one 1x1 convolution is
// the operand of the next.
#pragma once

#include "activation.h"
#include "pack.h"

namespace ffnet::FFNET_ISA {

constexpr int kPanel = 2 * Vec::lanes;
// Rows per register block: 2 * rows sums, two vectors of B and one broadcast fill the register file.
constexpr int kGemmRows = Vec::registers == 32 ? 14 : 6;

struct Matrix {
  const float* data;
  int64_t stride;  // floats from row to row; columns are adjacent
};

// One running sum over the whole depth would round badly; after so many products it is added to C and starts anew.
constexpr int64_t kRunningDepth = 128;

// C += A * B for R rows and one panel.
template <int R>
void gemm_block(const Matrix& a, int64_t depth, const float* b, float* c) {
  Vec sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vec::fill(0);
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) row[r] = a.data + r * a.stride;
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    const Vec b0 = Vec::load(b), b1 = Vec::load(b + Vec::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec w = Vec::fill(row[r][k]);
      sum[r][0] = fma(w, b0, sum[r][0]);
      sum[r][1] = fma(w, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* at = c + r * kPanel;
    (Vec::load(at) + sum[r][0]).store(at);
    (Vec::load(at + Vec::lanes) + sum[r][1]).store(at + Vec::lanes);
  }
}

template <size_t... I>
FFNET_INLINE void gemm_rows(int64_t rows, const Matrix& a, int64_t depth, const float* b, const float* bias, float* c,
                            std::index_sequence<I...>) {
  using Block = void (*)(const Matrix&, int64_t, const float*, float*);
  static constexpr Block make[] = {gemm_block<I + 1>...};
  for (int64_t r = 0; r < rows; ++r) {
    const Vec start = Vec::fill(bias ? bias[r] : 0);
    start.store(c + r * kPanel);
    start.store(c + r * kPanel + Vec::lanes);
  }
  for (int64_t k = 0; k < depth; k += kRunningDepth)
    make[rows - 1]({a.data + k, a.stride}, min_of(kRunningDepth, depth - k), b + k * kPanel, c);
}

// C panels = act(A * B panels + bias). Panels of B lie b_panel floats apart, those of C c_panel. A block of A's rows
// stays in L1 while all panels pass.
inline void gemm(const Matrix& a, int64_t rows, int64_t depth, const float* bias, const float* b, int64_t b_panel,
                 float* c, int64_t c_panel, int64_t panels, Activation activation) {
  const int64_t blocks = ceil_div(rows, kGemmRows);  // of nearly equal size
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * rows / blocks, count = (i + 1) * rows / blocks - first;
    const Matrix block{a.data + first * a.stride, a.stride};
    for (int64_t p = 0; p < panels; ++p) {
      float* out = c + p * c_panel + first * kPanel;
      gemm_rows(count, block, depth, b + p * b_panel, bias ? bias + first : nullptr, out,
                std::make_index_sequence<kGemmRows>());
      activate_row(out, Vec::lanes, 2 * count, activation);  // apart from the sums, or they would spill
    }
  }
}

}  // namespace ffnet::FFNET_ISA
