// depthwise_conv2d forward: act(DW(x; weight) + bias), float32.
#include "activation.h"
#include "pack.h"

namespace ffnet::FFNET_ISA {
namespace {

struct Work {
  const DepthwiseConv2d& op;
  Tiling tiling;
  ConvRow conv_row;
};

void run_task(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const DepthwiseConv2d& op = work.op;
  const int64_t outputs = op.channels * op.multiplier, o = work.tiling.vector(task) * kLanes;
  const int64_t n = work.tiling.image(task), first = work.tiling.first_row(task), last = work.tiling.last_row(task);
  const Lanes lanes{o, min_of(kLanes, outputs - o), op.multiplier};
  const Lanes out_lanes{o, lanes.count, 1};
  const int64_t kh = op.filter.kh;

  const int64_t in_first = max_of(0, first * op.stride_h - op.pad_top);
  const int64_t in_last = min_of(op.h, (last - 1) * op.stride_h - op.pad_top + kh);
  const int64_t gathered = max_of(0, in_last - in_first) * op.w * kLanes;
  const int64_t filter_floats = packed_floats(op.filter), line = op.out_w * kLanes;
  const bool direct = in_place(out_lanes, op.out_stride.c);
  const int64_t out_floats = direct ? 0 : (last - first) * line;
  Arena arena(filter_floats + out_floats + gathered + kh * Arena::kPointer);
  const PackedFilter filter = pack_filter(op.filter, o, lanes.count, static_cast<int>(op.stride_w), op.pad_left,
                                          arena.floats(filter_floats));
  float* out_rows = arena.floats(out_floats);
  const Rows input(op.x + n * op.x_stride.n, op.x_stride, op.w, lanes, in_first, in_last, arena.floats(gathered));
  const float** rows = arena.pointers(kh);
  float* out_image = op.out + n * op.out_stride.n;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t ky = 0; ky < kh; ++ky) rows[ky] = input[r * op.stride_h - op.pad_top + ky];
    const RowOutput out = direct ? RowOutput{out_image + r * op.out_stride.h + o, op.out_stride.w, op.out_w}
                                 : RowOutput{out_rows + (r - first) * line, kLanes, op.out_w};
    work.conv_row({rows, input.pixel(), op.w}, filter, out);
    activate_row(out.data, out.pixel, out.width, op.activation);
  }
  if (!direct) {
    scatter_rows(out_rows, last - first, op.out_w, out_lanes, out_image + first * op.out_stride.h, op.out_stride);
  }
}

}  // namespace

void depthwise_conv2d(const DepthwiseConv2d& op, const Executor& executor) {
  const bool gathered = op.x_stride.c != 1 || op.multiplier != 1;
  const int64_t strip = ceil_div(longest_strip(gathered, op.w, op.h, op.filter.kh), op.stride_h);
  Work work{op, tile(op.channels * op.multiplier, op.n, op.out_h, 1, strip, executor.threads),
            select_conv_row(op.filter, op.stride_w)};
  executor.run(work.tiling.tasks(), run_task, &work);
}

}  // namespace ffnet::FFNET_ISA
