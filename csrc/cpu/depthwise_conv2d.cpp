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

// One vector of output channels of a task.
struct Column {
  Lanes lanes;
  PackedFilter filter;
  Rows input;
  bool direct;  // output rows are written in place, else into out_rows and scattered at the end
  float* out_rows;
  // Of the row being made: its output, the first input row that only the next one needs, the input rows.
  float* out;
  const float* next;
  const float** in_rows;
};

// Output channels are one a lane, whatever the input's are.
bool writes_in_place(const Lanes& lanes, const DepthwiseConv2d& op) {
  return in_place({lanes.first, lanes.count, 1}, op.out_stride.c);
}

void run_task(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const DepthwiseConv2d& op = work.op;
  const int64_t outputs = op.channels * op.multiplier, o = work.tiling.first_channel(task);
  const int64_t n = work.tiling.image(task), first = work.tiling.first_row(task), last = work.tiling.last_row(task);
  const int64_t count = min_of(work.tiling.group_size, ceil_div(outputs - o, kLanes)), kh = op.filter.kh;

  const int64_t in_first = max_of(0, first * op.stride_h - op.pad_top);
  const int64_t in_last = min_of(op.h, (last - 1) * op.stride_h - op.pad_top + kh);
  const int64_t gathered = max_of(0, in_last - in_first) * op.w * kLanes;
  const int64_t filter_floats = packed_floats(op.filter), line = op.out_w * kLanes, out_floats = (last - first) * line;
  const auto lanes_of = [&](int64_t i) {
    const int64_t c = o + i * kLanes;
    return Lanes{c, min_of(kLanes, outputs - c), op.multiplier};
  };
  int64_t floats = count * (filter_floats + kh * Arena::kPointer);
  for (int64_t i = 0; i < count; ++i)
    floats += (in_place(lanes_of(i), op.x_stride.c) ? 0 : gathered) + (writes_in_place(lanes_of(i), op) ? 0 : out_floats);
  Arena arena(floats);
  Column columns[kMaxGroup];
  for (int64_t i = 0; i < count; ++i) {
    const Lanes lanes = lanes_of(i);
    const PackedFilter filter = pack_filter(op.filter, lanes.first, lanes.count, op.stride_w, op.pad_left,
                                            arena.floats(filter_floats));
    float* scratch = arena.floats(in_place(lanes, op.x_stride.c) ? 0 : gathered);
    const Rows input(op.x + n * op.x_stride.n, op.x_stride, op.w, lanes, in_first, in_last, scratch);
    const bool direct = writes_in_place(lanes, op);
    float* out_rows = arena.floats(direct ? 0 : out_floats);
    columns[i] = {{lanes.first, lanes.count, 1}, filter, input, direct, out_rows, nullptr, nullptr, arena.pointers(kh)};
  }
  float* out_image = op.out + n * op.out_stride.n;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t i = 0; i < count; ++i) {
      Column& column = columns[i];
      const int64_t top = r * op.stride_h - op.pad_top;
      for (int64_t ky = 0; ky < kh; ++ky) column.in_rows[ky] = column.input[top + ky];
      column.next = column.input[top + op.stride_h + kh - 1];
      column.out = column.direct ? out_image + r * op.out_stride.h + column.lanes.first
                                 : column.out_rows + (r - first) * line;
    }
    for (int64_t block = 0; block < op.out_w; block += kMaxBlock) {
      const int64_t end = min_of(block + kMaxBlock, op.out_w);
      for (int64_t i = 0; i < count; ++i) {
        const Column& column = columns[i];
        const int64_t pixel = column.direct ? op.out_stride.w : kLanes;
        prefetch_row(column.next, column.input.pixel(), block * op.stride_w, min_of(end * op.stride_w, op.w));
        work.conv_row({column.in_rows, column.input.pixel(), op.w}, column.filter, {column.out, pixel, block, end});
        activate_row(column.out + block * pixel, pixel, end - block, op.activation);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Column& column = columns[i];
    if (!column.direct)
      scatter_rows(column.out_rows, last - first, op.out_w, column.lanes, out_image + first * op.out_stride.h,
                   op.out_stride);
  }
}

}  // namespace

void depthwise_conv2d(const DepthwiseConv2d& op, const Executor& executor) {
  const bool gathered = op.x_stride.c != 1 || op.multiplier != 1;
  const bool partial = op.channels * op.multiplier % kLanes != 0;  // the last vector is gathered whatever the layout
  const int64_t strip = ceil_div(longest_strip(gathered || partial, op.w, op.h, op.filter.kh), op.stride_h);
  const int64_t vectors = ceil_div(op.channels * op.multiplier, kLanes);
  const int64_t group = group_size(gathered, op.filter.kh * op.w * kLanes, vectors);
  Work work{op, tile(vectors, group, op.n, op.out_h, 1, strip, executor.threads),
            select_conv_row(op.filter, op.stride_w)};
  executor.run(work.tiling.tasks(), run_task, &work);
}

}  // namespace ffnet::FFNET_ISA
