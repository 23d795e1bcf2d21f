// Products of the pixels of dense channels-last maps, which are matrices [pixels][channels], for training: float32, the
// weight packed for each call.
#pragma once

#include "weight_rows.h"

namespace ffnet::FFNET_ISA {

// A block of a product, [rows][kPanel]: which rows and columns of it exist.
struct Block {
  int64_t first_row, rows, first_column, columns;
};

constexpr auto nothing_to_ask_for = [](const Block&) {};

// C = bias + A * B, handed block by block to finish(Block, floats), and announced to ask(Block). A's rows are `stride`
// floats apart; `bias` has a whole number of panels, or is null.
template <class Finish, class Ask = decltype(nothing_to_ask_for)>
FFNET_INLINE void multiply(const float* a, int64_t stride, int64_t rows, const PackedWeight& b, const float* bias,
                           const Finish& finish, const Ask& ask = nothing_to_ask_for) {
  for (int64_t j = 0; j < b.panels(); ++j) {
    each_block(rows, [&](int64_t first, int64_t count) {
      ask(Block{first, count, j * kPanel, b.columns(j)});
      alignas(64) float block[kProductRows * kPanel];
      start_with_row(bias ? bias + j * kPanel : nullptr, count, block);
      add_product<FloatTaps>(count, b.columns(j), {a + first * stride, stride, b.depth}, b.panel(j), block);
      finish(Block{first, count, j * kPanel, b.columns(j)}, block);
    });
  }
}

// The part of a block that exists, vector by vector: f(offset in C, place in the block, lanes). C's rows are `stride`
// floats apart.
template <class Float, class F>
FFNET_INLINE void each_vector(const Block& at, int64_t stride, Float* block, const F& f) {
  for (int64_t r = 0; r < at.rows; ++r)
    for (int64_t v = 0; v < at.columns; v += kLanes)
      f((at.first_row + r) * stride + at.first_column + v, block + r * kPanel + v, min_of(kLanes, at.columns - v));
}

// Prefetches a block of C, whose row pieces are too short for hardware prefetchers.
FFNET_INLINE void ask_for(const Block& at, int64_t stride, const float* c) {
  for (int64_t r = 0; r < at.rows; ++r)
    for (int64_t v = 0; v < at.columns; v += kLanes)
      __builtin_prefetch(c + (at.first_row + r) * stride + at.first_column + v);
}

FFNET_INLINE void store_block(const Block& at, int64_t stride, const float* block, float* c) {
  each_vector(at, stride, block,
              [&](int64_t i, const float* from, int64_t lanes) { store_lanes(Vec::load(from), c + i, lanes); });
}

// The weight [outputs][inputs] of a 1x1 convolution as right operand: of the convolution, or, where `backward`, of its
// input gradient. A scale of the outputs, where there is one, is multiplied in.
struct WeightPacking {
  const float* weight;
  int64_t outputs, inputs;
  const float* scale;
  bool backward;
  float* to;
  PackedWeight packed() const {
    return backward ? PackedWeight{to, outputs, inputs} : PackedWeight{to, inputs, outputs};
  }
  int64_t tasks() const { return packed().panels(); }

  void run(int64_t j) const {
    backward ? run_backward(j, to + j * outputs * kPanel) : run_forward(j, to + j * inputs * kPanel);
  }

  void run_forward(int64_t j, float* panel) const {
    pack_panel<float, FloatTaps>({weight, outputs, inputs, 1, true, inputs}, j, panel);
    for (int64_t v = 0; scale && v < packed().columns(j); v += kLanes) {
      const Vec factor = Vec::load_first(scale + j * kPanel + v, min_of(kLanes, packed().columns(j) - v));
      for (float* at = panel + v; at < panel + inputs * kPanel; at += kPanel) (Vec::load(at) * factor).store(at);
    }
  }
  void run_backward(int64_t j, float* panel) const {
    constexpr int64_t kAhead = 16;  // rows, too far apart for hardware prefetchers
    for (int64_t o = 0; o < outputs; ++o, panel += kPanel) {
      const Vec factor = Vec::fill(scale ? scale[o] : 1);
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        const int64_t lanes = max_of(0, min_of(kLanes, packed().columns(j) - v));
        __builtin_prefetch(weight + (o + kAhead) * inputs + j * kPanel + v);
        (Vec::load_first(weight + o * inputs + j * kPanel + v, lanes) * factor).store(panel + v);
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
