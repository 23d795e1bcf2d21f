// branched_depthwise backward, stride 1, one output per channel; only x and the statistics are kept.
//
// With y the output of a branch's convolution, M its pixels in the batch, and gradient g of the branches' sum,
//   gamma_grad = sum g (y - mean) / deviation,  beta_grad = sum g,
//   y_grad = gamma / deviation * (g - beta_grad / M - (y - mean) / deviation * gamma_grad / M).
// A first pass computes y row by row for the two sums; a second one recomputes y, then y_grad, and the gradients of x
// and of the filters while the maps of an image and a vector of channels are in cache. g is the incoming gradient times
// the activation's derivative at the branches' sum, which both passes compute from the rows of y.
#include "activation.h"
#include "branched.h"
#include "partial_sums.h"
#include "wgrad_row.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kStripFloats = 4 * 1024;  // of each map: both stay in L1

struct Work {
  const BranchedDepthwiseBackward& op;
  GradientTiling tiling;
  const PartialSums &sums, &weights;  // [1 + branches][lanes]: of g, of g * (y - mean); the branches' filters
  Lanes lanes(int64_t vector) const {
    const int64_t c = vector * kLanes;
    return {c, min_of(kLanes, op.forward.channels - c), 1};
  }
};

// Rows of g and of y - mean.
template <class T>
class Gradients {
 public:
  Gradients(const Work& work, const Lanes& lanes)
      : op_(work.op), lanes_(lanes), branches_(work.op.forward, work.op.forward.h) {
    const BranchedDepthwise& f = op_.forward;
    Vec beta = Vec::fill(0);
    for (int b = 0; b < f.branches; ++b) {
      scale_[b] = norm_scale(f.branch[b].norm, lanes).scale;
      beta = beta + lanes_of(f.branch[b].norm.beta, lanes);
    }
    beta_ = beta;
  }
  int64_t scratch_floats() const { return branches_.scratch_floats() + 2 * op_.forward.w * kLanes; }
  void place(Arena& arena) {
    branches_.template place<T>(arena, lanes_);
    for (int b = 0; b < op_.forward.branches; ++b)
      branches_.set_shift(b, Vec::fill(0) - lanes_of(op_.forward.branch[b].norm.mean, lanes_));
    line_ = arena.floats(op_.forward.w * kLanes);
    slope_ = arena.floats(op_.forward.w * kLanes);
  }
  void start_image(int64_t n) {
    const BranchedDepthwise& f = op_.forward;
    grad_ = static_cast<const T*>(op_.grad) + n * op_.grad_stride.n;
    branches_.x().gather(MapView<const T>{static_cast<const T*>(f.x), f.x_stride, lanes_, f.h, f.w}, n, 0, f.h);
  }
  const RowRing& x() { return branches_.x(); }
  // Makes row r: y - mean of each branch into y, g as the result.
  const float* make(int64_t r, const float* (&y)[kMaxBranches]) {
    const BranchedDepthwise& f = op_.forward;
    const T* row = grad_ + r * op_.grad_stride.h;
    if (r + 1 < f.h && op_.grad_stride.c == 1)
      prefetch_row(row + op_.grad_stride.h + lanes_.first, op_.grad_stride.w, 0, f.w);
    gather_row(Elements<T>{row}, op_.grad_stride.c, op_.grad_stride.w, f.w, lanes_, line_);
    for (int b = 0; b < f.branches; ++b) y[b] = branches_.make(b, r);
    if (f.activation != Activation::none) {
      for (int64_t i = 0; i < f.w * kLanes; i += kLanes) {
        Vec z = beta_;
        for (int b = 0; b < f.branches; ++b) z = fma(Vec::load(y[b] + i), scale_[b], z);
        z.store(slope_ + i);
      }
      slope_row(slope_, nullptr, f.w, f.activation);
      apply_slope_row(line_, slope_, line_, f.w, f.activation);
    }
    return line_;
  }

 private:
  const BranchedDepthwiseBackward& op_;
  Lanes lanes_;
  BranchRows branches_;
  Vec scale_[kMaxBranches], beta_;
  const T* grad_;
  float *line_, *slope_;
};

