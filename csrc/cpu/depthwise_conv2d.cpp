// depthwise_conv2d forward: act(DW(x; weight) + bias).
#include "activation.h"
#include "retry.h"

namespace ffnet::FFNET_ISA {
namespace {

// Where the rows of one vector of output channels go.
enum class Route {
  in_place,  // convolved where they belong
  by_block,  // through a block of pixels in L1
  by_strip,  // all rows of the task, then transposed together
};

// Output channels are one a lane, whatever the input's are.
template <class T>
Route route(const Lanes& lanes, const DepthwiseConv2d& op) {
  if (in_place<T>(lanes, op.out_stride.c)) return Route::in_place;
  return op.out_stride.c == 1 ? Route::by_block : Route::by_strip;
}

// One vector of output channels of a task.
template <class T, class Taps>
struct Column {
  Lanes lanes;
  PackedFilter filter;
  Rows<T, Taps> input;
  Route to;
  float* lines;
  const float** in_rows;
  // Of the row being made: the filter as it lies on the rows, its output, the first input row that only the next needs.
  PackedFilter placed;
  float* out;
  const float* next;
};

struct Run {
  template <class T, class Taps>
  static bool task(const DepthwiseConv2d& op, const Tiling& tiling, int64_t task);
};

template <class T, class Taps>
bool Run::task(const DepthwiseConv2d& op, const Tiling& tiling, int64_t task) {
  const int64_t outputs = op.channels * op.multiplier, o = tiling.first_channel(task), n = tiling.image(task);
  const int64_t first = tiling.first_row(task), last = tiling.last_row(task), kh = op.filter.kh;
  const int64_t count = min_of(tiling.group_size, ceil_div(outputs - o, kLanes));
  const int64_t in_first = max_of(0, first * op.stride_h - op.pad_top);
  const int64_t in_last = min_of(op.h, (last - 1) * op.stride_h - op.pad_top + kh);
  const int64_t filter_floats = packed_floats<Taps>(op.filter), line = op.out_w * kLanes;
  const int64_t groups = row_groups<Taps>(kh);
  const auto lanes_of = [&](int64_t i) {
    const int64_t c = o + i * kLanes;
    return Lanes{c, min_of(kLanes, outputs - c), op.multiplier};
  };
  const auto input_floats = [&](const Lanes& lanes) {
    return Rows<T, Taps>::scratch_floats(op.x_stride, op.w, lanes, in_first, in_last);
  };
  const auto line_floats = [&](Route to) {
    return to == Route::in_place ? 0 : to == Route::by_block ? kMaxBlock * kLanes : (last - first) * line;
  };
  int64_t floats = count * (filter_floats + groups * Arena::kPointer);
  for (int64_t i = 0; i < count; ++i) floats += input_floats(lanes_of(i)) + line_floats(route<T>(lanes_of(i), op));
  Arena arena(floats);
  const T* image = static_cast<const T*>(op.x) + n * op.x_stride.n;
  T* out_image = static_cast<T*>(op.out) + n * op.out_stride.n;

  Column<T, Taps> columns[kMaxGroup];
  for (int64_t i = 0; i < count; ++i) {
    const Lanes lanes = lanes_of(i);
    Column<T, Taps>& column = columns[i];
    column.lanes = {lanes.first, lanes.count, 1};
    column.filter = pack_filter<T, Taps>(op.filter, lanes.first, lanes.count, op.stride_w, op.pad_left,
                                         arena.floats(filter_floats));
    column.input =
        Rows<T, Taps>(image, op.x_stride, op.h, op.w, lanes, in_first, in_last, arena.floats(input_floats(lanes)));
    column.to = route<T>(lanes, op);
    column.lines = arena.floats(line_floats(column.to));
    column.in_rows = arena.pointers(groups);
  }
  const ConvRow conv_row = select_conv_row<Taps>(op.filter, op.stride_w);
  NanSensor sensor;
  for (int64_t r = first; r < last; ++r) {
    T* out_row = out_image + r * op.out_stride.h;
    for (int64_t i = 0; i < count; ++i) {
      Column<T, Taps>& column = columns[i];
      const int64_t top = r * op.stride_h - op.pad_top;
      column.placed = column.input.window(top, column.filter, column.in_rows);
      column.next = in_place<T>(column.lanes, op.x_stride.c) ? column.input[top + op.stride_h + kh - 1] : nullptr;
      column.out = column.to == Route::in_place   ? reinterpret_cast<float*>(out_row + column.lanes.first)
                   : column.to == Route::by_block ? column.lines
                                                  : column.lines + (r - first) * line;
    }
    for (int64_t block = 0; block < op.out_w; block += kMaxBlock) {
      const int64_t end = min_of(block + kMaxBlock, op.out_w);
      for (int64_t i = 0; i < count; ++i) {
        const Column<T, Taps>& column = columns[i];
        const int64_t pixel = column.to == Route::in_place ? op.out_stride.w : kLanes;
        float* out = column.to == Route::by_block ? column.out - block * pixel : column.out;
        prefetch_row(column.next, column.input.pixel(), block * op.stride_w, min_of(end * op.stride_w, op.w));
        conv_row({column.in_rows, column.input.pixel(), op.w}, column.placed, {out, pixel, block, end});
        activate_row(out + block * pixel, pixel, end - block, op.activation);
        if constexpr (Taps::rows > 1)
          for (int64_t j = block; j < end; ++j) sensor.see(Vec::load(out + j * pixel));
        if (column.to == Route::by_block)
          scatter_row(column.lines, end - block, column.lanes, out_row + block * op.out_stride.w, 1, op.out_stride.w);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i)
    if (columns[i].to == Route::by_strip)
      scatter_rows(columns[i].lines, last - first, op.out_w, columns[i].lanes, out_image + first * op.out_stride.h,
                   op.out_stride);
  return sensor.alarmed();
}

}  // namespace

void depthwise_conv2d(const DepthwiseConv2d& op, const Executor& executor) {
  const bool gathered = op.x_stride.c != 1 || op.multiplier != 1 || op.storage != Storage::float32;
  const bool partial = op.channels * op.multiplier % kLanes != 0;  // the last vector is gathered whatever the layout
  const int64_t strip = ceil_div(longest_strip(gathered || partial, op.w, op.h, op.filter.kh), op.stride_h);
  const int64_t vectors = ceil_div(op.channels * op.multiplier, kLanes);
  // Two vectors of a 16-bit channels-last map share a cache line.
  const bool shared_lines = op.x_stride.c == 1 && op.storage != Storage::float32;
  const int64_t group = shared_lines ? min_of(2, vectors) : group_size(gathered, op.filter.kh * op.w * kLanes, vectors);
  run_storage<Run>(op, tile(vectors, group, op.n, op.out_h, 1, strip, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
