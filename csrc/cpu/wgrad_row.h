// Weight gradients of a depthwise convolution from rows of both maps, for one vector of channels:
//   sums[ky][kx] += grad[i][j] * x[i * stride_h + ky][j * stride_w + left + kx]
#pragma once

#include "row_ring.h"

namespace ffnet::FFNET_ISA {

// Pixels [first, last) of `rows` rows; `x` points at the rows that gradient row 0 meets.
struct WgradRun {
  const float* const* grad;
  const float* const* x;
  int64_t rows, stride_h, stride_w, first, last, left, width;
};

// Adds the products of rows of both maps to the sums [kh][kw][lanes] of a filter; wgrad_row.cpp has the code, once for
// all operators.
void add_filter_sums(const WgradRun& run, int64_t kh, int64_t kw, float* sums);

// Adds rows [first, last) to a bias's sum, each summed separately.
inline void add_bias_sum(const RowRing& grad, int64_t first, int64_t last, int64_t width, float* sum) {
  for (int64_t r = first; r < last; ++r) {
    const float* row = grad.line(r);
    Vec total[4] = {Vec::fill(0), Vec::fill(0), Vec::fill(0), Vec::fill(0)};  // for the latency of additions
    int64_t j = 0;
    for (; j + 4 <= width; j += 4)
      for (int p = 0; p < 4; ++p) total[p] = total[p] + Vec::load(row + (j + p) * kLanes);
    for (; j < width; ++j) total[0] = total[0] + Vec::load(row + j * kLanes);
    (Vec::load(sum) + ((total[0] + total[1]) + (total[2] + total[3]))).store(sum);
  }
}

}  // namespace ffnet::FFNET_ISA
