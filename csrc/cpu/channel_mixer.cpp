// channel_mixer forward: residual + scale * (project * act(expand * DW(x) + b1) + b2), float32.
//
// A task takes a strip of rows of one image through the whole chain: depthwise convolution, transposed into panels of
// pixels; product with the expanding weight and activation; product with the projecting weight; scale and residual on
// the way out. The hidden map, several times as wide as x, exists for one strip at a time and stays in L2.
#include "activation.h"
#include "gemm.h"
#include "pack.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kHiddenFloats = 160 * 1024;  // of one strip: 640 KiB, most of an L2

struct Work {
  const ChannelMixer& op;
  Tiling tiling;
  ConvRow conv_row;
};

// Depthwise convolution of rows [first, last), channel vector by channel vector, into panels [channel][kPanel].
void mix_pixels(const Work& work, const float* image, int64_t first, int64_t last, float* panels, int64_t panel_floats,
                Arena arena) {
  const ChannelMixer& op = work.op;
  const int64_t kh = op.filter.kh, pixels = (last - first) * op.w;
  const int64_t in_first = max_of(0, first - op.pad_top), in_last = min_of(op.h, last - op.pad_top + kh - 1);
  const int64_t padded = ceil_div(pixels, kPanel) * kPanel;
  float* packed = arena.floats(packed_floats(op.filter));
  float* lines = arena.floats(padded * kLanes);
  float* gathered = arena.floats((in_last - in_first) * op.w * kLanes);
  const float** rows = arena.pointers(kh);
  for (int64_t i = pixels * kLanes; i < padded * kLanes; ++i) lines[i] = 0;
  for (int64_t c = 0; c < op.channels; c += kLanes) {
    const Lanes lanes{c, min_of(kLanes, op.channels - c), 1};
    const PackedFilter filter = pack_filter(op.filter, c, lanes.count, 1, op.pad_left, packed);
    const Rows input(image, op.x_stride, op.w, lanes, in_first, in_last, gathered);
    for (int64_t r = first; r < last; ++r) {
      for (int64_t ky = 0; ky < kh; ++ky) rows[ky] = input[r - op.pad_top + ky];
      prefetch_row(input[r + 1 - op.pad_top + kh - 1], input.pixel(), 0, op.w);
      work.conv_row({rows, input.pixel(), op.w}, filter, {lines + (r - first) * op.w * kLanes, kLanes, 0, op.w});
    }
    for (int64_t p = 0; p < padded; p += kLanes)
      transpose_block(lines + p * kLanes, kLanes, panels + p / kPanel * panel_floats + c * kPanel + p % kPanel, kPanel);
  }
}

// Where pixel p of a strip lies in a map.
struct Pixels {
  Strides stride;
  int64_t width, first_row;
  int64_t operator()(int64_t p) const { return (first_row + p / width) * stride.h + p % width * stride.w; }
};

// One panel, plus scale and residual, into the map; `first` is its first pixel in the strip, of which `count` exist.
void write_panel(const ChannelMixer& op, int64_t n, const float* panel, int64_t first, int64_t count,
                 const Pixels& out_at, const Pixels& residual_at) {
  float* out = op.out + n * op.out_stride.n;
  const float* residual = op.residual ? op.residual + n * op.residual_stride.n : nullptr;
  const bool vectors = op.out_stride.c == 1 && (!residual || op.residual_stride.c == 1);
  for (int64_t c = 0; vectors && c < op.outputs; c += kLanes) {
    const int64_t channels = min_of(kLanes, op.outputs - c);
    const Vec scale = op.scale ? Vec::load_first(op.scale + c, channels) : Vec::fill(1);
    for (int64_t p = 0; p < count; p += kLanes) {
      float block[kLanes * kLanes];
      transpose_block(panel + c * kPanel + p, kPanel, block, kLanes);
      for (int64_t i = 0; i < kLanes && p + i < count; ++i) {
        Vec base = Vec::fill(0);
        if (residual) base = Vec::load_first(residual + residual_at(first + p + i) + c, channels);
        fma(Vec::load(block + i * kLanes), scale, base).store_first(out + out_at(first + p + i) + c, channels);
      }
    }
  }
  for (int64_t c = 0; !vectors && c < op.outputs; ++c) {
    const float scale = op.scale ? op.scale[c] : 1;
    for (int64_t p = 0; p < count; ++p) {
      const float base = residual ? residual[residual_at(first + p) + c * op.residual_stride.c] : 0;
      out[out_at(first + p) + c * op.out_stride.c] = base + scale * panel[c * kPanel + p];
    }
  }
}

void run_task(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const ChannelMixer& op = work.op;
  const int64_t n = work.tiling.image(task), first = work.tiling.first_row(task), last = work.tiling.last_row(task);
  const int64_t pixels = (last - first) * op.w, panels = ceil_div(pixels, kPanel), kh = op.filter.kh;
  // One buffer holds the mixed map, then, when that has been used, the result.
  const int64_t map_panel = ceil_div(max_of(op.channels, op.outputs), kLanes) * kLanes * kPanel;
  const int64_t hidden_panel = op.hidden * kPanel;
  const int64_t depthwise = packed_floats(op.filter) + panels * kPanel * kLanes + (last - first + kh) * op.w * kLanes +
                            kh * Arena::kPointer;
  Arena arena(panels * (map_panel + hidden_panel) + depthwise);
  float* map = arena.floats(panels * map_panel);
  float* hidden = arena.floats(panels * hidden_panel);

  mix_pixels(work, op.x + n * op.x_stride.n, first, last, map, map_panel, arena);
  gemm({op.expand, op.expand_stride}, op.hidden, op.channels, op.expand_bias, map, map_panel, hidden, hidden_panel,
       panels, op.activation);
  gemm({op.project, op.project_stride}, op.outputs, op.hidden, op.project_bias, hidden, hidden_panel, map, map_panel,
       panels, Activation::none);
  const Pixels out_at{op.out_stride, op.w, first}, residual_at{op.residual_stride, op.w, first};
  for (int64_t p = 0; p < panels; ++p)
    write_panel(op, n, map + p * map_panel, p * kPanel, min_of(kPanel, pixels - p * kPanel), out_at, residual_at);
}

// Rows per strip: whole panels, a hidden map that fits L2, threads that end together. A strip streams all weights
// through L1, which costs about as much as `weights` more pixels.
Tiling tile_rows(const ChannelMixer& op, int threads) {
  constexpr int64_t weights = 16;
  Tiling best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= op.h; ++rows) {
    const int64_t pixels = ceil_div(rows * op.w, kPanel) * kPanel, strips = ceil_div(op.h, rows);
    if (rows > 1 && pixels * op.hidden > kHiddenFloats) break;
    const int64_t cost = ceil_div(op.n * strips, threads) * (pixels + weights);
    if (cost < best_cost) best_cost = cost, best = {1, 1, op.n, strips, rows, op.h};
  }
  return best;
}

}  // namespace

void channel_mixer(const ChannelMixer& op, const Executor& executor) {
  Work work{op, tile_rows(op, executor.threads), select_conv_row(op.filter, 1)};
  executor.run(work.tiling.tasks(), run_task, &work);
}

}  // namespace ffnet::FFNET_ISA
