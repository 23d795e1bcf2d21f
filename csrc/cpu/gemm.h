// Matrix product for 1x1 convolutions: C[rows][pixels] = A[rows][depth] * B[depth][pixels].
//
// A is the weight as torch stores it, read one tap (rows.h) at a time and broadcast: a float32, or two adjacent
// bfloat16. B is a panel of kPanel pixels: [channel][kPanel], or [pair of channels][kPanel].
#pragma once

#include "activation.h"
#include "rows.h"

namespace ffnet::FFNET_ISA {

constexpr int kPanel = 2 * Vec::lanes;
// Rows per register block: 2 * rows sums, two vectors of B and one broadcast fill the register file.
constexpr int kGemmRows = Vec::registers == 32 ? 14 : 6;

struct Matrix {
  const void* data;
  int64_t rows, depth;
  int64_t stride;     // elements from row to row; columns are adjacent
  const float* bias;  // of each row; may be null
};

// One running sum over the whole depth would round badly; after so many steps it is added to C and starts anew. Sums of
// products of bfloat16 round less than what they are rounded to in the end.
template <class Taps>
constexpr int64_t kRunningDepth = Taps::rows == 1 ? 128 : 512;

// C += A * B for R rows and one panel; depth in taps.
template <class Taps, int R>
void gemm_block(const float* a, int64_t stride, int64_t depth, const float* b, float* c) {
  Vec sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vec::fill(0);
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) row[r] = a + r * stride;
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    const Vec b0 = Vec::load(b), b1 = Vec::load(b + Vec::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec w = Vec::fill(row[r][k]);
      sum[r][0] = Taps::add(w, b0, sum[r][0]);
      sum[r][1] = Taps::add(w, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* at = c + r * kPanel;
    (Vec::load(at) + sum[r][0]).store(at);
    (Vec::load(at + Vec::lanes) + sum[r][1]).store(at + Vec::lanes);
  }
}

template <class Taps, size_t... I>
FFNET_INLINE void gemm_rows(int64_t rows, const float* a, int64_t stride, int64_t depth, const float* b, float* c,
                            std::index_sequence<I...>) {
  using Block = void (*)(const float*, int64_t, int64_t, const float*, float*);
  static constexpr Block make[] = {gemm_block<Taps, I + 1>...};
  for (int64_t k = 0; k < depth; k += kRunningDepth<Taps>)
    make[rows - 1](a + k, stride, min_of(kRunningDepth<Taps>, depth - k), b + k * kPanel, c);
}

// A block of A's rows as taps, copied next to each other: rows of a weight often lie a power of two apart, which makes
// them share few lines of a cache.
template <class T, class Taps>
class LeftBlock {
 public:
  static int64_t stride(int64_t depth) { return ceil_div(ceil_div(depth, Taps::rows), 32) * 32 + 16; }
  static int64_t floats(int64_t depth) { return kGemmRows * stride(depth); }

  static void pack(const Matrix& a, int64_t first, int64_t rows, float* out) {
    const int64_t taps = ceil_div(a.depth, Taps::rows);
    for (int64_t r = 0; r < rows; ++r, out += stride(a.depth)) {
      const T* row = static_cast<const T*>(a.data) + (first + r) * a.stride;
      if constexpr (Taps::rows == 1) {
        int64_t k = 0;
        for (; k + kLanes <= a.depth; k += kLanes) load(row + k).store(out + k);
        for (; k < a.depth; ++k) out[k] = to_float(row[k]);
      } else {
        out[taps - 1] = 0;
        __builtin_memcpy(out, row, static_cast<size_t>(a.depth) * sizeof(T));
      }
    }
  }
};

// For every block of rows and every panel of B (b_panel floats apart): A * B + bias, [rows][kPanel], given to
// finish(panel, first row, rows, block). Blocks begin at even rows. `left` has room for a LeftBlock.
template <class T, class Taps, class Finish>
FFNET_INLINE void gemm(const Matrix& a, const float* b, int64_t b_panel, int64_t panels, float* left,
                       const Finish& finish) {
  const int64_t pairs = ceil_div(a.rows, 2), blocks = ceil_div(pairs, kGemmRows / 2);  // of nearly equal size
  const int64_t stride = LeftBlock<T, Taps>::stride(a.depth), depth = ceil_div(a.depth, Taps::rows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * pairs / blocks * 2, rows = min_of((i + 1) * pairs / blocks * 2, a.rows) - first;
    LeftBlock<T, Taps>::pack(a, first, rows, left);
    for (int64_t p = 0; p < panels; ++p) {
      alignas(64) float block[kGemmRows * kPanel];
      for (int64_t r = 0; r < rows; ++r) {
        const Vec start = Vec::fill(a.bias ? a.bias[first + r] : 0);
        start.store(block + r * kPanel);
        start.store(block + r * kPanel + Vec::lanes);
      }
      gemm_rows<Taps>(rows, left, stride, depth, b + p * b_panel, block, std::make_index_sequence<kGemmRows>());
      finish(p, first, rows, block);  // apart from the sums, or they would spill
    }
  }
}

// Rows [first, first + rows) of a product, [rows][kPanel], as the B of the next; `first` is even.
template <class Taps>
void store_panel(const float* block, int64_t first, int64_t rows, float* panel) {
  if constexpr (Taps::rows == 1) {
    for (int64_t i = 0; i < rows * kPanel; i += Vec::lanes) Vec::load(block + i).store(panel + first * kPanel + i);
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
