// depthwise_conv2d backward: gradients of x, weight and bias in one pass over the maps.
//
// A band of rows at a time: the convolution is made again for the derivative of the activation, whose product with the
// incoming gradient stays in a ring of rows; the weight gradient and the input gradient are made from those.
#include "activation.h"
#include "filter_grad.h"
#include "partial_sums.h"
#include "row_ring.h"
#include "wgrad_row.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kBandPixels = 256;  // of a band: its lines of two maps stay in L1

struct Work {
  const DepthwiseConv2dBackward& op;
  GradientTiling tiling;
  const PartialSums& sums;
  ConvRow conv_row;
  int64_t band, halo;  // rows; gradient rows above a band that its input gradient needs
  bool needs_x() const { return op.activation != Activation::none || op.filter_grad.weight; }
  bool wants_filter() const { return op.filter_grad.weight || op.filter_grad.bias; }
  Lanes lanes(int64_t vector) const {
    const int64_t first = vector * kLanes;
    return {first, min_of(kLanes, op.channels * op.multiplier - first), op.multiplier};
  }
};

// The input gradient of one class of pixels: those that the same taps of a strided filter meet.
struct PixelClass {
  MirroredTaps columns;
  PackedFilter filter;
  ConvRow conv_row;
  int64_t first, count;  // columns first, first + stride_w, ...
};

// Adds the two halves of what two outputs per channel give: lanes 0 1 2 3 ... -> 0 + 1, 2 + 3, ...
template <size_t... L>
FFNET_INLINE Vec add_pairs(Vec x, std::index_sequence<L...>) {
  const Vec even = {__builtin_shufflevector(x.v, x.v, (2 * L % Vec::lanes)...)};
  const Vec odd = {__builtin_shufflevector(x.v, x.v, ((2 * L + 1) % Vec::lanes)...)};
  return even + odd;
}

// One task's vector of output channels.
template <class T>
class Task {
 public:
  Task(const Work& work, const Lanes& lanes, float* sums)
      : work_(work),
        op_(work.op),
        sums_(sums),
        x_map_{static_cast<const T*>(op_.x), op_.x_stride, lanes, op_.h, op_.w},
        grad_map_{
            static_cast<const T*>(op_.grad), op_.grad_stride, {lanes.first, lanes.count, 1}, op_.out_h, op_.out_w},
        x_grad_map_{static_cast<T*>(op_.x_grad),
                    op_.x_grad_stride,
                    {lanes.first / lanes.multiplier, ceil_div(lanes.count, lanes.multiplier), 1},
                    op_.h,
                    op_.w} {
    const int64_t kh = op_.filter.kh, rows = work.band + work.halo,
                  out_rows = min_of(op_.h, work.band * op_.stride_h + kh);
    x_ = RowRing(op_.h, op_.w, (rows - 1) * op_.stride_h + kh, op_.pad_top,
                 (op_.out_h - 1) * op_.stride_h - op_.pad_top + kh - op_.h);
    grad_ = RowRing(op_.out_h, op_.out_w, rows, kh - 1, (op_.h - 1 + op_.pad_top) / op_.stride_h + 1 - op_.out_h);
    const int64_t parts = op_.stride_h * op_.stride_w, filter_floats = packed_floats<FloatTaps>(op_.filter);
    const int64_t line = op_.out_w * kLanes;
    Arena arena(x_.scratch_floats() + grad_.scratch_floats() + filter_floats * (1 + parts) + line +
                (op_.x_grad ? out_rows * op_.w * kLanes : 0));
    x_.place(arena), grad_.place(arena);
    if (op_.activation != Activation::none)
      forward_ = pack_filter<T, FloatTaps>(op_.filter, lanes.first, lanes.count, op_.stride_w, op_.pad_left,
                                           arena.floats(filter_floats));
    slope_ = arena.floats(line);
    if (!op_.x_grad) return;
    for (int64_t p = 0; p < op_.stride_h; ++p) {
      const MirroredTaps taps = row_taps(p);
      for (int64_t q = 0; q < op_.stride_w; ++q) {
        const MirroredTaps columns(q, op_.stride_w, op_.filter.kw, op_.pad_left);
        const PackedFilter filter = pack_mirrored<T>(op_.filter, taps, columns, op_.stride_h, op_.stride_w,
                                                     grad_map_.lanes, arena.floats(filter_floats));
        classes_[p][q] = {columns, filter, select_part_row(taps.count, columns.count), q,
                          ceil_div(max_of(0, op_.w - q), op_.stride_w)};
      }
    }
    out_ = arena.floats(out_rows * op_.w * kLanes);
  }

  // Gradient rows [first, last) of an image, and the rows of x that have all their gradients then.
  void run(int64_t n, int64_t first, int64_t last, bool more_images) {
    more_images_ = more_images;
    grad_made_ = op_.x_grad ? max_of(0, first - work_.halo) : first;
    x_made_ = max_of(0, grad_made_ * op_.stride_h - op_.pad_top);
    int64_t out_made = done_rows(first);
    for (int64_t u = first; u < last; u += work_.band) {
      const int64_t v = min_of(u + work_.band, last);
      make_grad(n, v);
      if (op_.filter_grad.weight) {
        const WgradRun run{grad_.window(u),
                           x_.window(u * op_.stride_h - op_.pad_top),
                           v - u,
                           op_.stride_h,
                           op_.stride_w,
                           0,
                           op_.out_w,
                           -op_.pad_left,
                           op_.w};
        add_filter_sums(run, op_.filter.kh, op_.filter.kw, sums_);
      }
      if (op_.filter_grad.bias) add_bias_sum(grad_, u, v, op_.out_w, sums_ + op_.filter.kh * op_.filter.kw * kLanes);
      if (!op_.x_grad) continue;
      const int64_t done = done_rows(v);
      make_x_grad(n, out_made, done);
      out_made = done;
    }
  }

