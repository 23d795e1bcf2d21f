// conv2d forward, one group: act(conv(x; weight) + bias). What a depthwise model has around its mixers: 1x1 projections
// and the strided convolutions of its stem.
//
// A task makes a strip of output rows. The input rows it needs become planes of float32 with the padding around them,
// off which the panels of the product are read: one row of kPanel output pixels for each tap and channel.
#include "panel_output.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kStripFloats = 192 * 1024;  // what a task keeps in L2

struct Run {
  template <class T, class Taps>
  static bool task(const Conv2d& op, const Tiling& tiling, int64_t task);
};

// Input rows as [slot][channel][plane]: rows that neighbouring output rows share are there once.
struct PlaneShape {
  int64_t plane, slot_floats;
  int64_t margin;  // floats before a row, whole vectors: rows are stored aligned
  explicit PlaneShape(const Conv2d& op) {
    margin = whole_vectors(op.pad_left);
    // Output pixels are read kLanes at a time, whether they exist or not.
    const int64_t reach = margin - op.pad_left + (op.out_w + kLanes) * op.stride_w + op.kw;
    plane = whole_vectors(max_of(margin + op.w, reach));
    if (is_panel(op)) plane = kPanel;
    slot_floats = op.channels * plane;
  }
  // Whether a row of the map is a panel of the product as it is.
  static bool is_panel(const Conv2d& op) {
    return op.kh * op.kw == 1 && op.stride_h == 1 && op.stride_w == 1 && op.out_w == kPanel && op.w == kPanel &&
           op.out_h == op.h;
  }
  // Slot of the first input row of output row `row`, rows of all images counted through from `first`.
  static int64_t slot(const Conv2d& op, int64_t first, int64_t row) {
    const int64_t images = row / op.out_h - first / op.out_h;
    return (row - first) * op.stride_h + images * max_of(0, op.kh - op.stride_h);
  }
  int64_t floats(const Conv2d& op, int64_t first, int64_t last) const {
    return (slot(op, first, last - 1) + op.kh) * slot_floats;
  }
};

