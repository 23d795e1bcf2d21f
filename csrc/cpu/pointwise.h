// Products for 1x1 convolutions of channels-last maps, whose pixels are the rows of a matrix [pixels][channels].
//
// The right operand is packed in panels of kPointwisePanel columns; the left one is read one scalar at a time as it
// lies, by rows for a convolution (C = A B) and by columns for a weight gradient (C = Aᵀ B). Nothing is transposed on
// the way.
#pragma once

#include "tiling.h"

namespace ffnet::FFNET_ISA {

constexpr int kPointwisePanel = 2 * Vec::lanes;
// Rows per register block: 2 * rows sums, two vectors of B and one broadcast fill the register file.
constexpr int kProductRows = Vec::registers == 32 ? 14 : 6;
// One running sum over the whole depth would round badly; after so many products it is added to C and starts anew.
// A panel of B of that depth is a third of an L1.
constexpr int64_t kDepth = 128;

// Left operand: element (r, k) at data[r * stride + k], or, read by columns, at data[k * stride + r].
struct Left {
  const float* data;
  int64_t stride;
};

// Columns [0, count) of C; sums start from `start`, or, where that is null, from what C holds.
struct Target {
  float* data;
  int64_t stride, count;
  const float* start;
};

template <int R, int V, bool kByColumns>
void product_block(const Left& a, int64_t depth, const float* b, const Target& c) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = Vec::fill(0);
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) row[r] = kByColumns ? a.data + r : a.data + r * a.stride;
  const float* column = a.data;
  for (int64_t k = 0; k < depth; ++k, b += kPointwisePanel, column += a.stride) {
    Vec right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = Vec::load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec left = Vec::fill(kByColumns ? column[r] : row[r][k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
  const int64_t last = c.count - (V - 1) * kLanes;  // columns of the last vector
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* to = c.data + r * c.stride;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const float* from = c.start ? c.start + v * kLanes : to + v * kLanes;
      if (v + 1 < V || last == kLanes)
        (Vec::load(from) + sum[r][v]).store(to + v * kLanes);
      else
        (Vec::load_first(from, last) + sum[r][v]).store_first(to + v * kLanes, last);
    }
  }
}

template <int V, bool kByColumns, size_t... I>
FFNET_INLINE void product_rows(int64_t rows, const Left& a, int64_t depth, const float* b, const Target& c,
                               std::index_sequence<I...>) {
  using Block = void (*)(const Left&, int64_t, const float*, const Target&);
  static constexpr Block make[] = {product_block<I + 1, V, kByColumns>...};
  make[rows - 1](a, depth, b, c);
}

// C (at most kPointwisePanel columns) = start + A B for one panel of B, `depth` <= kDepth deep.
template <bool kByColumns>
inline void multiply_panel(const Left& a, int64_t rows, int64_t depth, const float* b, const Target& c) {
  const int64_t blocks = ceil_div(rows, kProductRows);  // of nearly equal size
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * rows / blocks, count = (i + 1) * rows / blocks - first;
    const Left part{a.data + (kByColumns ? first : first * a.stride), a.stride};
    const Target to{c.data + first * c.stride, c.stride, c.count, c.start};
    if (c.count > kLanes)
      product_rows<2, kByColumns>(count, part, depth, b, to, std::make_index_sequence<kProductRows>());
    else
      product_rows<1, kByColumns>(count, part, depth, b, to, std::make_index_sequence<kProductRows>());
  }
}

// A weight packed as right operand: [blocks of kDepth rows][panels][row][kPointwisePanel], missing columns zero.
struct PackedMatrix {
  const float* data;
  int64_t depth, columns;
  int64_t panels() const { return ceil_div(columns, kPointwisePanel); }
  const float* panel(int64_t k, int64_t j) const {
    return data + (k * panels() + j * min_of(kDepth, depth - k)) * kPointwisePanel;
  }
};

FFNET_INLINE int64_t packed_matrix_floats(int64_t depth, int64_t columns) {
  return depth * ceil_div(columns, kPointwisePanel) * kPointwisePanel;
}

// C rows = bias + A B. `bias` has a whole number of panels; `c` has B's columns.
inline void multiply(const float* a, int64_t a_stride, int64_t rows, const PackedMatrix& b, const float* bias, float* c,
                     int64_t c_stride) {
  for (int64_t k = 0; k < b.depth; k += kDepth) {
    const int64_t depth = min_of(kDepth, b.depth - k);
    for (int64_t j = 0; j < b.panels(); ++j) {
      const int64_t column = j * kPointwisePanel;
      multiply_panel<false>(
          {a + k, a_stride}, rows, depth, b.panel(k, j),
          {c + column, c_stride, min_of(kPointwisePanel, b.columns - column), k ? nullptr : bias + column});
    }
  }
}

// The weight [outputs][inputs] of a 1x1 convolution as right operand: of the convolution, transposed, or of its input
// gradient, as it lies. A scale of the outputs, where there is one, is multiplied in.
struct WeightPacking {
  const float* weight;
  int64_t outputs, inputs;
  const float* scale;
  bool transposed;
  float* to;
  PackedMatrix matrix() const {
    return transposed ? PackedMatrix{to, inputs, outputs} : PackedMatrix{to, outputs, inputs};
  }
  int64_t tasks() const { return ceil_div(matrix().depth, kDepth) * matrix().panels(); }

  void run(int64_t task) const {
    const PackedMatrix m = matrix();
    const int64_t k = task / m.panels() * kDepth, j = task % m.panels(), column = j * kPointwisePanel;
    const int64_t depth = min_of(kDepth, m.depth - k), columns = min_of(kPointwisePanel, m.columns - column);
    float* out = to + (m.panel(k, j) - m.data);
    for (int64_t v = 0; v < kPointwisePanel; v += kLanes, out += kLanes) {
      const int64_t count = max_of(0, min_of(kLanes, columns - v));
      if (transposed) {
        const float* from = weight + (column + v) * inputs + k;
        for (int64_t r = 0; r < depth; r += kLanes) {
          const int64_t rows = min_of(kLanes, depth - r);
          transpose_block(
              [&](int64_t i) __attribute__((always_inline)) { return Vec::load_first(from + i * inputs + r, rows); },
              count, [&](int64_t i, Vec x) __attribute__((always_inline)) { x.store(out + (r + i) * kPointwisePanel); },
              rows);
        }
        if (!scale) continue;
        const Vec factor = Vec::load_first(scale + column + v, count);
        for (int64_t r = 0; r < depth; ++r)
          (Vec::load(out + r * kPointwisePanel) * factor).store(out + r * kPointwisePanel);
      } else {
        for (int64_t r = 0; r < depth; ++r) {
          const Vec row = Vec::load_first(weight + (k + r) * inputs + column + v, count);
          (scale ? row * Vec::fill(scale[k + r]) : row).store(out + r * kPointwisePanel);
        }
      }
    }
  }
};

// Rows of pixels a task takes: as many as keep `floats` of them in half an L2, in strips of nearly equal size that
// occupy all threads alike. A row's result does not depend on it.
inline int64_t pixel_strips(int64_t pixels, int64_t floats, int threads) {
  constexpr int64_t kStripFloats = 128 * 1024;
  const int64_t rows = max_of(2 * kProductRows, min_of(8 * kProductRows, kStripFloats / floats));
  const int64_t strips = ceil_div(ceil_div(pixels, rows), threads) * threads;
  return max_of(1, min_of(strips, ceil_div(pixels, kProductRows)));
}

}  // namespace ffnet::FFNET_ISA
