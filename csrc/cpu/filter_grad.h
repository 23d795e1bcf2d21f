// Filters and their gradients in backward passes: mirrored, or a part of their taps; packing and unpacking.
#pragma once

#include "rows.h"

namespace ffnet::FFNET_ISA {

// A convolution's input gradient is a convolution of the output's gradient. Along an axis with stride S, the input
// pixels p, p + S, and so on meet only every S-th tap; reversed, these taps form a filter with stride 1.
struct MirroredTaps {
  int64_t first, count;  // taps first, first + S, ...
  int64_t offset;        // input pixel p + S * u meets output pixels from u + offset on
  MirroredTaps(int64_t p, int64_t stride, int64_t taps, int64_t pad)
      : first((p + pad) % stride),
        count(first < taps ? ceil_div(taps - first, stride) : 0),
        offset((p + pad - first) / stride - (count - 1)) {}
};

// Packs the filter of the given taps, without bias, for a vector of channels.
template <class T>
PackedFilter pack_mirrored(const Filter& f, const MirroredTaps& rows, const MirroredTaps& columns, int64_t stride_h,
                           int64_t stride_w, const Lanes& lanes, float* out) {
  Filter part = f;
  part.bias = nullptr, part.kh = rows.count, part.kw = columns.count;
  part.weight = static_cast<const T*>(f.weight) + (rows.first + stride_h * (rows.count - 1)) * f.stride_h +
                (columns.first + stride_w * (columns.count - 1)) * f.stride_w;
  part.stride_h = -stride_h * f.stride_h, part.stride_w = -stride_w * f.stride_w;
  return pack_filter<T, FloatTaps>(part, lanes.first, lanes.count, 1, -columns.offset, out);
}

// Writes the gradients [kh][kw][lanes] and [lanes] of the filters of a vector of channels, if wanted.
template <class T>
void store_filter_grad(const float* sums, const float* bias_sum, int64_t kh, int64_t kw, const Lanes& lanes,
                       const FilterGrad& to) {
  if (to.weight)
    scatter_rows(sums, kh, kw, lanes, static_cast<T*>(to.weight), {0, to.stride_o, to.stride_h, to.stride_w});
  if (to.bias) store_first(Vec::load(bias_sum), static_cast<T*>(to.bias) + lanes.first, lanes.count);
}

}  // namespace ffnet::FFNET_ISA
