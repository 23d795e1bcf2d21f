// ffnified_attention forward: residual + scale * (DW(act(DW(query; key)); value)).
//
// Rows are rolling: the first convolution computes one row of the middle map, the second one uses its latest rows. Only
// as many middle rows exist as the second filter is tall, in a ring that stays in L1.
#include "activation.h"
#include "retry.h"

namespace ffnet::FFNET_ISA {
namespace {

// The latest rows of the middle map, in the form that the second convolution reads.
template <class Taps>
class Ring {
 public:
  static int64_t floats(int64_t kh, int64_t line) { return (row_groups<Taps>(kh) + (Taps::rows > 1)) * line; }

  Ring(float* data, int64_t kh, int64_t height, int64_t line)
      : data_(data), groups_(row_groups<Taps>(kh) + (Taps::rows > 1)), height_(height), line_(line) {}
  void clear() const {
    // Rows that a window covers before they are computed are multiplied by zero, so they must hold finite numbers.
    for (int64_t i = 0; Taps::rows > 1 && i < groups_ * line_; i += kLanes) Vec::fill(0).store(data_ + i);
  }
  // Where row r is computed.
  float* row(int64_t r) const { return Taps::rows > 1 ? data_ + (groups_ - 1) * line_ : at(r); }
  // Applies the activation to row r, which has been computed, and stores it in the ring.
  void close(int64_t r, Activation activation) const {
    if constexpr (Taps::rows == 1) {
      activate_row(row(r), kLanes, line_ / kLanes, activation);
    } else {
#if defined(__AVX512BF16__)
      const float* made = row(r);
      float* pairs = data_ + r / 2 % (groups_ - 1) * line_;
      with_activation(activation, [&](auto act) {
        if (r % 2 == 0) {
          for (int64_t i = 0; i < line_; i += kLanes) low_half(act(Vec::load(made + i))).store(pairs + i);
        } else {
          for (int64_t i = 0; i < line_; i += kLanes)
            with_high_half(Vec::load(pairs + i), act(Vec::load(made + i))).store(pairs + i);
        }
      });
#endif
    }
  }
  PackedFilter window(int64_t top, const PackedFilter& filter, const float** rows) const {
    const int64_t group = floor_div(top, Taps::rows);
    for (int64_t g = group; g < group + filter.kh; ++g)
      rows[g - group] = g >= 0 && g * Taps::rows < height_ ? at(g) : nullptr;
    return filter.starting_at(top - group * Taps::rows);
  }

 private:
  float* at(int64_t group) const { return data_ + group % (groups_ - (Taps::rows > 1)) * line_; }