template <class T>
void sum_gradients(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& f = work.op.forward;
  Gradients<T> gradients(work, work.lanes(work.tiling.vector(task)));
  Arena arena(gradients.scratch_floats());
  gradients.place(arena);
  Vec sum[1 + kMaxBranches];
  for (Vec& s : sum) s = Vec::fill(0);
  work.tiling.for_each_strip(task, [&](int64_t n, int64_t, int64_t, bool) {
    gradients.start_image(n);
    for (int64_t r = 0; r < f.h; ++r) {
      const float* y[kMaxBranches];
      const float* g = gradients.make(r, y);
      Vec row[1 + kMaxBranches];  // each row is summed separately, as one long running sum would round badly
      for (Vec& s : row) s = Vec::fill(0);
      for (int64_t i = 0; i < f.w * kLanes; i += kLanes) {
        const Vec grad = Vec::load(g + i);
        row[0] = row[0] + grad;
        for (int b = 0; b < f.branches; ++b) row[1 + b] = fma(grad, Vec::load(y[b] + i), row[1 + b]);
      }
      for (int s = 0; s <= f.branches; ++s) sum[s] = sum[s] + row[s];
    }
  });
  float* sums = work.sums.start(task);
  for (int s = 0; s <= f.branches; ++s) sum[s].store(sums + s * kLanes);
}

void finish_sums(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& f = work.op.forward;
  const Lanes lanes = work.lanes(vector);
  const float* sums = work.sums.total(vector);
  for (int b = 0; b < f.branches; ++b) {
    store_gradients(f.branch[b].norm, lanes, Vec::load(sums), Vec::load(sums + (1 + b) * kLanes),
                    work.op.gradients[b].norm);
  }
}

// The filter rotated by 180 degrees, for the gradient of x.
template <class T>
PackedFilter turned_filter(const Branch& branch, const Lanes& lanes, float* out) {
  const PackedFilter filter =
      pack_filter<T, FloatTaps>(branch.filter, lanes.first, lanes.count, 1, pad_left(branch), out);
  const int64_t taps = branch.filter.kh * branch.filter.kw;
  for (int64_t i = 0, j = taps - 1; i < j; ++i, --j) {
    const Vec a = Vec::load(out + i * kLanes), b = Vec::load(out + j * kLanes);
    a.store(out + j * kLanes), b.store(out + i * kLanes);
  }
  Vec::fill(0).store(out + taps * kLanes);
  return filter;
}

// The second pass of one vector of channels.
template <class T>
class Task {
 public:
  Task(const Work& work, const Lanes& lanes, float* weights)
      : op_(work.op),
        f_(work.op.forward),
        lanes_(lanes),
        line_(f_.w * kLanes),
        direct_(in_place<T>(lanes, op_.x_grad_stride.c)),
        weights_(weights),
        gradients_(work, lanes) {
    int64_t floats = gradients_.scratch_floats() + 2 * line_;
    for (int b = 0; b < f_.branches; ++b) {
      const int64_t pad = pad_top(f_.branch[b]);
      y_grad_[b] = RowRing(f_.h, f_.w, f_.h, pad, pad);
      floats += y_grad_[b].scratch_floats() + packed_floats<FloatTaps>(f_.branch[b].filter);
    }
    Arena arena(floats);
    gradients_.place(arena);
    const float values = static_cast<float>(f_.n) * static_cast<float>(f_.h * f_.w);
    for (int b = 0; b < f_.branches; ++b) {
      const Branch& branch = f_.branch[b];
      y_grad_[b].place(arena);
      turned_[b] = turned_filter<T>(branch, lanes, arena.floats(packed_floats<FloatTaps>(branch.filter)));
      at_[b] = norm_slope(branch.norm, op_.gradients[b].norm, values, lanes);
      conv_row_[b] = select_conv_row<FloatTaps>(branch.filter, 1);
    }
    out_line_ = arena.floats(line_), other_line_ = arena.floats(line_);
  }

  void run(int64_t n) {
    make_y_grad(n);
    add_weights();
    for (int64_t r = 0; op_.x_grad && r < f_.h; ++r) make_x_grad(n, r);
  }

 private:
  void make_y_grad(int64_t n) {
    gradients_.start_image(n);
    for (int64_t r = 0; r < f_.h; ++r) {
      const float* y[kMaxBranches];
      const float* g = gradients_.make(r, y);
      for (int b = 0; b < f_.branches; ++b) {
        float* to = y_grad_[b].line(r);
        for (int64_t i = 0; i < line_; i += kLanes)
          fma(Vec::load(g + i), at_[b].scale, fma(Vec::load(y[b] + i), at_[b].slope, at_[b].shift)).store(to + i);
      }
    }
  }

