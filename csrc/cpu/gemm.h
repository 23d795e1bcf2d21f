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
  int64_t stride;  // elements from row to row; columns are adjacent
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

// A's rows as taps: where they are stored, or, where they are stored as something else, a block of them copied.
template <class T, class Taps>
class Left {
 public:
  static int64_t scratch_floats(int64_t depth) { return kGemmRows * taps(depth); }

  Left(const Matrix& a, float* scratch) : a_(a), scratch_(scratch) {
    const auto address = reinterpret_cast<uintptr_t>(a.data);
    in_place_ = sizeof(T) * Taps::rows == sizeof(float) && a.depth % Taps::rows == 0 && a.stride % Taps::rows == 0 &&
                address % sizeof(float) == 0;
  }
  int64_t depth() const { return taps(a_.depth); }
  int64_t stride() const { return in_place_ ? a_.stride / Taps::rows : depth(); }
  const float* block(int64_t first, int64_t rows) const {
    const T* from = static_cast<const T*>(a_.data) + first * a_.stride;
    if (in_place_) return reinterpret_cast<const float*>(from);
    float* out = scratch_;
    for (int64_t r = 0; r < rows; ++r, from += a_.stride, out += depth()) {
      if constexpr (Taps::rows == 1) {
        int64_t k = 0;
        for (; k + kLanes <= a_.depth; k += kLanes) load(from + k).store(out + k);
        for (; k < a_.depth; ++k) out[k] = to_float(from[k]);
      } else {
        out[depth() - 1] = 0;  // an odd depth leaves half of it
        __builtin_memcpy(out, from, static_cast<size_t>(a_.depth) * sizeof(T));
      }
    }
    return scratch_;
  }

 private:
  static int64_t taps(int64_t depth) { return ceil_div(depth, Taps::rows); }

  Matrix a_;
  float* scratch_;
  bool in_place_;
};

// For every block of rows, which begin at even ones, and every panel of B (b_panel floats apart): start(panel, first
// row, rows, block) fills block [rows][kPanel], A * B is added to it and it is given to finish(panel, first row, rows,
// block). A block of A stays in L1 while all panels pass.
template <class Taps, class T, class Start, class Finish>
FFNET_INLINE void gemm(const Matrix& a, const Left<T, Taps>& left, const float* b, int64_t b_panel, int64_t panels,
                       const Start& start, const Finish& finish) {
  const int64_t pairs = ceil_div(a.rows, 2), blocks = ceil_div(pairs, kGemmRows / 2);  // of nearly equal size
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * pairs / blocks * 2, rows = min_of((i + 1) * pairs / blocks * 2, a.rows) - first;
    const float* from = left.block(first, rows);
    for (int64_t p = 0; p < panels; ++p) {
      alignas(64) float block[kGemmRows * kPanel];
      start(p, first, rows, block);
      gemm_rows<Taps>(rows, from, left.stride(), left.depth(), b + p * b_panel, block,
                      std::make_index_sequence<kGemmRows>());
      finish(p, first, rows, block);  // apart from the sums, or they would spill
    }
  }
}

// The usual start: each row's bias, which may be null.
FFNET_INLINE void start_with_bias(const float* bias, int64_t rows, float* block) {
  for (int64_t r = 0; r < rows; ++r, block += kPanel) {
    const Vec value = Vec::fill(bias ? bias[r] : 0);
    value.store(block);
    value.store(block + Vec::lanes);
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
