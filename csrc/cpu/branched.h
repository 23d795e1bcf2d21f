// Shared by the forward and backward pass of a branched depthwise layer.
#pragma once

#include "norm.h"
#include "row_ring.h"
#include "rows.h"

namespace ffnet::FFNET_ISA {

FFNET_INLINE int64_t pad_top(const Branch& branch) { return branch.filter.kh / 2; }
FFNET_INLINE int64_t pad_left(const Branch& branch) { return branch.filter.kw / 2; }

// A task's branch filters, the rows of x that they read, and a line of output for each.
class BranchRows {
 public:
  BranchRows(const BranchedDepthwise& op, int64_t capacity) : op_(op) {
    int64_t before = 0, after = 0;
    for (int b = 0; b < op.branches; ++b) {
      const Branch& branch = op.branch[b];
      before = max_of(before, pad_top(branch));
      after = max_of(after, (op.out_h - 1) * op.stride_h - pad_top(branch) + branch.filter.kh - op.h);
    }
    x_ = RowRing(op.h, op.w, capacity, before, after);
  }
  int64_t scratch_floats() const {
    int64_t floats = x_.scratch_floats();
    for (int b = 0; b < op_.branches; ++b)
      floats += packed_floats<FloatTaps>(op_.branch[b].filter) + op_.out_w * kLanes;
    return floats;
  }
  template <class T>
  void place(Arena& arena, const Lanes& lanes) {
    x_.place(arena);
    for (int b = 0; b < op_.branches; ++b) {
      const Branch& branch = op_.branch[b];
      float* packed = arena.floats(packed_floats<FloatTaps>(branch.filter));
      filter_[b] =
          pack_filter<T, FloatTaps>(branch.filter, lanes.first, lanes.count, op_.stride_w, pad_left(branch), packed);
      bias_[b] = packed + branch.filter.kh * branch.filter.kw * kLanes;
      conv_row_[b] = select_conv_row<FloatTaps>(branch.filter, op_.stride_w);
      line_[b] = arena.floats(op_.out_w * kLanes);
    }
  }
  RowRing& x() { return x_; }
  // From now on `shift` is added to the outputs of a branch.
  void set_shift(int b, Vec shift) { shift.store(bias_[b]); }
  // Computes row r of a branch's convolution.
  const float* make(int b, int64_t r) {
    const float* const* rows = x_.window(r * op_.stride_h - pad_top(op_.branch[b]));
    conv_row_[b]({rows, kLanes, op_.w}, filter_[b], {line_[b], kLanes, 0, op_.out_w});
    return line_[b];
  }

 private:
  const BranchedDepthwise& op_;
  RowRing x_;
  PackedFilter filter_[kMaxBranches];
  ConvRow conv_row_[kMaxBranches];
  float *bias_[kMaxBranches], *line_[kMaxBranches];
};

}  // namespace ffnet::FFNET_ISA