  void add_weights() {
    const int64_t strip = max_of(1, kStripFloats / line_);
    float* sums = weights_;
    for (int b = 0; b < f_.branches; ++b) {
      const Branch& branch = f_.branch[b];
      const int64_t kh = branch.filter.kh, kw = branch.filter.kw;
      for (int64_t r = 0; r < f_.h; r += strip)
        add_filter_sums({y_grad_[b].window(r), gradients_.x().window(r - pad_top(branch)), min_of(strip, f_.h - r), 1,
                         1, 0, f_.w, -pad_left(branch), f_.w},
                        kh, kw, sums);
      sums += kh * kw * kLanes;
    }
  }

  void make_x_grad(int64_t n, int64_t r) {
    T* row = static_cast<T*>(op_.x_grad) + n * op_.x_grad_stride.n + r * op_.x_grad_stride.h;
    RowOutput out{out_line_, kLanes, 0, f_.w};
    if constexpr (sizeof(T) == sizeof(float)) {
      if (direct_) out = {row + lanes_.first, op_.x_grad_stride.w, 0, f_.w};
    }
    for (int b = 0; b < f_.branches; ++b) {
      const RowInput in{y_grad_[b].window(r - pad_top(f_.branch[b])), kLanes, f_.w};
      if (b == 0) {
        conv_row_[b](in, turned_[b], out);
        continue;
      }
      conv_row_[b](in, turned_[b], {other_line_, kLanes, 0, f_.w});
      for (int64_t i = 0; i < f_.w; ++i) {
        float* to = out.data + i * out.pixel;
        (Vec::load(to) + Vec::load(other_line_ + i * kLanes)).store(to);
      }
    }
    if (!direct_) scatter_row(out_line_, f_.w, lanes_, row, op_.x_grad_stride.c, op_.x_grad_stride.w);
  }

  const BranchedDepthwiseBackward& op_;
  const BranchedDepthwise& f_;
  Lanes lanes_;
  int64_t line_;
  bool direct_;  // rows of the gradient are written in place
  float* weights_;
  Gradients<T> gradients_;
  RowRing y_grad_[kMaxBranches];
  PackedFilter turned_[kMaxBranches];
  NormSlope at_[kMaxBranches];
  ConvRow conv_row_[kMaxBranches];
  float *out_line_, *other_line_;
};

template <class T>
void run_task(void* context, int64_t index) {
  const Work& work = *static_cast<const Work*>(context);
  Task<T> task(work, work.lanes(work.tiling.vector(index)), work.weights.start(index));
  work.tiling.for_each_strip(index, [&](int64_t n, int64_t, int64_t, bool) { task.run(n); });
}

template <class T>
void finish_weights(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const Lanes lanes = work.lanes(vector);
  const float* weights = work.weights.total(vector);
  for (int b = 0; b < work.op.forward.branches; ++b) {
    const int64_t taps = work.op.forward.branch[b].filter.kh * work.op.forward.branch[b].filter.kw;
    scatter_row(weights, taps, lanes, static_cast<T*>(work.op.gradients[b].weight), taps, 1);
    weights += taps * kLanes;
  }
}

}  // namespace

void branched_depthwise_backward(const BranchedDepthwiseBackward& op, const Executor& executor) {
  const BranchedDepthwise& f = op.forward;
  constexpr int64_t height = 1;  // images are not cut
  const GradientTiling tiling(ceil_div(f.channels, kLanes), f.n, height);
  int64_t weight_floats = 0;
  for (int b = 0; b < f.branches; ++b) weight_floats += f.branch[b].filter.kh * f.branch[b].filter.kw * kLanes;
  const PartialSums sums(tiling, (1 + f.branches) * kLanes), weights(tiling, weight_floats);
  Work work{op, tiling, sums, weights};
  with_storage(f.storage, [&](auto element) {
    using T = decltype(element);
    executor.run(tiling.tasks(), sum_gradients<T>, &work);
    executor.run(tiling.vectors(), finish_sums, &work);
    tiling.run(executor, f.x_stride.c == 1 ? vectors_in_line(f.storage) : 1, run_task<T>, &work);
    executor.run(tiling.vectors(), finish_weights<T>, &work);
  });
}

}  // namespace ffnet::FFNET_ISA
