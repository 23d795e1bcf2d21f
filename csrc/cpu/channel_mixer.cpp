// channel_mixer forward: residual + scale * (project * act(expand * DW(x) + b1) + b2); norm_mixer has a LayerNorm
// around DW(x).
//
// A task takes a strip of rows of one image through the whole chain: depthwise convolution, transposed into panels of
// pixels; product with the expanding weight and activation; product with the projecting weight; scale and residual on
// the way out. The hidden map, several times as wide as x, exists for one strip at a time and stays in L2.
#include "layer_norm.h"
#include "panel_output.h"
#include "retry.h"

namespace ffnet::FFNET_ISA {
namespace {

// Kept in L2 by a task: the mixed map, the result and, a chunk at a time, the hidden map of its pixels.
constexpr int64_t kStripFloats = 224 * 1024;
constexpr int64_t kChunk = 512;  // hidden channels

template <class T, class Taps>
struct MixerTask {
  const ChannelMixer& op;
  const Tiling& tiling;
  int64_t task;
  bool run(int64_t);
};

// [16 pixels][lanes] -> channels (or pairs of them) of a panel.
template <class Stored>
void store_mixed(const float* pixels, float* panel) {
  const auto read = [&](int64_t i) __attribute__((always_inline)) { return Vec::load(pixels + i * kLanes); };
  Vec even = Vec::fill(0);
  const auto write = [&](int64_t c, Vec x) __attribute__((always_inline)) {
    if constexpr (Stored::rows == 1) {
      x.store(panel + c * kPanel);
    } else {
#if defined(__AVX512BF16__)
      if (c % 2 == 0)
        even = x;
      else
        interleave(even, x).store(panel + c / 2 * kPanel);
#endif
    }
  };
  transpose_block(read, kLanes, write, kLanes);
  (void)even;
}

// A strip: rows [first, last) of the batch, with the rows of all images numbered consecutively.
struct Strip {
  int64_t first, last;
  int64_t pixels(const ChannelMixer& op) const { return (last - first) * op.w; }
};

// Depthwise convolution of a strip, channel vector by channel vector, into panels of Stored taps.
template <class T, class Taps, class Stored>
void mix_pixels(const ChannelMixer& op, const Strip& strip, float* panels, int64_t panel_floats, Arena arena) {
  const int64_t kh = op.filter.kh, pixels = strip.pixels(op), padded = ceil_div(pixels, kPanel) * kPanel;
  const ConvRow conv_row = select_conv_row<Taps>(op.filter, 1);
  float* packed = arena.floats(packed_floats<Taps>(op.filter));
  float* lines = arena.floats(padded * kLanes);
  const float** rows = arena.pointers(row_groups<Taps>(kh));
  float* gathered = arena.floats(0);
  for (int64_t i = pixels * kLanes; i < padded * kLanes; ++i) lines[i] = 0;
  for (int64_t c = 0; c < op.channels; c += kLanes) {
    const Lanes lanes{c, min_of(kLanes, op.channels - c), 1};
    const PackedFilter filter = pack_filter<T, Taps>(op.filter, c, lanes.count, 1, op.pad_left, packed);
    const bool used_in_place = stays_in_place<T>(lanes, op.x_stride, op.w);
    float* line = lines;
    for (int64_t row = strip.first; row < strip.last;) {
      const int64_t n = row / op.h, first = row % op.h, last = min_of(op.h, first + strip.last - row);
      const int64_t in_first = max_of(0, first - op.pad_top), in_last = min_of(op.h, last - op.pad_top + kh - 1);
      const T* image = static_cast<const T*>(op.x) + n * op.x_stride.n;
      Rows<T, Taps> input(image, op.x_stride, op.h, op.w, lanes, in_first, in_last, kh, gathered);
      for (int64_t r = first; r < last; ++r, line += op.w * kLanes) {
        const PackedFilter placed = input.window(r - op.pad_top, filter, rows);
        if (used_in_place) prefetch_row(input[r + 1 - op.pad_top + kh - 1], input.pixel(), 0, op.w);
        conv_row({rows, input.pixel(), op.w}, placed, {line, kLanes, 0, op.w});
      }
      row += last - first;
    }
    for (int64_t p = 0; p < padded; p += kLanes)
      store_mixed<Stored>(lines + p * kLanes,
                          panels + p / kPanel * panel_floats + c / Stored::rows * kPanel + p % kPanel);
  }
}

int64_t hidden_chunk(const ChannelMixer& op) {
  return ceil_div(ceil_div(op.hidden, ceil_div(op.hidden, kChunk)), 2) * 2;
}

template <class T, class Taps>
bool MixerTask<T, Taps>::run(int64_t) {
  const Strip strip{tiling.first_row(task), tiling.last_row(task)};
  const int64_t pixels = strip.pixels(op), panels = ceil_div(pixels, kPanel), kh = op.filter.kh;
  const int64_t raw_panel = whole_vectors(op.channels) * kPanel, mixed_panel = raw_panel / Taps::rows,
                out_panel = op.outputs * kPanel;
  const int64_t chunk = hidden_chunk(op), hidden_panel = chunk / Taps::rows * kPanel;
  const int64_t mixing = packed_floats<Taps>(op.filter) + panels * kPanel * kLanes +
                         (min_of(op.h, strip.last - strip.first + kh) + 1) * op.w * kLanes +
                         row_groups<Taps>(kh) * Arena::kPointer;
  const int64_t multiplying = WeightRows<T, Taps>::scratch_floats({nullptr, 0, max_of(op.channels, chunk), 1, true, 0});
  const int64_t out_floats = panels * (op.norm ? max_of(out_panel, raw_panel) : out_panel);
  Arena arena(panels * (mixed_panel + hidden_panel) + out_floats + max_of(mixing, multiplying));
  float* mixed = arena.floats(panels * mixed_panel);
  float* hidden = arena.floats(panels * hidden_panel);
  float* out = arena.floats(out_floats);
  float* scratch = arena.at;

  if (op.norm) {
    float* raw = Taps::rows == 1 ? mixed : out;  // written once the mixed map is complete
    ChannelMixer unbiased = op;  // the bias is added last: sums that start with a large one would lose digits
    unbiased.filter.bias = nullptr;
    mix_pixels<T, Taps, FloatTaps>(unbiased, strip, raw, raw_panel, arena);
    for (int64_t p = 0; p < panels; ++p)
      normalize_panel<Taps>(*op.norm, op.filter.bias, op.channels, raw + p * raw_panel, mixed + p * mixed_panel);
  } else {
    mix_pixels<T, Taps, Taps>(op, strip, mixed, mixed_panel, arena);
  }
  for (int64_t h = 0; h < op.hidden; h += chunk) {
    const int64_t count = min_of(chunk, op.hidden - h);
    const Weight expand{
        static_cast<const T*>(op.expand) + h * op.expand_stride, count, op.channels, 1, true, op.expand_stride};
    const Weight project{static_cast<const T*>(op.project) + h, op.outputs, count, 1, true, op.project_stride};
    gemm(
        expand, WeightRows<T, Taps>(expand, scratch), mixed, mixed_panel, panels,
        [&](int64_t, int64_t row, int64_t rows, float* block) {
          start_with_column(op.expand_bias ? op.expand_bias + h + row : nullptr, rows, block);
        },
        [&](int64_t p, int64_t row, int64_t rows, float* block) {
          activate_row(block, Vec::lanes, 2 * rows, op.activation);
          store_panel<Taps>(block, row, rows, hidden + p * hidden_panel);
        });
    gemm(
        project, WeightRows<T, Taps>(project, scratch), hidden, hidden_panel, panels,
        [&](int64_t p, int64_t row, int64_t rows, float* block) {
          if (h == 0)
            start_with_column(op.project_bias ? op.project_bias + row : nullptr, rows, block);
          else
            copy_block(out + p * out_panel + row * kPanel, rows, block);
        },
        [&](int64_t p, int64_t row, int64_t rows, const float* block) {
          copy_block(block, rows, out + p * out_panel + row * kPanel);
        });
  }
  NanSensor sensor;
  const PanelOutput<T> to(op, strip.first, {op.scale, op.residual, op.residual_stride});
  for (int64_t p = 0; p < panels; ++p)
    to.write(out + p * out_panel, p * kPanel, min_of(kPanel, pixels - p * kPanel), sensor);
  return Taps::rows > 1 && sensor.alarmed();
}

// Rows per strip: whole panels, maps that fit L2, threads that end together. A strip streams all weights through L1,
// which costs about as much as `weights` more pixels. The batch is one plane, so an alarm repeats all of it.
Tiling tile_rows(const ChannelMixer& op, int threads) {
  constexpr int64_t weights = 16;
  const int64_t taps = op.storage == Storage::bfloat16 && kPairs ? 2 : 1, height = op.n * op.h;
  const int64_t pixel = whole_vectors(op.channels) / taps + hidden_chunk(op) / taps + whole_vectors(op.outputs);
  Tiling best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= height; ++rows) {
    const int64_t pixels = ceil_div(rows * op.w, kPanel) * kPanel, strips = ceil_div(height, rows);
    if (rows > 1 && pixels * pixel > kStripFloats) break;
    const int64_t cost = ceil_div(strips, threads) * (pixels + weights);
    if (cost < best_cost) best_cost = cost, best = strips_of_batch(strips, rows, height);
  }
  return best;
}

}  // namespace

void channel_mixer(const ChannelMixer& op, const Executor& executor) {
  run_storage<MixerTask>(op, tile_rows(op, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
