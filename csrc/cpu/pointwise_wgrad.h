// Weight and bias gradients of a 1x1 convolution of channels-last maps:
//   weight_grad[o][i] = sum over pixels p of grad[p][o] * x[p][i],  bias_grad[o] = sum of grad[p][o]
//
// A task takes some outputs and a chunk of pixels. Chunks are cut by the shape alone and added in order: the result does
// not depend on the number of threads.
#pragma once

#include "buffer.h"
#include "pointwise.h"

namespace ffnet::FFNET_ISA {

struct PointwiseWgradWork {
  int64_t pixels, inputs, outputs;
  const float *grad, *x;
  float *weight_grad, *bias_grad;  // contiguous; the latter may be null
  int64_t tiles, chunks;
  float* partial;  // [chunks][outputs][inputs + 1] where there are several chunks
  int64_t part_floats() const { return outputs * (inputs + 1); }
};

inline void run_wgrad_task(void* context, int64_t task) {
  const auto& work = *static_cast<const PointwiseWgradWork*>(context);
  const int64_t tile = task % work.tiles, chunk = task / work.tiles;
  const int64_t first = tile * work.outputs / work.tiles, count = (tile + 1) * work.outputs / work.tiles - first;
  const int64_t begin = chunk * work.pixels / work.chunks, end = (chunk + 1) * work.pixels / work.chunks;
  float* weights = work.weight_grad;
  float* biases = work.bias_grad;
  if (work.chunks > 1) {
    weights = work.partial + chunk * work.part_floats();
    biases = biases ? weights + work.outputs * work.inputs : nullptr;
  }
  Arena arena(kDepth * kPanel + kPanel);
  float* panel = arena.floats(kDepth * kPanel);
  float* zeros = arena.floats(kPanel);
  for (int64_t v = 0; v < kPanel; v += kLanes) Vec::fill(0).store(zeros + v);
  for (int64_t p = begin; p < end; p += kDepth) {
    const int64_t depth = min_of(kDepth, end - p);
    const float* grad = work.grad + p * work.outputs + first;
    for (int64_t i = 0; i < work.inputs; i += kPanel) {
      const int64_t columns = min_of(kPanel, work.inputs - i);
      for (int64_t v = 0; v < columns; v += kLanes) {
        const float* from = work.x + p * work.inputs + i + v;
        const int64_t lanes = min_of(kLanes, columns - v);
        for (int64_t r = 0; r < depth; ++r)
          (lanes == kLanes ? Vec::load(from + r * work.inputs) : Vec::load_first(from + r * work.inputs, lanes))
              .store(panel + r * kPanel + v);
      }
      multiply_panel<true>({grad, work.outputs}, count, depth, panel,
                           {weights + first * work.inputs + i, work.inputs, columns, p == begin ? zeros : nullptr});
    }
    for (int64_t o = 0; biases && o < count; o += kLanes) {
      const int64_t lanes = min_of(kLanes, count - o);
      Vec sum = Vec::fill(0);
      for (int64_t r = 0; r < depth; ++r) sum = sum + Vec::load_first(grad + r * work.outputs + o, lanes);
      if (p > begin) sum = sum + Vec::load_first(biases + first + o, lanes);
      sum.store_first(biases + first + o, lanes);
    }
  }
}

// Adds the chunks of one output.
inline void finish_wgrad_task(void* context, int64_t o) {
  const auto& work = *static_cast<const PointwiseWgradWork*>(context);
  for (int64_t i = 0; i < work.inputs; i += kLanes) {
    const int64_t lanes = min_of(kLanes, work.inputs - i);
    const float* from = work.partial + o * work.inputs + i;
    Vec sum = Vec::load_first(from, lanes);
    for (int64_t chunk = 1; chunk < work.chunks; ++chunk)
      sum = sum + Vec::load_first(from + chunk * work.part_floats(), lanes);
    sum.store_first(work.weight_grad + o * work.inputs + i, lanes);
  }
  if (!work.bias_grad) return;
  const float* from = work.partial + work.outputs * work.inputs + o;
  float sum = from[0];
  for (int64_t chunk = 1; chunk < work.chunks; ++chunk) sum += from[chunk * work.part_floats()];
  work.bias_grad[o] = sum;
}

inline void pointwise_wgrad(int64_t pixels, int64_t inputs, int64_t outputs, const float* grad, const float* x,
                            float* weight_grad, float* bias_grad, const Executor& executor) {
  constexpr int64_t kTileOutputs = 8 * kProductRows;  // a tile's sums over one panel of x stay near; x is packed once each
  constexpr int64_t kTasks = 16, kChunkPixels = 2 * kDepth;
  const int64_t tiles = ceil_div(outputs, kTileOutputs);
  const int64_t chunks = max_of(1, min_of(ceil_div(kTasks, tiles), pixels / kChunkPixels));
  PointwiseWgradWork work{pixels, inputs, outputs, grad, x, weight_grad, bias_grad, tiles, chunks, nullptr};
  const Buffer partial(chunks > 1 ? chunks * work.part_floats() : 1);
  work.partial = partial.data;
  executor.run(tiles * chunks, run_wgrad_task, &work);
  if (chunks > 1) executor.run(outputs, finish_wgrad_task, &work);
}

}  // namespace ffnet::FFNET_ISA
