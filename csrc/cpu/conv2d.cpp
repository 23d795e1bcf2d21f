// conv2d forward, one group: residual + scale * act(conv(x; weight) + bias). For the layers around a depthwise model's
// mixers: 1x1 projections and the strided convolutions of its stem.
//
// Here the pixels are on the left of the product and the weight, packed once a call, on the right. In a channels-last
// row a window is kw * channels adjacent taps, and windows are stride_w pixels apart: nothing is gathered window by
// window. 1x1 filters read the map itself; for others, and for maps of another order or type, a task copies its rows,
// with padding. If two convolutions follow each other, the first one computes the rows that a task of the second would
// copy, so the map between them never exists as a whole.
#include "conv2d.h"

#include <type_traits>

#include "buffer.h"
#include "panel_output.h"

namespace ffnet::FFNET_ISA {
namespace {

// A rectangle of output pixels of one image, computed by a task.
struct Part {
  int64_t image, first_row, last_row, first_column, last_column;
  int64_t columns() const { return last_column - first_column; }
};

template <class T, class Taps>
class Convolution {
 public:
  Convolution(const Conv2d& op, int threads)
      : op_(op),
        weight_{op.weight, op.outputs, op.channels, op.kh * op.kw, op.channels_inside, op.weight_stride},
        pixel_(ceil_div(op.channels, Taps::rows)),
        in_place_(op.kh * op.kw == 1 && stays_inside(op) && reads_in_place(op)),
        packed_{nullptr, op.kh * op.kw * pixel_, op.outputs},
        floats_(packed_.floats() + packed_.panels() * kPanel) {
    packed_.data = floats_.data;
    cut(threads);
  }

  // `first` computes this one's map, of which only the size matters then; it must produce the rows that tasks copy.
  void run(const Executor& executor, Convolution* first = nullptr) {
    first_ = first;
    if (first) first->pack(executor);
    pack(executor);
    const auto make = [](void* self, int64_t task) { static_cast<const Convolution*>(self)->make(task); };
    executor.run(op_.n * strips_, make, this);
  }

 private:
  using Element = std::conditional_t<Taps::rows == 1, float, T>;  // the type of a tap

  void pack(const Executor& executor) {
    float* bias = floats_.data + packed_.floats();
    for (int64_t o = 0; o < packed_.panels() * kPanel; ++o) bias[o] = op_.bias && o < op_.outputs ? op_.bias[o] : 0;
    constexpr int64_t kAtOnce = 32 * 1024;  // below so many floats, packing takes less time than waking threads
    const auto pack = [](void* self, int64_t j) {
      const auto& c = *static_cast<const Convolution*>(self);
      pack_panel<T, Taps>(c.weight_, j, c.floats_.data + j * c.packed_.depth * kPanel);
    };
    if (packed_.floats() > kAtOnce) executor.run(packed_.panels(), pack, this);
    for (int64_t j = 0; packed_.floats() <= kAtOnce && j < packed_.panels(); ++j) pack(this, j);
  }

  static bool stays_inside(const Conv2d& op) {
    return op.pad_top == 0 && op.pad_left == 0 && (op.out_h - 1) * op.stride_h < op.h &&
           (op.out_w - 1) * op.stride_w < op.w;
  }
  static bool reads_in_place(const Conv2d& op) {
    const Strides& s = op.x_stride;
    return sizeof(T) == sizeof(Element) && s.c == 1 && op.channels % Taps::rows == 0 && s.n % Taps::rows == 0 &&
           s.h % Taps::rows == 0 && s.w % Taps::rows == 0 && reinterpret_cast<uintptr_t>(op.x) % sizeof(float) == 0;
  }

  // Images are cut by rows, or by columns where there is one row: the input a part reads again and again stays in L2,
  // the threads end together, and no part is much smaller than what the weight costs to stream.
  void cut(int threads) {
    constexpr int64_t kPartFloats = 128 * 1024;
    by_columns_ = op_.out_h == 1;
    const int64_t length = by_columns_ ? op_.out_w : op_.out_h, across = by_columns_ ? 1 : op_.out_w;
    const int64_t least = ceil_div(4 * kProductRows, across);
    const int64_t unit = (by_columns_ ? op_.stride_w * op_.kh : op_.stride_h * op_.w) * pixel_;
    const int64_t fewest = ceil_div(length, max_of(least, kPartFloats / unit));
    int64_t best_cost = INT64_MAX;
    for (int64_t strips = fewest; strips <= max_of(fewest, ceil_div(length, least)); ++strips) {
      const int64_t cost = ceil_div(op_.n * strips, threads) * (ceil_div(length, strips) * across + kProductRows);
      if (cost < best_cost) best_cost = cost, strips_ = strips;
    }
  }
  Part part(int64_t task) const {
    const int64_t image = task / strips_, strip = task % strips_, length = by_columns_ ? op_.out_w : op_.out_h;
    const int64_t first = strip * length / strips_, last = (strip + 1) * length / strips_;
    return by_columns_ ? Part{image, 0, 1, first, last} : Part{image, first, last, 0, op_.out_w};
  }