 private:
  MirroredTaps row_taps(int64_t p) const { return {p, op_.stride_h, op_.filter.kh, op_.pad_top}; }

  // How many rows of x have all their gradients once gradient rows [0, made) are there.
  int64_t done_rows(int64_t made) const {
    if (made == 0) return 0;
    return made == op_.out_h ? op_.h : max_of(0, min_of(op_.h, made * op_.stride_h - op_.pad_top));
  }

  // Rows of the incoming gradient up to `last`, times the derivative of the activation.
  void make_grad(int64_t n, int64_t last) {
    if (work_.needs_x()) {
      const int64_t x_last = min_of(op_.h, (last - 1) * op_.stride_h - op_.pad_top + op_.filter.kh);
      if (x_last > x_made_) {
        x_.gather(x_map_, n, x_made_, x_last);
        x_made_ = x_last;
      }
    }
    grad_.gather(grad_map_, n, grad_made_, last);
    if (op_.activation != Activation::none) {
      for (int64_t r = grad_made_; r < last; ++r) {
        prefetch_x(n, (r + work_.band) * op_.stride_h);
        work_.conv_row({x_.window(r * op_.stride_h - op_.pad_top), kLanes, op_.w}, forward_,
                       {slope_, kLanes, 0, op_.out_w});
        slope_row(slope_, nullptr, op_.out_w, op_.activation);
        apply_slope_row(grad_.line(r), slope_, grad_.line(r), op_.out_w, op_.activation);
      }
    }
    grad_made_ = last;
  }

  void prefetch_x(int64_t n, int64_t row) const {
    if (!work_.needs_x()) return;
    for (int64_t r = row; r < row + op_.stride_h; ++r) x_map_.prefetch(n, r, more_images_);
  }

  void make_x_grad(int64_t n, int64_t first, int64_t last) {
    const int64_t line = op_.w * kLanes;
    const bool direct = op_.multiplier == 1 && in_place<T>(x_grad_map_.lanes, op_.x_grad_stride.c);
    const int64_t pixel = direct ? op_.x_grad_stride.w : kLanes;
    for (int64_t r = first; r < last; ++r) {
      x_grad_map_.prefetch(n, r + 1, false);
      if (r % op_.stride_h == 0) grad_map_.prefetch(n, (r + op_.pad_top) / op_.stride_h + work_.band, more_images_);
      if (op_.activation == Activation::none) prefetch_x(n, r + work_.band * op_.stride_h);
      const int64_t p = r % op_.stride_h;
      const float* const* rows = grad_.window(r / op_.stride_h + row_taps(p).offset);
      float* out = direct ? reinterpret_cast<float*>(x_grad_map_.row(n, r) + x_grad_map_.lanes.first)
                          : out_ + (r - first) * line;
      for (int64_t q = 0; q < op_.stride_w; ++q) {
        const PixelClass& c = classes_[p][q];
        c.conv_row({rows, kLanes, op_.out_w}, c.filter, {out + c.first * pixel, op_.stride_w * pixel, 0, c.count});
      }
    }
    if (direct) return;
    if (op_.multiplier == 2)
      for (int64_t i = 0; i < (last - first) * line; i += kLanes)
        add_pairs(Vec::load(out_ + i), std::make_index_sequence<Vec::lanes>()).store(out_ + i);
    scatter_rows(out_, last - first, op_.w, x_grad_map_.lanes, x_grad_map_.row(n, first), x_grad_map_.stride);
  }

  const Work& work_;
  const DepthwiseConv2dBackward& op_;
  float* sums_;
  MapView<const T> x_map_, grad_map_;
  MapView<T> x_grad_map_;
  bool more_images_ = false;
  RowRing x_, grad_;
  PackedFilter forward_{};
  PixelClass classes_[2][2] = {{empty(), empty()}, {empty(), empty()}};
  float *slope_ = nullptr, *out_ = nullptr;
  int64_t x_made_ = 0, grad_made_ = 0;

  static PixelClass empty() { return {{0, 1, 0, 0}, {}, nullptr, 0, 0}; }
};

template <class T>
void finish_task(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const DepthwiseConv2dBackward& op = work.op;
  const float* sums = work.sums.total(vector);
  Lanes lanes = work.lanes(vector);
  lanes.multiplier = 1;
  store_filter_grad<T>(sums, sums + op.filter.kh * op.filter.kw * kLanes, op.filter.kh, op.filter.kw, lanes,
                       op.filter_grad);
}

}  // namespace

void depthwise_conv2d_backward(const DepthwiseConv2dBackward& op, const Executor& executor) {
  const GradientTiling tiling(ceil_div(op.channels * op.multiplier, kLanes), op.n, op.out_h);
  const bool wants_filter = op.filter_grad.weight || op.filter_grad.bias;
  const PartialSums sums(tiling, wants_filter ? (op.filter.kh * op.filter.kw + 1) * kLanes : 0);
  Work work{op,
            tiling,
            sums,
            select_conv_row<FloatTaps>(op.filter, op.stride_w),
            max_of(1, kBandPixels / op.out_w),
            op.x_grad ? ceil_div(op.filter.kh - 1, op.stride_h) : 0};
  with_storage(op.storage, [&](auto element) {
    using T = decltype(element);
    tiling.run(executor, op.x_stride.c == 1 ? vectors_in_line(op.storage) : 1, run_gradient_task<Task<T>, Work>, &work);
    if (wants_filter) executor.run(tiling.vectors(), finish_task<T>, &work);
  });
}

}  // namespace ffnet::FFNET_ISA