  float* data_;
  int64_t groups_, height_, line_;
};

// residual + scale * value for one row; the residual may be null.
template <class T, class R>
void finish_row(const float* value, int64_t pixel, int64_t width, Vec scale, const R* residual, int64_t residual_pixel,
                T* out, int64_t out_pixel) {
  if (!residual) {
    for (int64_t i = 0; i < width; ++i) store(Vec::load(value + i * pixel) * scale, out + i * out_pixel);
    return;
  }
  for (int64_t i = 0; i < width; ++i)
    store(fma(Vec::load(value + i * pixel), scale, load(residual + i * residual_pixel)), out + i * out_pixel);
}

// A group of vectors of channels, one after the other, of some images and a strip of their rows.
template <class T, class Taps>
class AttentionTask {
 public:
  AttentionTask(const FfnifiedAttention& op, const Tiling& tiling, int64_t task)
      : op_(op),
        first_(tiling.first_row(task)),
        last_(tiling.last_row(task)),
        line_(op.w * kLanes),
        // Middle rows this strip needs, and the query rows those need. A group of middle rows starts at its first.
        mid_first_(max_of(0, first_ - op.value_pad_top) / Taps::rows * Taps::rows),
        in_first_(max_of(0, mid_first_ - op.key_pad_top)),
        in_last_(
            min_of(op.h, min_of(op.h, last_ - op.value_pad_top + op.value.kh - 1) - op.key_pad_top + op.key.kh - 1)),
        asks_(outgrows_cache((op.residual ? 3 : 2) * op.n * op.channels * op.h * op.w, sizeof(T))) {
    const int64_t first_channel = tiling.first_channel(task);
    count_ = min_of(tiling.group_size, ceil_div(op.channels - first_channel, kLanes));
    const int64_t key_floats = packed_floats<Taps>(op.key), value_floats = packed_floats<Taps>(op.value);
    const int64_t groups1 = row_groups<Taps>(op.key.kh), groups2 = row_groups<Taps>(op.value.kh);
    const int64_t ring_floats = Ring<Taps>::floats(op.value.kh, line_);
    int64_t out_floats = 0, gathered_floats = 0;
    for (int64_t i = 0; i < count_; ++i) {
      Column& column = columns_[i];
      const int64_t c = first_channel + i * kLanes;
      column.lanes = {c, min_of(kLanes, op.channels - c), 1};
      column.to = route(column.lanes);
      const int64_t lines = column.to == Route::in_place ? 0 : column.to == Route::by_row ? 1 : last_ - first_;
      out_floats = max_of(out_floats, lines * line_);
      gathered_floats = max_of(gathered_floats, this->gathered_floats(column));
    }
    Arena arena(count_ * (key_floats + value_floats) + ring_floats + line_ + out_floats + gathered_floats +
                (groups1 + groups2) * Arena::kPointer);
    for (int64_t i = 0; i < count_; ++i) {
      Column& column = columns_[i];
      const Lanes& lanes = column.lanes;
      column.key = pack_filter<T, Taps>(op.key, lanes.first, lanes.count, 1, op.key_pad_left, arena.floats(key_floats));
      column.value =
          pack_filter<T, Taps>(op.value, lanes.first, lanes.count, 1, op.value_pad_left, arena.floats(value_floats));
      column.scale = op.scale ? Vec::load_first(op.scale + lanes.first, lanes.count) : Vec::fill(1);
    }
    ring_floats_ = arena.floats(ring_floats);
    out_lines_ = arena.floats(out_floats);
    residual_line_ = arena.floats(line_);
    gathered_ = arena.floats(gathered_floats);
    key_rows_ = arena.pointers(groups1), value_rows_ = arena.pointers(groups2);
    conv_key_ = select_conv_row<Taps>(op.key, 1), conv_value_ = select_conv_row<Taps>(op.value, 1);
  }

  bool run(int64_t n) {
    NanSensor sensor;
    for (int64_t i = 0; i < count_; ++i) make(columns_[i], n, sensor);
    return sensor.alarmed();
  }

 private:
  // Where the result's rows are computed: in place, in one line, or all in scratch, for partial vectors and other
  // layouts.
  enum class Route { in_place, by_row, by_strip };

  struct Column {
    Lanes lanes;
    Route to;
    PackedFilter key, value;
    Vec scale;
  };

  Route route(const Lanes& lanes) const {
    if (stays_in_place<T>(lanes, op_.out_stride, op_.w)) return Route::in_place;
    return op_.out_stride.c == 1 && lanes.count == kLanes ? Route::by_row : Route::by_strip;
  }
  int64_t gathered_floats(const Column& column) const {
    return Rows<T, Taps>::scratch_floats(op_.query_stride, op_.w, column.lanes, in_first_, in_last_, op_.key.kh);
  }