  void make(int64_t task) const {
    const Part part = this->part(task);
    const Strides& s = op_.out_stride;
    const int64_t first_floats = first_ ? first_->scratch_floats(first_->part_for(*this, part)) : 0;
    Arena arena(scratch_floats(part) + first_floats);
    make(part, arena, static_cast<T*>(op_.out) + part.image * s.n + part.first_row * s.h + part.first_column * s.w, s);
  }

  // The rectangle of the map that a part reads, padding included.
  int64_t top(const Part& part) const { return part.first_row * op_.stride_h - op_.pad_top; }
  int64_t left(const Part& part) const { return part.first_column * op_.stride_w - op_.pad_left; }
  int64_t height(const Part& part) const { return (part.last_row - 1 - part.first_row) * op_.stride_h + op_.kh; }
  int64_t width(const Part& part) const { return (part.columns() - 1) * op_.stride_w + op_.kw; }
  // The part of this convolution's result that `next` reads for a part of its own.
  Part part_for(const Convolution& next, const Part& part) const {
    const int64_t top = next.top(part), left = next.left(part);
    const int64_t first_row = min_of(op_.out_h, max_of(0, top)), first_column = min_of(op_.out_w, max_of(0, left));
    return {part.image, first_row, max_of(first_row, min_of(op_.out_h, top + next.height(part))), first_column,
            max_of(first_column, min_of(op_.out_w, left + next.width(part)))};
  }

  int64_t scratch_floats(const Part& part) const {
    if (part.last_row == part.first_row || part.columns() == 0) return 0;
    const int64_t copied = in_place_ ? 0 : height(part) * width(part) * pixel_ + width(part) * kLanes;
    return copied + kProductRows * kPanel + 2 * kProductRows * kLanes;
  }

  // A part of the result, whose first pixel is `out`.
  void make(const Part& part, Arena arena, T* out, const Strides& out_stride) const {
    const int64_t width = this->width(part), height = in_place_ ? 0 : this->height(part);
    const int64_t top = this->top(part), left = this->left(part);
    float *rows = arena.floats(height * width * pixel_), *gathered = arena.floats(in_place_ ? 0 : width * kLanes);
    float *block = arena.floats(kProductRows * kPanel), *line = arena.floats(2 * kProductRows * kLanes);
    if (first_)
      make_rows(part, arena, reinterpret_cast<T*>(rows));
    else
      for (int64_t y = 0; y < height; ++y)
        copy_row(part.image, top + y, left, width, reinterpret_cast<Element*>(rows + y * width * pixel_), gathered);

    const int64_t pixel = in_place_ ? op_.x_stride.w / Taps::rows : pixel_, run = op_.kw * pixel_;
    const float* bias = packed_.panel(packed_.panels());
    const Strides& residual_stride = op_.residual_stride;
    const T* residual = static_cast<const T*>(op_.residual);
    if (residual)
      residual +=
          part.image * residual_stride.n + part.first_row * residual_stride.h + part.first_column * residual_stride.w;
    for (int64_t j = 0; j < packed_.panels(); ++j) {
      const int64_t columns = packed_.columns(j);
      for (int64_t r = part.first_row; r < part.last_row; ++r) {
        each_block(part.columns(), [&](int64_t first, int64_t count) {
          T* to = out + (r - part.first_row) * out_stride.h + first * out_stride.w;
          ask_for(to, count, j, out_stride);
          start_with_row(bias + j * kPanel, count, block);
          const int64_t y = (r - part.first_row) * op_.stride_h;
          const float* from = in_place_ ? map_row(part.image, top + y) + left * pixel : rows + y * width * pixel_;
          const LeftOperand windows{from + first * op_.stride_w * pixel, op_.stride_w * pixel, run, op_.kh,
                                    width * pixel_};
          add_product<Taps>(count, columns, windows, packed_.panel(j), block);
          if (columns > kLanes)
            activate_row(block, kLanes, 2 * count, op_.activation);
          else
            activate_row(block, kPanel, count, op_.activation);
          if (op_.scale || residual)
            add_residual(
                block, count, j, line,
                residual ? residual + (r - part.first_row) * residual_stride.h + first * residual_stride.w : nullptr);
          write(block, count, j, line, to, out_stride);
        });
      }
    }
  }

