// conv2d of 1x1 filters with the weight on the left (gemm.h): residual + scale * act(weight * x + bias).
//
// A task computes a strip of rows: its pixels are converted to panels for the product, and the result's panels to
// pixels.
#include "conv2d.h"
#include "panel_output.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kStripFloats = 192 * 1024;  // what a task keeps in L2

// Pixels [first, first + count) of a strip as a panel, missing ones zero.
template <class T, class Taps>
void read_panel(const Conv2d& op, const Pixels& at, int64_t first, int64_t count, float* panel) {
  const T* x = static_cast<const T*>(op.x);
  const int64_t stride_c = op.x_stride.c, depth = ceil_div(op.channels, Taps::rows);
  for (int64_t p = 0; p < kPanel; p += kLanes) {
    const int64_t pixels = max_of(0, min_of(kLanes, count - p));
    int64_t from[kLanes];
    for (int64_t i = 0; i < pixels; ++i) from[i] = at(first + p + i);
    float* to = panel + p;
    if (stride_c == 1 && Taps::rows == 1) {
      for (int64_t c = 0; c < depth; c += kLanes) {
        const int64_t channels = min_of(kLanes, depth - c);
        transpose_block(
            [&](int64_t i) __attribute__((always_inline)) { return load_first(x + from[i] + c, channels); }, pixels,
            [&](int64_t l, Vec v) __attribute__((always_inline)) { v.store(to + (c + l) * kPanel); }, channels);
      }
      continue;
    }
    const bool adjacent = pixels == kLanes && is_run(from, kLanes);
    const auto row_of = [&](int64_t c) __attribute__((always_inline)) {
      if (c >= op.channels) return Vec::fill(0);
      if (adjacent) return load(x + from[0] + c * stride_c);
      float values[kLanes] = {};
      for (int64_t i = 0; i < pixels; ++i) values[i] = to_float(x[from[i] + c * stride_c]);
      return Vec::load(values);
    };
    for (int64_t k = 0; k < depth; ++k, to += kPanel) {
      if constexpr (Taps::rows == 1) {
        row_of(k).store(to);
      } else {
#if defined(__AVX512BF16__)
        interleave(row_of(2 * k), row_of(2 * k + 1)).store(to);
#endif
      }
    }
  }
}

// A channels-last map of bfloat16 is one of half as many channels, two adjacent ones in each float, where nothing is
// odd.
bool is_paired(const Strides& s, int64_t channels, const void* map) {
  return s.c == 1 && channels % 2 == 0 && s.n % 2 == 0 && s.h % 2 == 0 && s.w % 2 == 0 &&
         reinterpret_cast<uintptr_t>(map) % sizeof(float) == 0;
}
Strides halved(const Strides& s) { return {s.n / 2, 1, s.h / 2, s.w / 2}; }

template <class T, class Taps>
struct PointwiseTask {
  const Conv2d& op;
  const Tiling& tiling;
  int64_t task;
  bool run(int64_t);
};

template <class T, class Taps>
bool PointwiseTask<T, Taps>::run(int64_t) {
  const int64_t first_row = tiling.first_row(task), pixels = (tiling.last_row(task) - first_row) * op.w;
  const bool pairs_in = Taps::rows == 2 && is_paired(op.x_stride, op.channels, op.x),
             pairs_out = Taps::rows == 2 && !op.scale && !op.residual && is_paired(op.out_stride, op.outputs, op.out);
  Conv2d map = op, result = op;
  if (pairs_in) map.channels /= 2, map.x_stride = halved(op.x_stride);
  if (pairs_out) result.outputs /= 2, result.out_stride = halved(op.out_stride);
  const Weight weight{op.weight, op.outputs, op.channels, 1, true, op.weight_stride};
  const int64_t panels = ceil_div(pixels, kPanel), weight_floats = WeightRows<T, Taps>::scratch_floats(weight);
  const int64_t in_panel = ceil_div(op.channels, Taps::rows) * kPanel, out_panel = op.outputs * kPanel;
  Arena arena(panels * (in_panel + out_panel) + weight_floats);
  float *in = arena.floats(panels * in_panel), *out = arena.floats(panels * out_panel);

  const Pixels at{map.x_stride, op.w, op.h, first_row};
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t count = min_of(kPanel, pixels - p * kPanel);
    if (pairs_in)
      read_panel<float, FloatTaps>(map, at, p * kPanel, count, in + p * in_panel);
    else
      read_panel<T, Taps>(map, at, p * kPanel, count, in + p * in_panel);
  }
  gemm<Taps>(
      weight, WeightRows<T, Taps>(weight, arena.floats(weight_floats)), in, in_panel, panels,
      [&](int64_t, int64_t row, int64_t rows, float* block) {
        start_with_column(op.bias ? op.bias + row : nullptr, rows, block);
      },
      [&](int64_t p, int64_t row, int64_t rows, float* block) {
        activate_row(block, Vec::lanes, 2 * rows, op.activation);
        if (pairs_out)
          store_panel<Taps>(block, row, rows, out + p * out_panel);
        else
          store_panel<FloatTaps>(block, row, rows, out + p * out_panel);
      });
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t count = min_of(kPanel, pixels - p * kPanel);
    NanSensor unused;  // no tap outside the map is read
    if (pairs_out)
      PanelOutput<float>(result, first_row).write(out + p * out_panel, p * kPanel, count, unused);
    else
      PanelOutput<T>(result, first_row, {op.scale, op.residual, op.residual_stride})
          .write(out + p * out_panel, p * kPanel, count, unused);
  }
  return false;
}

// Rows that are adjacent in memory are split differently, into whole panels.
Conv2d flattened(const Conv2d& op) {
  int64_t pixels = op.h * op.w, images = op.n;
  if (!rows_follow(op) || pixels % kLanes != 0) return op;
  if (images_follow(op, pixels)) pixels *= images, images = 1;
  const int64_t width = pixels % kPanel == 0 ? kPanel : kLanes;
  return with_rows(op, images, pixels / width, width);
}

// Rows per strip: what fits L2, whole panels, threads that end together; a strip streams all weights through L1.
Tiling tile_rows(const Conv2d& op, int threads) {
  constexpr int64_t weights = 16;
  const int64_t height = op.n * op.h;
  Tiling best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= height; ++rows) {
    const int64_t pixels = ceil_div(rows * op.w, kPanel) * kPanel, strips = ceil_div(height, rows);
    if (rows > 1 && pixels * (op.channels + op.outputs) > kStripFloats) break;
    const int64_t cost = ceil_div(strips, threads) * (pixels + weights);
    if (cost < best_cost) best_cost = cost, best = strips_of_batch(strips, rows, height);
  }
  return best;
}

}  // namespace

void pointwise_conv2d(const Conv2d& given, const Executor& executor) {
  const Conv2d op = flattened(given);
  run_storage<PointwiseTask>(op, tile_rows(op, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