  void make(const Column& column, int64_t n, NanSensor& sensor) const {
    Rows<T, Taps> query(static_cast<const T*>(op_.query) + n * op_.query_stride.n, op_.query_stride, op_.h, op_.w,
                        column.lanes, in_first_, in_last_, op_.key.kh, gathered_);
    const bool used_in_place = gathered_floats(column) == 0;
    const Ring<Taps> ring(ring_floats_, op_.value.kh, op_.h, line_);
    ring.clear();
    int64_t made = mid_first_;  // middle rows [mid_first_, made) have been computed
    for (int64_t r = first_; r < last_; ++r) {
      for (const int64_t need = min_of(op_.h, r - op_.value_pad_top + op_.value.kh); made < need; ++made) {
        const PackedFilter placed = query.window(made - op_.key_pad_top, column.key, key_rows_);
        if (used_in_place) prefetch_row(query[made + 1 - op_.key_pad_top + op_.key.kh - 1], query.pixel(), 0, op_.w);
        conv_key_({key_rows_, query.pixel(), op_.w}, placed, {ring.row(made), kLanes, 0, op_.w});
        ring.close(made, op_.activation);
      }
      make_row(column, n, r, ring, sensor);
    }
    if (column.to == Route::by_strip)
      scatter_rows(out_lines_, last_ - first_, op_.w, column.lanes, out_row(n, first_), op_.out_stride);
  }

  T* out_row(int64_t n, int64_t r) const {
    return static_cast<T*>(op_.out) + n * op_.out_stride.n + r * op_.out_stride.h;
  }

  void make_row(const Column& column, int64_t n, int64_t r, const Ring<Taps>& ring, NanSensor& sensor) const {
    const int64_t c = column.lanes.first, width = op_.w;
    const PackedFilter placed = ring.window(r - op_.value_pad_top, column.value, value_rows_);
    const T* residual = nullptr;
    if (op_.residual)
      residual = static_cast<const T*>(op_.residual) + n * op_.residual_stride.n + r * op_.residual_stride.h;
    const bool whole_residual = residual && op_.residual_stride.c == 1 && column.lanes.count == kLanes;
    float* value = column.to == Route::by_strip ? out_lines_ + (r - first_) * line_ : out_lines_;
    int64_t pixel = kLanes;
    if (column.to == Route::in_place) {
      value = reinterpret_cast<float*>(out_row(n, r) + c), pixel = op_.out_stride.w;
      if (whole_residual) prefetch_row(reinterpret_cast<const float*>(residual + c), op_.residual_stride.w, 0, width);
    }
    if (asks_ && column.to != Route::by_strip) prefetch_row(out_row(n, r) + c, op_.out_stride.w, 0, width);
    conv_value_({value_rows_, kLanes, width}, placed, {value, pixel, 0, width});
    if constexpr (Taps::rows > 1) sensor.see_row(value, pixel, width);

    const auto finish = [&](const auto* base, int64_t base_pixel) {
      if (column.to == Route::by_row)
        finish_row(value, pixel, width, column.scale, base, base_pixel, out_row(n, r) + c, op_.out_stride.w);
      else if (base || op_.scale)
        finish_row(value, pixel, width, column.scale, base, base_pixel, value, pixel);
    };
    if (!residual || whole_residual) return finish(residual ? residual + c : nullptr, op_.residual_stride.w);
    gather_row(Elements<T>{residual}, op_.residual_stride.c, op_.residual_stride.w, width, column.lanes,
               residual_line_);
    finish(static_cast<const float*>(residual_line_), kLanes);
  }

  const FfnifiedAttention& op_;
  int64_t first_, last_, line_, mid_first_, in_first_, in_last_, count_;
  bool asks_;  // for lines ahead of their use
  float *ring_floats_, *out_lines_, *residual_line_, *gathered_;
  const float **key_rows_, **value_rows_;
  ConvRow conv_key_, conv_value_;
  Column columns_[kMaxGroup];
};

}  // namespace

void ffnified_attention(const FfnifiedAttention& op, const Executor& executor) {
  const int64_t halo = max_of(1, op.value.kh / 2);  // recomputed rows of the middle map are half the work of a row
  const int64_t strip = longest_strip(op.query_stride.c != 1, op.w, op.h, op.key.kh + op.value.kh);
  const int64_t vectors = ceil_div(op.channels, kLanes);
  const int64_t group = op.query_stride.c == 1 ? min_of(vectors_in_line(op.storage), vectors) : 1;
  const Tiling tiling = tile(vectors, group, op.n, op.h, halo, strip, executor.threads);
  run_storage<AttentionTask>(op, share_filters(tiling, op.w, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
