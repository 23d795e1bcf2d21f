// branched_depthwise forward: act(sum over branches of BN(DW(x))) with the statistics of the batch.
//
// A first pass over x computes each branch's rows in L1 and keeps only their statistics. With these the layer is one
// biased depthwise convolution, which the second pass computes in float32. For maps of 16 bits the merged filter would
// be rounded to 16 bits, too, so the second pass computes the branches' rows again.
#include "activation.h"
#include "branched.h"
#include "buffer.h"

namespace ffnet::FFNET_ISA {

void depthwise_conv2d(const DepthwiseConv2d&, const Executor&);

namespace {

constexpr int64_t kMoments = 3;

struct Work {
  const BranchedDepthwise& op;
  int64_t vectors, kh, kw;  // of the merged filter
  float* moments;           // [vectors][images][branches][kMoments][lanes]: shift, mean of y - shift, deviations
  float* merged;            // [kh][kw][vectors * lanes], then the bias
  float* image_moments(int64_t task) const { return moments + task * op.branches * kMoments * kLanes; }
  float* tap(int64_t ky, int64_t kx, int64_t vector) const {
    return merged + ((ky * kw + kx) * vectors + vector) * kLanes;
  }
  float* bias(int64_t vector) const { return tap(kh, 0, vector); }
};

Lanes lanes_of_vector(const BranchedDepthwise& op, int64_t vector) {
  const int64_t o = vector * kLanes;
  return {o, min_of(kLanes, op.channels * op.multiplier - o), op.multiplier};
}

// f(branch, row, line) for the rows of an image; before the first row, start(branch, line).
template <class T, class Start, class F>
FFNET_INLINE void each_row(const Work& work, int64_t n, const Lanes& lanes, BranchRows& branches, const Start& start,
                           const F& f) {
  const BranchedDepthwise& op = work.op;
  const MapView<const T> x{static_cast<const T*>(op.x), op.x_stride, lanes, op.h, op.w};
  int64_t gathered = 0;
  for (int64_t r = 0; r < op.out_h; ++r) {
    const int64_t need = min_of(op.h, r * op.stride_h + work.kh / 2 + 1);
    branches.x().gather(x, n, gathered, need);
    gathered = max_of(gathered, need);
    for (int b = 0; b < op.branches; ++b) {
      if (r == 0) start(b);
      f(b, r, branches.make(b, r));
    }
  }
}

// Rows of x from the first one that a row of the result needs to the last new one.
int64_t reach(const Work& work) { return work.kh + work.op.stride_h - 1; }

template <class T>
void measure_image(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& op = work.op;
  const int64_t n = task % op.n;
  const Lanes lanes = lanes_of_vector(op, task / op.n);
  const auto measure = [&](const float* line) {
    return moments_of(op.out_w,
                      [line](int64_t i) __attribute__((always_inline)) { return Vec::load(line + i * kLanes); });
  };
  BranchRows branches(op, reach(work));
  Arena arena(branches.scratch_floats());
  branches.place<T>(arena, lanes);
  Moments total[kMaxBranches];
  each_row<T>(
      work, n, lanes, branches,
      [&](int b) {  // sums of values around zero keep more digits
        const Vec shift = measure(branches.make(b, 0)).mean;
        branches.set_shift(b, Vec::fill(0) - shift);
        shift.store(work.image_moments(task) + kMoments * b * kLanes);
      },
      [&](int b, int64_t r, const float* line) {
        const Moments row = measure(line);
        if (r == 0)
          total[b] = row;
        else
          total[b].join(row);
      });
  for (int b = 0; b < op.branches; ++b) {
    float* to = work.image_moments(task) + kMoments * b * kLanes;
    total[b].mean.store(to + kLanes);
    total[b].deviations.store(to + 2 * kLanes);
  }
}

// The second pass over an image of 16 bits, for neighbouring vectors of channels that share lines.
template <class T>
void write_image(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& op = work.op;
  const int64_t n = task % op.n, together = vectors_in_line(op.storage), first = task / op.n * together;
  for (int64_t vector = first; vector < min_of(work.vectors, first + together); ++vector) {
    const Lanes lanes = lanes_of_vector(op, vector);
    BranchRows branches(op, reach(work));
    Arena arena(branches.scratch_floats() + op.out_w * kLanes);
    branches.place<T>(arena, lanes);
    float* sum = arena.floats(op.out_w * kLanes);
    Vec scale[kMaxBranches], beta = Vec::fill(0);
    for (int b = 0; b < op.branches; ++b) {
      const Norm& norm = op.branch[b].norm;
      scale[b] = norm_scale(norm, lanes).scale, beta = beta + lanes_of(norm.beta, lanes);
    }
    const auto start = [&](int b) { branches.set_shift(b, Vec::fill(0) - lanes_of(op.branch[b].norm.mean, lanes)); };
    T* out = static_cast<T*>(op.out) + n * op.out_stride.n;
    each_row<T>(work, n, lanes, branches, start, [&](int b, int64_t r, const float* line) {
      for (int64_t i = 0; i < op.out_w * kLanes; i += kLanes)
        fma(Vec::load(line + i), scale[b], b == 0 ? beta : Vec::load(sum + i)).store(sum + i);
      if (b + 1 < op.branches) return;
      activate_row(sum, kLanes, op.out_w, op.activation);
      scatter_row(sum, op.out_w, {lanes.first, lanes.count, 1}, out + r * op.out_stride.h, op.out_stride.c,
                  op.out_stride.w);
    });
  }
}

JointMoments join_images(const Work& work, int64_t vector, int b) {
  const BranchedDepthwise& op = work.op;
  JointMoments joined;
  for (int64_t n = 0; n < op.n; ++n) {
    const float* of_image = work.image_moments(vector * op.n + n) + kMoments * b * kLanes;
    joined.join(of_image + kLanes, of_image, of_image + 2 * kLanes, static_cast<double>(op.out_h * op.out_w));
  }
  return joined;
}

void finish_statistics(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const Lanes lanes = lanes_of_vector(work.op, vector);
  for (int b = 0; b < work.op.branches; ++b) {
    const Norm& norm = work.op.branch[b].norm;
    const JointMoments moments = join_images(work, vector, b);
    moments.mean().store_first(norm.mean + lanes.first, lanes.count);
    moments.variance().store_first(norm.variance + lanes.first, lanes.count);
  }
}

// Merges the branches of one vector of channels.
void merge_branches(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& op = work.op;
  const Lanes lanes = lanes_of_vector(op, vector);
  for (int64_t ky = 0; ky < work.kh; ++ky)
    for (int64_t kx = 0; kx < work.kw; ++kx) Vec::fill(0).store(work.tap(ky, kx, vector));
  Vec bias = Vec::fill(0);
  for (int b = 0; b < op.branches; ++b) {
    const Branch& branch = op.branch[b];
    const Vec scale = norm_scale(branch.norm, lanes).scale;
    bias = bias + (lanes_of(branch.norm.beta, lanes) - scale * lanes_of(branch.norm.mean, lanes));
    Arena arena(packed_floats<FloatTaps>(branch.filter));
    const int64_t kh = branch.filter.kh, kw = branch.filter.kw;
    const PackedFilter filter = pack_filter<float, FloatTaps>(branch.filter, lanes.first, lanes.count, 1, 0, arena.at);
    for (int64_t ky = 0; ky < kh; ++ky)
      for (int64_t kx = 0; kx < kw; ++kx) {
        float* to = work.tap(ky + (work.kh - kh) / 2, kx + (work.kw - kw) / 2, vector);
        fma(Vec::load(filter.weights + (ky * kw + kx) * kLanes), scale, Vec::load(to)).store(to);
      }
  }
  bias.store(work.bias(vector));
}

}  // namespace

void branched_depthwise(const BranchedDepthwise& op, const Executor& executor) {
  const int64_t vectors = ceil_div(op.channels * op.multiplier, kLanes);
  int64_t kh = 1, kw = 1;
  for (int b = 0; b < op.branches; ++b)
    kh = max_of(kh, op.branch[b].filter.kh), kw = max_of(kw, op.branch[b].filter.kw);
  const Buffer moments(vectors * op.n * op.branches * kMoments * kLanes), merged((kh * kw + 1) * vectors * kLanes);
  Work work{op, vectors, kh, kw, moments.data, merged.data};
  with_storage(op.storage, [&](auto element) {
    using T = decltype(element);
    executor.run(vectors * op.n, measure_image<T>, &work);
    executor.run(vectors, finish_statistics, &work);
    if constexpr (sizeof(T) == 2) {
      executor.run(ceil_div(vectors, vectors_in_line(op.storage)) * op.n, write_image<T>, &work);
    }
  });
  if (op.storage != Storage::float32) return;
  executor.run(vectors, merge_branches, &work);
  depthwise_conv2d({Storage::float32,
                    op.n,
                    op.channels,
                    op.multiplier,
                    op.h,
                    op.w,
                    op.out_h,
                    op.out_w,
                    op.stride_h,
                    op.stride_w,
                    kh / 2,
                    kw / 2,
                    op.x,
                    op.x_stride,
                    {merged.data, work.bias(0), kh, kw, 1, kw * vectors * kLanes, vectors * kLanes},
                    op.activation,
                    op.out,
                    op.out_stride},
                   executor);
}

}  // namespace ffnet::FFNET_ISA
