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
  if (stays_in_place<T>(lanes, op.out_stride, op.out_w)) return Route::in_place;
  return op.out_stride.c == 1 ? Route::by_block : Route::by_strip;
}

// One vector of output channels of a task.
template <class T, class Taps>
struct Column {
  Lanes input_lanes, lanes;
  PackedFilter filter;
  float* gathered;
  Rows<T, Taps> input;
  Route to;
  float* lines;
  const float** in_rows;
  // Of the row being made: the filter as it lies on the rows, its output, the first input row that only the next needs.
  PackedFilter placed;
  float* out;
  const float* next;
};

// A group of vectors of channels of some images and a strip of their rows.
template <class T, class Taps>
class DepthwiseTask {
 public:
  DepthwiseTask(const DepthwiseConv2d& op, const Tiling& tiling, int64_t task)
      : op_(op),
        first_(tiling.first_row(task)),
        last_(tiling.last_row(task)),
        in_first_(max_of(0, first_ * op.stride_h - op.pad_top)),
        in_last_(min_of(op.h, (last_ - 1) * op.stride_h - op.pad_top + op.filter.kh)),
        asks_(outgrows_cache(op.n * op.channels * (op.h * op.w + op.multiplier * op.out_h * op.out_w), sizeof(T))),
        conv_row_(select_conv_row<Taps>(op.filter, op.stride_w)) {
    const int64_t outputs = op.channels * op.multiplier, o = tiling.first_channel(task);
    const int64_t filter_floats = packed_floats<Taps>(op.filter), groups = row_groups<Taps>(op.filter.kh);
    count_ = min_of(tiling.group_size, ceil_div(outputs - o, kLanes));
    int64_t floats = 0;
    for (int64_t i = 0; i < count_; ++i) {
      Column<T, Taps>& column = columns_[i];
      const int64_t c = o + i * kLanes, count = min_of(kLanes, outputs - c);
      column.input_lanes = {c, count, op.multiplier}, column.lanes = {c, count, 1};
      column.to = route<T>(column.input_lanes, op);
      floats += filter_floats + groups * Arena::kPointer + input_floats(column) + line_floats(column);
    }
    Arena arena(floats);
    for (int64_t i = 0; i < count_; ++i) {
      Column<T, Taps>& column = columns_[i];
      column.filter = pack_filter<T, Taps>(op.filter, column.lanes.first, column.lanes.count, op.stride_w, op.pad_left,
                                           arena.floats(filter_floats));
      column.gathered = arena.floats(input_floats(column));
      column.lines = arena.floats(line_floats(column));
      column.in_rows = arena.pointers(groups);
    }
  }

  bool run(int64_t n) {
    const T* image = static_cast<const T*>(op_.x) + n * op_.x_stride.n;
    for (int64_t i = 0; i < count_; ++i) {
      Column<T, Taps>& column = columns_[i];
      column.input = Rows<T, Taps>(image, op_.x_stride, op_.h, op_.w, column.input_lanes, in_first_, in_last_,
                                   op_.filter.kh, column.gathered);
    }
    NanSensor sensor;
    T* out_image = static_cast<T*>(op_.out) + n * op_.out_stride.n;
    for (int64_t r = first_; r < last_; ++r) {
      T* out_row = out_image + r * op_.out_stride.h;
      for (int64_t i = 0; i < count_; ++i) place(columns_[i], r, out_row);
      for (int64_t block = 0; block < op_.out_w; block += kMaxBlock)
        for (int64_t i = 0; i < count_; ++i)
          make_block(columns_[i], block, min_of(block + kMaxBlock, op_.out_w), out_row, sensor);
    }
    for (int64_t i = 0; i < count_; ++i)
      if (columns_[i].to == Route::by_strip)
        scatter_rows(columns_[i].lines, last_ - first_, op_.out_w, columns_[i].lanes,
                     out_image + first_ * op_.out_stride.h, op_.out_stride);
    return sensor.alarmed();
  }

 private:
  int64_t line() const { return op_.out_w * kLanes; }
  int64_t input_floats(const Column<T, Taps>& column) const {
    return Rows<T, Taps>::scratch_floats(op_.x_stride, op_.w, column.input_lanes, in_first_, in_last_, op_.filter.kh);
  }
  int64_t line_floats(const Column<T, Taps>& column) const {
    return column.to == Route::in_place   ? 0
           : column.to == Route::by_block ? kMaxBlock * kLanes
                                          : (last_ - first_) * line();
  }

  void place(Column<T, Taps>& column, int64_t r, T* out_row) const {
    const int64_t top = r * op_.stride_h - op_.pad_top;
    column.placed = column.input.window(top, column.filter, column.in_rows);
    column.next = stays_in_place<T>(column.input_lanes, op_.x_stride, op_.w)
                      ? column.input[top + op_.stride_h + op_.filter.kh - 1]
                      : nullptr;
    column.out = column.to == Route::in_place   ? reinterpret_cast<float*>(out_row + column.lanes.first)
                 : column.to == Route::by_block ? column.lines
                                                : column.lines + (r - first_) * line();
  }

  void make_block(const Column<T, Taps>& column, int64_t first, int64_t end, T* out_row, NanSensor& sensor) const {
    const int64_t pixel = column.to == Route::in_place ? op_.out_stride.w : kLanes;
    float* out = column.to == Route::by_block ? column.out - first * pixel : column.out;
    prefetch_row(column.next, column.input.pixel(), first * op_.stride_w, min_of(end * op_.stride_w, op_.w));
    if (asks_ && column.to != Route::by_strip) prefetch_row(out_row + column.lanes.first, op_.out_stride.w, first, end);
    conv_row_({column.in_rows, column.input.pixel(), op_.w}, column.placed, {out, pixel, first, end});
    if constexpr (Taps::rows > 1) sensor.see_row(out + first * pixel, pixel, end - first);
    if (column.to == Route::by_block && column.lanes.count == kLanes) {
      T* to = out_row + column.lanes.first;
      with_activation(op_.activation, [&](auto act) {
        for (int64_t i = first; i < end; ++i) store(act(Vec::load(out + i * pixel)), to + i * op_.out_stride.w);
      });
      return;
    }
    activate_row(out + first * pixel, pixel, end - first, op_.activation);
    if (column.to == Route::by_block)
      scatter_row(column.lines, end - first, column.lanes, out_row + first * op_.out_stride.w, 1, op_.out_stride.w);
  }

  const DepthwiseConv2d& op_;
  int64_t first_, last_, in_first_, in_last_, count_;
  bool asks_;  // for lines ahead of their use
  ConvRow conv_row_;
  Column<T, Taps> columns_[kMaxGroup];
};

}  // namespace

void depthwise_conv2d(const DepthwiseConv2d& op, const Executor& executor) {
  const bool planes = op.x_stride.c != 1;
  const int64_t strip = ceil_div(longest_strip(planes, op.w, op.h, op.filter.kh), op.stride_h);
  const int64_t vectors = ceil_div(op.channels * op.multiplier, kLanes);
  const int64_t group = planes ? 1 : group_size(op.storage, op.channels * op.h * op.w, op.filter.kh, op.w, vectors);
  const Tiling tiling = tile(vectors, group, op.n, op.out_h, 1, strip, executor.threads);
  run_storage<DepthwiseTask>(op, share_filters(tiling, op.out_w, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
