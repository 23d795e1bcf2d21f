// ffnified_attention forward: residual + scale * (DW(act(DW(query; key)); value)), float32.
//
// Rows are rolled: conv1 makes one row of the middle map, conv2 uses the last rows of it. Only as many middle rows as
// the second filter is tall ever exist, in a ring that stays in L1.
#include "activation.h"
#include "pack.h"

namespace ffnet::FFNET_ISA {
namespace {

struct Work {
  const FfnifiedAttention& op;
  Tiling tiling;
  ConvRow conv_key, conv_value;
};

// out = residual + scale * out over one row; either may be missing.
template <bool kResidual>
void finish_row(float* out, int64_t pixel, int64_t width, Vec scale, const float* residual, int64_t residual_pixel) {
  for (int64_t i = 0; i < width; ++i, out += pixel) {
    Vec value = Vec::load(out);
    if constexpr (kResidual) {
      value = fma(value, scale, Vec::load(residual));
      residual += residual_pixel;
    } else {
      value = value * scale;
    }
    value.store(out);
  }
}

void run_task(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const FfnifiedAttention& op = work.op;
  const int64_t c = work.tiling.first_channel(task), n = work.tiling.image(task);
  const int64_t first = work.tiling.first_row(task), last = work.tiling.last_row(task);
  const Lanes lanes{c, min_of(kLanes, op.channels - c), 1};
  const int64_t kh1 = op.key.kh, kh2 = op.value.kh, line = op.w * kLanes;

  // Middle rows this strip needs, and the query rows those need.
  const int64_t mid_first = max_of(0, first - op.value_pad_top), mid_last = min_of(op.h, last - op.value_pad_top + kh2 - 1);
  const int64_t in_first = max_of(0, mid_first - op.key_pad_top), in_last = min_of(op.h, mid_last - op.key_pad_top + kh1 - 1);
  const bool direct = in_place(lanes, op.out_stride.c), direct_residual = in_place(lanes, op.residual_stride.c);
  const int64_t gathered = in_place(lanes, op.query_stride.c) ? 0 : (in_last - in_first) * line;
  const int64_t out_floats = direct ? 0 : (last - first) * line;
  const int64_t key_floats = packed_floats(op.key), value_floats = packed_floats(op.value);
  Arena arena(key_floats + value_floats + (kh2 + 1) * line + out_floats + kLanes + gathered + (kh1 + kh2) * Arena::kPointer);
  const PackedFilter key = pack_filter(op.key, c, lanes.count, 1, op.key_pad_left, arena.floats(key_floats));
  const PackedFilter value = pack_filter(op.value, c, lanes.count, 1, op.value_pad_left, arena.floats(value_floats));
  float* ring = arena.floats(kh2 * line);
  float* out_rows = arena.floats(out_floats);
  float* residual_line = arena.floats(line);
  float* scale = arena.floats(kLanes);
  for (int64_t l = 0; l < kLanes; ++l) scale[l] = op.scale && l < lanes.count ? op.scale[c + l] : 1;
  const Rows query(op.query + n * op.query_stride.n, op.query_stride, op.w, lanes, in_first, in_last, arena.floats(gathered));
  const float** key_rows = arena.pointers(kh1);
  const float** value_rows = arena.pointers(kh2);
  float* out_image = op.out + n * op.out_stride.n;

  int64_t made = mid_first;  // middle rows [mid_first, made) have been computed
  for (int64_t r = first; r < last; ++r) {
    for (const int64_t need = min_of(op.h, r - op.value_pad_top + kh2); made < need; ++made) {
      for (int64_t ky = 0; ky < kh1; ++ky) key_rows[ky] = query[made - op.key_pad_top + ky];
      prefetch_row(query[made + 1 - op.key_pad_top + kh1 - 1], query.pixel(), 0, op.w);
      const RowOutput middle{ring + made % kh2 * line, kLanes, 0, op.w};
      work.conv_key({key_rows, query.pixel(), op.w}, key, middle);
      activate_row(middle.data, kLanes, op.w, op.activation);
    }
    for (int64_t ky = 0; ky < kh2; ++ky) {
      const int64_t m = r - op.value_pad_top + ky;
      value_rows[ky] = m >= 0 && m < op.h ? ring + m % kh2 * line : nullptr;
    }
    const RowOutput out = direct ? RowOutput{out_image + r * op.out_stride.h + c, op.out_stride.w, 0, op.w}
                                 : RowOutput{out_rows + (r - first) * line, kLanes, 0, op.w};
    const float* from = op.residual ? op.residual + n * op.residual_stride.n + r * op.residual_stride.h : nullptr;
    if (from && direct_residual) prefetch_row(from + c, op.residual_stride.w, 0, op.w);
    work.conv_value({value_rows, kLanes, op.w}, value, out);
    if (from) {
      if (direct_residual) {
        finish_row<true>(out.data, out.pixel, op.w, Vec::load(scale), from + c, op.residual_stride.w);
      } else {
        gather_row(from, op.residual_stride.c, op.residual_stride.w, op.w, lanes, residual_line);
        finish_row<true>(out.data, out.pixel, op.w, Vec::load(scale), residual_line, kLanes);
      }
    } else if (op.scale) {
      finish_row<false>(out.data, out.pixel, op.w, Vec::load(scale), nullptr, 0);
    }
  }
  if (!direct) scatter_rows(out_rows, last - first, op.w, lanes, out_image + first * op.out_stride.h, op.out_stride);
}

}  // namespace

void ffnified_attention(const FfnifiedAttention& op, const Executor& executor) {
  const int64_t halo = max_of(1, op.value.kh / 2);  // recomputed rows of the middle map are half the work of a row
  const bool gathered = op.query_stride.c != 1 || op.channels % kLanes != 0;  // the last vector at least
  const int64_t strip = longest_strip(gathered, op.w, op.h, op.key.kh + op.value.kh);
  Work work{op, tile(ceil_div(op.channels, kLanes), 1, op.n, op.h, halo, strip, executor.threads), select_conv_row(op.key, 1),
            select_conv_row(op.value, 1)};
  executor.run(work.tiling.tasks(), run_task, &work);
}

}  // namespace ffnet::FFNET_ISA
