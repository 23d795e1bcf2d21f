// Weight and bias gradients of a 1x1 convolution of channels-last maps:
//   weight_grad[o][i] = sum over pixels p of grad[p][o] * x[p][i],  bias_grad[o] = sum of grad[p][o]
//
// A task takes a tile of the weight and a part of the pixels. Parts depend on the shape only and are added in order, so
// results do not depend on the number of threads.
#pragma once

#include "buffer.h"
#include "pointwise.h"

namespace ffnet::FFNET_ISA {

class PointwiseWgradSum {
 public:
  // Contiguous results; the bias' may be null. `pixels` is what one call of `add` brings at most.
  PointwiseWgradSum(int64_t pixels, int64_t inputs, int64_t outputs, float* weight_grad, float* bias_grad)
      : inputs_(inputs),
        outputs_(outputs),
        input_tiles_(ceil_div(inputs, kTileInputs)),
        parts_(parts_of(ceil_div(outputs, kTileOutputs) * input_tiles_, pixels)),
        weight_grad_(weight_grad),
        bias_grad_(bias_grad),
        partial_(parts_ > 1 ? parts_ * part_floats() : 1) {}

  // Adds rows of pixels of both maps, the first time as a start.
  void add(const float* grad, const float* x, int64_t pixels, const Executor& executor) {
    grad_ = grad, x_ = x, pixels_ = pixels, output_tiles_ = even_tiles(executor.threads);
    executor.run(
        output_tiles_ * input_tiles_ * parts_,
        [](void* self, int64_t task) { static_cast<Self*>(self)->add_part(task); }, this);
    started_ = true;
  }

  // Completes the results.
  void finish(const Executor& executor) {
    if (parts_ > 1)
      executor.run(outputs_, [](void* self, int64_t o) { static_cast<Self*>(self)->join_parts(o); }, this);
  }

 private:
  using Self = PointwiseWgradSum;
  // The sums of a tile stay in L2 while pixels stream by.
  static constexpr int64_t kTileOutputs = 8 * kProductRows, kTileInputs = 10 * kPanel;
  static constexpr int64_t kDepth = 256;  // of the pixels at hand: a panel of them is in L1 for the most part
  static constexpr int64_t kTasks = 8, kPartPixels = 128;

  // A power of two, as numbers of threads are.
  static int64_t parts_of(int64_t tiles, int64_t pixels) {
    int64_t parts = 1;
    while (2 * parts * tiles <= kTasks && 2 * parts * kPartPixels <= pixels) parts *= 2;
    return parts;
  }
  // Tiles of the outputs that occupy all threads alike; no sum depends on them.
  int64_t even_tiles(int64_t threads) const {
    const int64_t least = ceil_div(outputs_, kTileOutputs), each = input_tiles_ * parts_;
    const auto rounds = [&](int64_t tiles) { return ceil_div(tiles * each, threads); };
    int64_t best = least;
    for (int64_t tiles = least; tiles < 2 * least && tiles * kProductRows <= outputs_; ++tiles)
      if (rounds(tiles) * best < rounds(best) * tiles) best = tiles;
    return best;
  }

  int64_t part_floats() const { return outputs_ * (inputs_ + 1); }

  void add_part(int64_t task) const {
    const int64_t input_tile = task % input_tiles_, output_tile = task / input_tiles_ % output_tiles_,
                  part = task / (input_tiles_ * output_tiles_);
    const int64_t first = output_tile * outputs_ / output_tiles_,
                  count = (output_tile + 1) * outputs_ / output_tiles_ - first;
    const int64_t input_end = min_of(inputs_, (input_tile + 1) * kTileInputs);
    const int64_t begin = part * pixels_ / parts_, end = (part + 1) * pixels_ / parts_;
    float* weights = parts_ > 1 ? partial_.data + part * part_floats() : weight_grad_;
    float* biases = parts_ > 1 ? weights + outputs_ * inputs_ : bias_grad_;
    float* panel = Arena(kDepth * kPanel).at;
    for (int64_t p = begin; p < end; p += kDepth) {
      const int64_t depth = min_of(kDepth, end - p);
      const bool start = !started_ && p == begin;
      const float* grad = grad_ + p * outputs_ + first;
      for (int64_t i = input_tile * kTileInputs; i < input_end; i += kPanel) {
        const int64_t columns = min_of(kPanel, input_end - i);
        const float* from = x_ + p * inputs_ + i;
        for (int64_t v = 0; v < columns; v += kLanes)
          for (int64_t r = 0; r < depth; ++r)
            load_lanes(from + r * inputs_ + v, min_of(kLanes, columns - v)).store(panel + r * kPanel + v);
        each_block(count, [&](int64_t o, int64_t rows) {
          alignas(64) float block[kProductRows * kPanel];
          float* to = weights + (first + o) * inputs_ + i;
          if (!start) ask_for(Block{0, rows, 0, columns}, inputs_, to);
          start_with_row(nullptr, rows, block);
          add_product<FloatTaps, Order::by_columns>(rows, columns, {grad + o, outputs_, depth}, panel, block);
          each_vector(Block{0, rows, 0, columns}, inputs_, block, [&](int64_t at, const float* sum, int64_t lanes) {
            const Vec x = Vec::load(sum);
            store_lanes(start ? x : load_lanes(to + at, lanes) + x, to + at, lanes);
          });
        });
      }
      for (int64_t o = 0; bias_grad_ && input_tile == 0 && o < count; o += kLanes) {
        const int64_t lanes = min_of(kLanes, count - o);
        Vec sum = Vec::fill(0);
        for (int64_t r = 0; r < depth; ++r) sum = sum + load_lanes(grad + r * outputs_ + o, lanes);
        float* to = biases + first + o;
        store_lanes(start ? sum : sum + load_lanes(to, lanes), to, lanes);
      }
    }
  }

  // Adds the parts of one output.
  void join_parts(int64_t o) const {
    for (int64_t i = 0; i < inputs_; i += kLanes) {
      const int64_t lanes = min_of(kLanes, inputs_ - i);
      const float* from = partial_.data + o * inputs_ + i;
      Vec sum = Vec::load_first(from, lanes);
      for (int64_t part = 1; part < parts_; ++part) sum = sum + Vec::load_first(from + part * part_floats(), lanes);
      sum.store_first(weight_grad_ + o * inputs_ + i, lanes);
    }
    if (!bias_grad_) return;
    const float* from = partial_.data + outputs_ * inputs_ + o;
    float sum = from[0];
    for (int64_t part = 1; part < parts_; ++part) sum += from[part * part_floats()];
    bias_grad_[o] = sum;
  }

  int64_t inputs_, outputs_, input_tiles_, parts_, output_tiles_ = 1;
  float *weight_grad_, *bias_grad_;
  Buffer partial_;  // [parts][outputs][inputs], then the biases' sums, where there are several parts
  const float *grad_ = nullptr, *x_ = nullptr;
  int64_t pixels_ = 0;
  bool started_ = false;
};

}  // namespace ffnet::FFNET_ISA
