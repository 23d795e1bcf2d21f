// branched_depthwise forward: act(sum over branches of BN(DW(x))) with the statistics of the batch, float32.
//
// A first pass over x makes each branch's rows in L1 and keeps only their statistics. With them the layer is one biased
// depthwise convolution, which the second pass computes.
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

void measure_image(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& op = work.op;
  const int64_t n = task % op.n;
  const Lanes lanes = lanes_of_vector(op, task / op.n);
  const auto measure = [&](const float* line) {
    return moments_of(op.out_w,
                      [line](int64_t i) __attribute__((always_inline)) { return Vec::load(line + i * kLanes); });
  };
  const int64_t reach = work.kh + op.stride_h - 1;  // rows from the first one needed to the last new one
  BranchRows branches(op, reach);
  Arena arena(branches.scratch_floats());
  branches.place(arena, lanes);
  const MapView<const float> x{op.x, op.x_stride, lanes, op.h, op.w};
  Moments total[kMaxBranches];
  int64_t gathered = 0;
  for (int64_t r = 0; r < op.out_h; ++r) {
    const int64_t need = min_of(op.h, r * op.stride_h + work.kh / 2 + 1);
    branches.x().gather(x, n, gathered, need);
    gathered = max_of(gathered, need);
    for (int b = 0; b < op.branches; ++b) {
      if (r == 0) {  // sums of values around zero keep more digits
        const Vec shift = measure(branches.make(b, 0)).mean;
        branches.set_shift(b, Vec::fill(0) - shift);
        shift.store(work.image_moments(task) + kMoments * b * kLanes);
      }
      const Moments row = measure(branches.make(b, r));
      if (r == 0)
        total[b] = row;
      else
        total[b].join(row);
    }
  }
  for (int b = 0; b < op.branches; ++b) {
    float* to = work.image_moments(task) + kMoments * b * kLanes;
    total[b].mean.store(to + kLanes);
    total[b].deviations.store(to + 2 * kLanes);
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

// Writes the statistics and merges the branches of one vector of channels.
void merge_branches(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const BranchedDepthwise& op = work.op;
  const Lanes lanes = lanes_of_vector(op, vector);
  for (int64_t ky = 0; ky < work.kh; ++ky)
    for (int64_t kx = 0; kx < work.kw; ++kx) Vec::fill(0).store(work.tap(ky, kx, vector));
  Vec bias = Vec::fill(0);
  for (int b = 0; b < op.branches; ++b) {
    const Branch& branch = op.branch[b];
    const JointMoments moments = join_images(work, vector, b);
    moments.mean().store_first(branch.norm.mean + lanes.first, lanes.count);
    moments.variance().store_first(branch.norm.variance + lanes.first, lanes.count);

    const Vec scale = norm_scale(branch.norm, lanes).scale;
    bias = bias + (lanes_of(branch.norm.beta, lanes) - scale * moments.mean());
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
  executor.run(vectors * op.n, measure_image, &work);
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