  // The rows that a part reads, computed by the preceding convolution, with zeros around them.
  void make_rows(const Part& part, Arena arena, T* rows) const {
    const int64_t width = this->width(part), row = width * op_.channels;
    const Part made = first_->part_for(*this, part);
    // There may be none: padding can be wider than a part.
    const int64_t above = min_of(height(part), max_of(0, -top(part))), before = min_of(width, max_of(0, -left(part)));
    const auto clear = [&](T* from, int64_t pixels) {
      __builtin_memset(from, 0, static_cast<size_t>(pixels * op_.channels) * sizeof(T));
    };
    const int64_t made_height = made.last_row - made.first_row, below = height(part) - above - made_height;
    clear(rows, above * width), clear(rows + (above + made_height) * row, below * width);
    for (int64_t y = above; y < above + made_height; ++y) {
      clear(rows + y * row, before);
      clear(rows + y * row + (before + made.columns()) * op_.channels, width - before - made.columns());
    }
    if (made_height > 0 && made.columns() > 0)
      first_->make(made, arena, rows + above * row + before * op_.channels, {0, 1, row, op_.channels});
  }

  const float* map_row(int64_t image, int64_t y) const {
    const T* row = static_cast<const T*>(op_.x) + image * op_.x_stride.n + y * op_.x_stride.h;
    return reinterpret_cast<const float*>(row);
  }

  // Pixels [left, left + width) of a row, zeros outside the map; `gathered` is scratch.
  void copy_row(int64_t image, int64_t y, int64_t left, int64_t width, Element* out, float* gathered) const {
    const int64_t channels = pixel_ * Taps::rows, stride_c = op_.x_stride.c, stride_w = op_.x_stride.w;
    const bool outside = y < 0 || y >= op_.h;
    const int64_t begin = outside ? width : min_of(width, max_of(0, -left)),
                  end = max_of(begin, min_of(width, op_.w - left));
    const auto clear = [&](int64_t from, int64_t to) {
      __builtin_memset(out + from * channels, 0, static_cast<size_t>((to - from) * channels) * sizeof(Element));
    };
    if (begin == width) return clear(0, width);
    clear(0, begin), clear(end, width);
    const T* from =
        static_cast<const T*>(op_.x) + image * op_.x_stride.n + y * op_.x_stride.h + (left + begin) * stride_w;
    const int64_t pixels = end - begin;
    out += begin * channels;
    if (stride_c == 1 && sizeof(T) == sizeof(Element) && channels == op_.channels && stride_w == channels) {
      __builtin_memcpy(out, from, static_cast<size_t>(pixels * channels) * sizeof(T));
      return;
    }
    if (channels <= 4) {  // images
      for (int64_t c = 0; c < channels; ++c) {
        const T* channel = from + c * stride_c;
        if (c >= op_.channels) {
          for (int64_t i = 0; i < pixels; ++i) out[i * channels + c] = Element();
        } else if constexpr (std::is_same_v<T, Element>) {
          for (int64_t i = 0; i < pixels; ++i) out[i * channels + c] = channel[i * stride_w];
        } else {
          for (int64_t i = 0; i < pixels; ++i) out[i * channels + c] = to_float(channel[i * stride_w]);
        }
      }
      return;
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = min_of(kLanes, channels - c);
      gather_row(Elements<T>{from}, stride_c, stride_w, pixels, {c, min_of(kLanes, op_.channels - c), 1}, gathered);
      for (int64_t i = 0; i < pixels; ++i) store_first(Vec::load(gathered + i * kLanes), out + i * channels + c, count);
    }
  }

  // residual + scale * block, in place.
  void add_residual(float* block, int64_t count, int64_t panel, float* line, const T* residual) const {
    const Strides& s = op_.residual_stride;
    for (int64_t v = 0; v < packed_.columns(panel); v += kLanes) {
      const int64_t o = panel * kPanel + v;
      const Lanes lanes{o, min_of(kLanes, op_.outputs - o), 1};
      const Vec scale = op_.scale ? load_lanes(op_.scale + o, lanes.count) : Vec::fill(1);
      const bool direct = residual && s.c == 1 && lanes.count == kLanes;
      if (residual && !direct) gather_row(Elements<T>{residual}, s.c, s.w, count, lanes, line);
      for (int64_t i = 0; i < count; ++i) {
        float* at = block + i * kPanel + v;
        const Vec base = direct ? load(residual + i * s.w + o) : residual ? Vec::load(line + i * kLanes) : Vec::fill(0);
        fma(Vec::load(at), scale, base).store(at);
      }
    }
  }

