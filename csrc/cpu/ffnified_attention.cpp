// ffnified_attention forward: residual + scale * (DW(act(DW(query; key)); value)).
//
// Rows are rolled: conv1 makes one row of the middle map, conv2 uses the last rows of it. Only as many middle rows as
// the second filter is tall ever exist, in a ring that stays in L1.
#include "activation.h"
#include "retry.h"

namespace ffnet::FFNET_ISA {
namespace {

// The last rows of the middle map, in the form in which the second convolution takes them.
template <class Taps>
class Ring {
 public:
  static int64_t floats(int64_t kh, int64_t line) { return (row_groups<Taps>(kh) + (Taps::rows > 1)) * line; }

  Ring(float* data, int64_t kh, int64_t height, int64_t line)
      : data_(data), groups_(row_groups<Taps>(kh) + (Taps::rows > 1)), height_(height), line_(line) {
    // What a window reaches before it is made is multiplied by zero: it must be a number.
    for (int64_t i = 0; Taps::rows > 1 && i < groups_ * line; ++i) data[i] = 0;
  }
  // Where row r is made.
  float* row(int64_t r) const { return Taps::rows > 1 ? data_ + (groups_ - 1) * line_ : at(r); }
  // Takes over row r when it has been made.
  void close(int64_t r) const {
    (void)r;
#if defined(__AVX512BF16__)
    if constexpr (Taps::rows > 1) {
      const float* made = row(r);
      float* pairs = data_ + r / 2 % (groups_ - 1) * line_;
      const bool upper = r % 2;
      for (int64_t i = 0; i < line_; i += kLanes) {
        const __m256i bits = narrow(Vec::load(made + i), BFloat16());
        const __m256i none = _mm256_setzero_si256();
        const Vec pair = upper ? interleave(none, bits) : interleave(bits, none);
        const Vec below = upper ? Vec::load(pairs + i) : Vec::fill(0);
        Vec{_mm512_or_ps(below.v, pair.v)}.store(pairs + i);
      }
    }
#endif
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

struct Run {
  template <class T, class Taps>
  static bool task(const FfnifiedAttention& op, const Tiling& tiling, int64_t task);
};

// residual + scale * value for one row, back into `value`; either may be missing.
template <class T>
void finish_row(float* value, int64_t pixel, int64_t width, Vec scale, const T* residual, int64_t residual_pixel,
                const float* residual_line) {
  for (int64_t i = 0; i < width; ++i, value += pixel) {
    const Vec base = residual        ? load(residual + i * residual_pixel)
                     : residual_line ? Vec::load(residual_line + i * kLanes)
                                     : Vec::fill(0);
    fma(Vec::load(value), scale, base).store(value);
  }
}

template <class T, class Taps>
bool Run::task(const FfnifiedAttention& op, const Tiling& tiling, int64_t task) {
  const int64_t c = tiling.first_channel(task), n = tiling.image(task);
  const int64_t first = tiling.first_row(task), last = tiling.last_row(task);
  const Lanes lanes{c, min_of(kLanes, op.channels - c), 1};
  const int64_t kh1 = op.key.kh, kh2 = op.value.kh, line = op.w * kLanes;

  // Middle rows this strip needs, and the query rows those need. A group of middle rows starts at its first.
  const int64_t mid_first = max_of(0, first - op.value_pad_top) / Taps::rows * Taps::rows;
  const int64_t mid_last = min_of(op.h, last - op.value_pad_top + kh2 - 1);
  const int64_t in_first = max_of(0, mid_first - op.key_pad_top),
                in_last = min_of(op.h, mid_last - op.key_pad_top + kh1 - 1);
  const bool direct = in_place<T>(lanes, op.out_stride.c), by_row = !direct && op.out_stride.c == 1;
  const bool whole_residual = op.residual_stride.c == 1 && lanes.count == kLanes;
  const int64_t gathered = Rows<T, Taps>::scratch_floats(op.query_stride, op.w, lanes, in_first, in_last);
  const int64_t out_floats = direct ? 0 : by_row ? line : (last - first) * line;
  const int64_t key_floats = packed_floats<Taps>(op.key), value_floats = packed_floats<Taps>(op.value);
  const int64_t groups1 = row_groups<Taps>(kh1), groups2 = row_groups<Taps>(kh2);
  Arena arena(key_floats + value_floats + Ring<Taps>::floats(kh2, line) + line + out_floats + kLanes + gathered +
              (groups1 + groups2) * Arena::kPointer);
  const PackedFilter key = pack_filter<T, Taps>(op.key, c, lanes.count, 1, op.key_pad_left, arena.floats(key_floats));
  const PackedFilter value =
      pack_filter<T, Taps>(op.value, c, lanes.count, 1, op.value_pad_left, arena.floats(value_floats));
  const Ring<Taps> ring(arena.floats(Ring<Taps>::floats(kh2, line)), kh2, op.h, line);
  float* out_rows = arena.floats(out_floats);
  float* residual_line = arena.floats(line);
  float* scale = arena.floats(kLanes);
  for (int64_t l = 0; l < kLanes; ++l) scale[l] = op.scale && l < lanes.count ? op.scale[c + l] : 1;
  const Rows<T, Taps> query(static_cast<const T*>(op.query) + n * op.query_stride.n, op.query_stride, op.h, op.w, lanes,
                            in_first, in_last, arena.floats(gathered));
  const float** key_rows = arena.pointers(groups1);
  const float** value_rows = arena.pointers(groups2);
  const ConvRow conv_key = select_conv_row<Taps>(op.key, 1), conv_value = select_conv_row<Taps>(op.value, 1);
  T* out_image = static_cast<T*>(op.out) + n * op.out_stride.n;

  NanSensor sensor;
  int64_t made = mid_first;  // middle rows [mid_first, made) have been computed
  for (int64_t r = first; r < last; ++r) {
    for (const int64_t need = min_of(op.h, r - op.value_pad_top + kh2); made < need; ++made) {
      const PackedFilter placed = query.window(made - op.key_pad_top, key, key_rows);
      if (gathered == 0) prefetch_row(query[made + 1 - op.key_pad_top + kh1 - 1], query.pixel(), 0, op.w);
      const RowOutput middle{ring.row(made), kLanes, 0, op.w};
      conv_key({key_rows, query.pixel(), op.w}, placed, middle);
      activate_row(middle.data, kLanes, op.w, op.activation);
      ring.close(made);
    }
    const PackedFilter placed = ring.window(r - op.value_pad_top, value, value_rows);
    T* out_row = out_image + r * op.out_stride.h;
    const RowOutput out = direct ? RowOutput{reinterpret_cast<float*>(out_row + c), op.out_stride.w, 0, op.w}
                                 : RowOutput{by_row ? out_rows : out_rows + (r - first) * line, kLanes, 0, op.w};
    const T* from = op.residual
                        ? static_cast<const T*>(op.residual) + n * op.residual_stride.n + r * op.residual_stride.h
                        : nullptr;
    if (from && whole_residual && direct)
      prefetch_row(reinterpret_cast<const float*>(from + c), op.residual_stride.w, 0, op.w);
    conv_value({value_rows, kLanes, op.w}, placed, out);
    if (from && !whole_residual)
      gather_row(Elements<T>{from}, op.residual_stride.c, op.residual_stride.w, op.w, lanes, residual_line);
    if (from || op.scale)
      finish_row(out.data, out.pixel, op.w, Vec::load(scale), from && whole_residual ? from + c : nullptr,
                 op.residual_stride.w, from ? residual_line : nullptr);
    if constexpr (Taps::rows > 1)
      for (int64_t i = 0; i < op.w; ++i) sensor.see(Vec::load(out.data + i * out.pixel));
    if (by_row) scatter_row(out_rows, op.w, lanes, out_row, 1, op.out_stride.w);
  }
  if (!direct && !by_row)
    scatter_rows(out_rows, last - first, op.w, lanes, out_image + first * op.out_stride.h, op.out_stride);
  return sensor.alarmed();
}

}  // namespace

void ffnified_attention(const FfnifiedAttention& op, const Executor& executor) {
  const int64_t halo = max_of(1, op.value.kh / 2);  // recomputed rows of the middle map are half the work of a row
  // The last vector is gathered at least.
  const bool gathered = op.query_stride.c != 1 || op.channels % kLanes != 0 || op.storage != Storage::float32;
  const int64_t strip = longest_strip(gathered, op.w, op.h, op.key.kh + op.value.kh);
  run_storage<Run>(op, tile(ceil_div(op.channels, kLanes), 1, op.n, op.h, halo, strip, executor.threads), executor);
}

}  // namespace ffnet::FFNET_ISA