template <class T>
void fill_slot(const Conv2d& op, const PlaneShape& shape, const T* from, float* out) {
  for (int64_t c = 0; c < op.channels; ++c) {
    float* plane = out + c * shape.plane;
    for (int64_t i = from ? shape.margin - op.pad_left : 0; i < (from ? shape.margin : shape.plane); ++i) plane[i] = 0;
    for (int64_t i = shape.margin + op.w; from && i < shape.plane; ++i) plane[i] = 0;
  }
  if (!from) return;
  out += shape.margin;
  if (op.x_stride.c == 1) {
    for (int64_t i = 0; i < op.w; i += kLanes) {
      const int64_t pixels = min_of(kLanes, op.w - i);
      for (int64_t c = 0; c < op.channels; c += kLanes) {
        const int64_t channels = min_of(kLanes, op.channels - c);
        const T* pixel = from + i * op.x_stride.w + c;
        float* plane = out + c * shape.plane + i;
        if (channels == kLanes && pixels == kLanes) {
          transpose_block(
              [&](int64_t p) __attribute__((always_inline)) { return load(pixel + p * op.x_stride.w); }, kLanes,
              [&](int64_t l, Vec x) __attribute__((always_inline)) { x.store(plane + l * shape.plane); }, kLanes);
        } else {
          transpose_block(
              [&](int64_t p) __attribute__((always_inline)) { return load_first(pixel + p * op.x_stride.w, channels); },
              pixels,
              [&](int64_t l, Vec x) __attribute__((always_inline)) { x.store_first(plane + l * shape.plane, pixels); },
              channels);
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < op.channels; ++c, out += shape.plane, from += op.x_stride.c) {
    int64_t i = 0;
    for (; op.x_stride.w == 1 && i + kLanes <= op.w; i += kLanes) load(from + i).store(out + i);
    for (; i < op.w; ++i) out[i] = to_float(from[i * op.x_stride.w]);
  }
}

template <class T>
void fill_planes(const Conv2d& op, const PlaneShape& shape, int64_t first, int64_t last, float* planes) {
  int64_t filled = 0;
  for (int64_t row = first; row < last; ++row) {
    const int64_t slot = PlaneShape::slot(op, first, row), top = row % op.out_h * op.stride_h - op.pad_top;
    const T* image = static_cast<const T*>(op.x) + row / op.out_h * op.x_stride.n;
    for (filled = max_of(filled, slot); filled < slot + op.kh; ++filled) {
      const int64_t y = top + filled - slot;
      fill_slot(op, shape, y >= 0 && y < op.h ? image + y * op.x_stride.h : nullptr,
                planes + filled * shape.slot_floats);
    }
  }
}

// A channels-last map of bfloat16 is one of half as many channels, two adjacent ones in each float, where nothing is
// odd. Its channels are then the taps of the product, if the weight's neighbours are neighbours in the map.
bool has_paired_channels(const Conv2d& op) {
  const Strides& s = op.x_stride;
  return s.c == 1 && op.channels % 2 == 0 && s.n % 2 == 0 && s.h % 2 == 0 && s.w % 2 == 0 &&
         reinterpret_cast<uintptr_t>(op.x) % sizeof(float) == 0 && (op.channels_inside || op.kh * op.kw == 1);
}
bool has_paired_outputs(const Conv2d& op) {
  return op.out_stride.c == 1 && op.outputs % 2 == 0;  // the result is ours: nothing else is odd
}
Strides halved(const Strides& s) { return {s.n / 2, 1, s.h / 2, s.w / 2}; }

// Lanes 0 2 4 ... of two vectors that follow each other.
template <size_t... L>
FFNET_INLINE Vec even_lanes(Vec a, Vec b, std::index_sequence<L...>) {
  return {__builtin_shufflevector(a.v, b.v, (2 * L)...)};
}

// kLanes output pixels: where their windows begin among the planes.
class Windows {
 public:
  Windows(const Conv2d& op, const PlaneShape& shape, const float* planes, int64_t first_row, int64_t last_row)
      : op_(op), shape_(shape), planes_(planes), first_row_(first_row), pixels_((last_row - first_row) * op.out_w) {}

  // Those past the last pixel repeat it.
  void place(int64_t first) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t pixel = min_of(first + l, pixels_ - 1), row = first_row_ + pixel / op_.out_w;
      at_[l] = planes_ + PlaneShape::slot(op_, first_row_, row) * shape_.slot_floats + shape_.margin - op_.pad_left +
               pixel % op_.out_w * op_.stride_w;
    }
    adjacent_ = at_[kLanes - 1] - at_[0] == (kLanes - 1) * op_.stride_w;
  }
  // The input that each window has at an offset.
  FFNET_INLINE Vec read(int64_t offset) const {
    if (adjacent_ && op_.stride_w == 1) return Vec::load(at_[0] + offset);
    if (adjacent_)
      return even_lanes(Vec::load(at_[0] + offset), Vec::load(at_[0] + offset + kLanes),
                        std::make_index_sequence<Vec::lanes>());
    float values[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) values[l] = at_[l][offset];
    return Vec::load(values);
  }

 private:
  const Conv2d& op_;
  const PlaneShape& shape_;
  const float* planes_;
  int64_t first_row_, pixels_;
  const float* at_[kLanes];
  bool adjacent_ = false;
};

// From the start of a window to each of its inputs, in the order of the weight.
void window_offsets(const Conv2d& op, const PlaneShape& shape, int64_t* offsets) {
  const int64_t step_c = op.channels_inside ? 1 : op.kh * op.kw, step_tap = op.channels_inside ? op.channels : 1;
  for (int64_t ky = 0; ky < op.kh; ++ky)
    for (int64_t kx = 0; kx < op.kw; ++kx)
      for (int64_t c = 0; c < op.channels; ++c)
        offsets[c * step_c + (ky * op.kw + kx) * step_tap] = ky * shape.slot_floats + c * shape.plane + kx;
}

template <class Taps>
void fill_panel(const Windows& windows, const int64_t* offsets, int64_t depth, float* panel) {
  for (int64_t d = 0; d < depth; d += Taps::rows, panel += kPanel) {
    if constexpr (Taps::rows == 1) {
      windows.read(offsets[d]).store(panel);
    } else {
#if defined(__AVX512BF16__)
      interleave(windows.read(offsets[d]), d + 1 < depth ? windows.read(offsets[d + 1]) : Vec::fill(0)).store(panel);
#endif
    }
  }
}

template <class T, class Taps>
bool Run::task(const Conv2d& op, const Tiling& tiling, int64_t task) {
  const int64_t first = tiling.first_row(task), last = tiling.last_row(task), depth = op.kh * op.kw * op.channels;
  const int64_t pixels = (last - first) * op.out_w, panels = ceil_div(pixels, kPanel);
  const bool pairs_in = Taps::rows == 2 && has_paired_channels(op),
             pairs_out = Taps::rows == 2 && has_paired_outputs(op);
  Conv2d map = op, result = op;
  if (pairs_in) map.channels /= 2, map.x_stride = halved(op.x_stride);
  if (pairs_out) result.outputs /= 2, result.out_stride = halved(op.out_stride);
  const PlaneShape shape(map);
  const bool ready = PlaneShape::is_panel(op) && (Taps::rows == 1 || pairs_in);
  const int64_t in_panel = ceil_div(depth, Taps::rows) * kPanel, out_panel = op.outputs * kPanel;
  const int64_t in_floats = ready ? 0 : panels * in_panel,
                offset_floats = map.channels * op.kh * op.kw * Arena::kPointer;
  const int64_t left_floats = Left<T, Taps>::scratch_floats(depth);
  Arena arena(in_floats + panels * out_panel + left_floats + offset_floats + shape.floats(map, first, last));
  float* in = arena.floats(in_floats);
  float* out = arena.floats(panels * out_panel);
  float* planes = arena.floats(shape.floats(map, first, last));
  auto* offsets = reinterpret_cast<int64_t*>(arena.floats(offset_floats));
  float* left = arena.floats(left_floats);

  if (pairs_in)
    fill_planes<float>(map, shape, first, last, planes);
  else
    fill_planes<T>(map, shape, first, last, planes);
  if (!ready) {
    window_offsets(map, shape, offsets);
    Windows windows(map, shape, planes, first, last);
    for (int64_t p = 0; p < panels * kPanel; p += kLanes) {
      float* panel = in + p / kPanel * in_panel + p % kPanel;
      windows.place(p);
      if (pairs_in)
        fill_panel<FloatTaps>(windows, offsets, depth / 2, panel);
      else
        fill_panel<Taps>(windows, offsets, depth, panel);
    }
  }
  const Matrix weight{op.weight, op.outputs, depth, op.weight_stride};
  gemm(
      weight, Left<T, Taps>(weight, left), ready ? planes : in, in_panel, panels,
      [&](int64_t, int64_t row, int64_t rows, float* block) {
        start_with_bias(op.bias ? op.bias + row : nullptr, rows, block);
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
    NanSensor unused;  // no tap is read that is not there
    if (pairs_out)
      PanelOutput<float>(result, first).write(out + p * out_panel, p * kPanel, count, unused);
    else
      PanelOutput<T>(result, first).write(out + p * out_panel, p * kPanel, count, unused);
  }
  return false;
}

// A 1x1 convolution sees pixels only: where rows follow each other in memory they are cut anew, into whole panels.
Conv2d flattened(const Conv2d& op) {
  const auto follow = [](const Strides& s, int64_t h, int64_t w) { return s.h == w * s.w || h == 1; };
  if (op.kh * op.kw != 1 || op.stride_h != 1 || op.stride_w != 1 || op.out_h != op.h || op.out_w != op.w ||
      !follow(op.x_stride, op.h, op.w) || !follow(op.out_stride, op.h, op.w))
    return op;
  Conv2d flat = op;
  int64_t pixels = op.h * op.w;
  if (op.x_stride.n == pixels * op.x_stride.w && op.out_stride.n == pixels * op.out_stride.w)
    pixels *= op.n, flat.n = 1;
  flat.w = pixels % kPanel == 0 ? kPanel : pixels % kLanes == 0 ? kLanes : pixels;
  flat.h = pixels / flat.w;
  flat.out_h = flat.h, flat.out_w = flat.w;
  flat.x_stride.h = flat.w * op.x_stride.w, flat.out_stride.h = flat.w * op.out_stride.w;
  return flat;
}

// Rows per strip: what fits L2, whole panels, threads that end together; a strip streams all weights through L1.
Tiling tile_rows(const Conv2d& op, int threads) {
  constexpr int64_t weights = 16;
  const int64_t taps = op.storage == Storage::bfloat16 && kPairs ? 2 : 1, height = op.n * op.out_h;
  const int64_t pixel_floats = op.kh * op.kw * op.channels / taps + op.outputs;
  const PlaneShape shape(op);
  Tiling best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= height; ++rows) {
    const int64_t pixels = ceil_div(rows * op.out_w, kPanel) * kPanel, strips = ceil_div(height, rows);
    if (rows > 1 && pixels * pixel_floats + shape.floats(op, 0, rows) > kStripFloats) break;
    const int64_t cost = ceil_div(strips, threads) * (pixels + weights);
    if (cost < best_cost) best_cost = cost, best = {1, 1, 1, strips, rows, height};
  }
  return best;
}

}  // namespace

void conv2d(const Conv2d& given, const Executor& executor) {
  const Conv2d op = flattened(given);
  run_storage<Run>(op, tile_rows(op, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