  // Prefetches where a block goes. Of each pixel that is a piece too short for hardware prefetchers.
  void ask_for(const T* out, int64_t count, int64_t panel, const Strides& s) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (s.c != 1) return;
    for (int64_t o = panel * kPanel; o < panel * kPanel + packed_.columns(panel); o += kLine)
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(out + i * s.w + o, 1);
  }

  // A block's pixels, [count][kPanel], to `out` and the pixels after it; `line` is scratch.
  void write(const float* block, int64_t count, int64_t panel, float* line, T* out, const Strides& s) const {
    for (int64_t v = 0; v < packed_.columns(panel); v += kLanes) {
      const int64_t o = panel * kPanel + v;
      const Lanes lanes{o, min_of(kLanes, op_.outputs - o), 1};
      if (s.c == 1 && lanes.count == kLanes) {
        for (int64_t i = 0; i < count; ++i) store(Vec::load(block + i * kPanel + v), out + i * s.w + o);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) Vec::load(block + i * kPanel + v).store(line + i * kLanes);
      scatter_row(line, count, lanes, out, s.c, s.w);
    }
  }

  const Conv2d& op_;
  Weight weight_;
  int64_t pixel_;  // taps
  bool in_place_;
  PackedWeight packed_;
  Buffer floats_;  // the packed weight, then the bias in whole panels
  int64_t strips_ = 1;
  bool by_columns_ = false;
  const Convolution* first_ = nullptr;
};

bool is_pointwise(const Conv2d& op) {
  return op.kh * op.kw == 1 && op.stride_h == 1 && op.stride_w == 1 && op.out_h == op.h && op.out_w == op.w;
}

// Pixels on the left cost packing the weight and waiting for it, pixels on the right two transpositions where they are
// channels-last, and the rest of a panel.
bool weight_goes_left(const Conv2d& op) {
  if (!is_pointwise(op)) return false;
  if (op.x_stride.c != 1 || op.out_stride.c != 1) return true;
  const int64_t whole_panels = op.h * op.w % kLanes == 0 ? 2 : 1;
  return op.n * op.h * op.w * (op.channels + op.outputs) < whole_panels * op.channels * op.outputs;
}

// One row of all pixels, or one for each image, where rows of a 1x1 convolution follow each other in memory. Of images
// of one pixel strides within an image say nothing.
Conv2d flattened(Conv2d op) {
  if (!is_pointwise(op) || !rows_follow(op)) return op;
  const int64_t pixels = op.h * op.w;
  if (pixels == 1)
    for (Strides* s : {&op.x_stride, &op.out_stride, &op.residual_stride}) s->w = s->n;
  return images_follow(op, pixels) ? with_rows(op, 1, 1, op.n * pixels) : with_rows(op, op.n, 1, pixels);
}

}  // namespace

void conv2d(const Conv2d& given, const Executor& executor) {
  constexpr int64_t kFewPixels = 8;  // with 16, products were faster on all instruction sets
  if (is_pointwise(given) && given.n * given.h * given.w <= kFewPixels) return few_pixels_conv2d(given, executor);
  if (weight_goes_left(given)) return pointwise_conv2d(given, executor);
  const Conv2d op = flattened(given);
#if defined(__AVX512BF16__)
  if (op.storage == Storage::bfloat16) return Convolution<BFloat16, PairTaps>(op, executor.threads).run(executor);
#endif
  with_storage(op.storage,
               [&](auto element) { Convolution<decltype(element), FloatTaps>(op, executor.threads).run(executor); });
}

// The second reads the rows of the first as computed: in the maps' element type, one or two per tap.
bool pairs_conv2d(const Conv2d& first, const Conv2d& second) {
  constexpr int64_t kImageChannels = 4;  // rows that two tasks need are computed twice, which must be cheap
  if (first.channels > kImageChannels || second.kh * second.kw == 1 || first.storage != second.storage) return false;
  return second.storage == Storage::float32 ||
         (second.storage == Storage::bfloat16 && kPairs && second.channels % 2 == 0);
}

void conv2d_pair(const Conv2d& first, const Conv2d& second, const Executor& executor) {
  if (!pairs_conv2d(first, second)) throw std::invalid_argument("conv2d_pair: not a pair that pairs_conv2d takes");
  const auto run = [&](auto element, auto taps) {
    using Pass = Convolution<decltype(element), decltype(taps)>;
    Pass before(first, executor.threads);
    Pass(second, executor.threads).run(executor, &before);
  };
#if defined(__AVX512BF16__)
  if (second.storage == Storage::bfloat16) return run(BFloat16(), PairTaps());
#endif
  run(float(), FloatTaps());
}

}  // namespace ffnet::FFNET_ISA
