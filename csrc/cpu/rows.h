// A convolution's operands in the form of its inner kernel: packed filters and rows of vectors of channels.
//
// A tap is a float32 of one row, or (bfloat16 maps, where the processor has the instruction) a vertical pair of
// bfloat16: the multiply-add then sums two rows of the filter. Map rows 2m and 2m + 1 form the pair m; a filter that
// starts at an odd row is packed with a zero row before it, so one packing of the map serves every output row.
#pragma once

#include "conv_row.h"
#include "layout.h"

namespace ffnet::FFNET_ISA {

FFNET_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Taps groups of `rows` rows that a filter of kh rows can touch.
template <class Taps>
FFNET_INLINE int64_t row_groups(int64_t kh) {
  return Taps::rows == 1 ? kh : kh / 2 + 1;
}

// Floats that pack_filter writes.
template <class Taps>
FFNET_INLINE int64_t packed_floats(const Filter& f) {
  return (Taps::rows * row_groups<Taps>(f.kh) * f.kw + 1) * kLanes;
}

template <class Taps>
struct Pack;

// [kh][kw][lanes]
template <>
struct Pack<FloatTaps> {
  template <class T>
  static void filter(const Filter& f, const Lanes& lanes, float* out) {
    gather_rows(static_cast<const T*>(f.weight), {0, f.stride_o, f.stride_h, f.stride_w}, f.kh, f.kw, lanes, out);
  }
  template <class T>
  static void rows(const T* image, const Strides& stride, int64_t first, int64_t last, int64_t, int64_t width,
                   const Lanes& lanes, float* out) {
    gather_rows(image + first * stride.h, stride, last - first, width, lanes, out);
  }
};

#if defined(__AVX512BF16__)
// [parity of the first row][pair][kw][lanes]
template <>
struct Pack<PairTaps> {
  template <class T>
  static void filter(const Filter& f, const Lanes& lanes, float* out) {
    const auto* weight = static_cast<const BFloat16*>(f.weight);
    const auto row = [&](int64_t ky) { return ky >= 0 && ky < f.kh ? weight + ky * f.stride_h : nullptr; };
    for (int64_t parity = 0; parity < 2; ++parity)
      for (int64_t pair = 0; pair < row_groups<PairTaps>(f.kh); ++pair, out += f.kw * kLanes)
        gather_row(ElementPairs{row(2 * pair - parity), row(2 * pair + 1 - parity)}, f.stride_o, f.stride_w, f.kw,
                   lanes, out);
  }
  template <class T>
  static void rows(const BFloat16* image, const Strides& stride, int64_t first, int64_t last, int64_t height,
                   int64_t width, const Lanes& lanes, float* out) {
    for (int64_t r = first / 2 * 2; r < last; r += 2, out += width * kLanes) {
      const BFloat16* row = image + r * stride.h;
      gather_row(ElementPairs{row, r + 1 < height ? row + stride.h : nullptr}, stride.c, stride.w, width, lanes, out);
    }
  }
};
#endif

// Packs the filters of a vector of output channels, then the bias; what is missing is zero. A filter is a map of kh x
// kw pixels; ffnet_kernels.optimize stores it channels-last, which is copied a vector at a time.
template <class T, class Taps>
PackedFilter pack_filter(const Filter& f, int64_t first, int64_t count, int64_t stride, int64_t pad_left, float* out) {
  Pack<Taps>::template filter<T>(f, {first, count, 1}, out);
  const int64_t groups = row_groups<Taps>(f.kh), parity_floats = groups * f.kw * kLanes;
  float* bias = out + Taps::rows * parity_floats;
  (f.bias ? Vec::load_first(f.bias + first, count) : Vec::fill(0)).store(bias);
  return {out,
          bias,
          parity_floats,
          static_cast<int>(groups),
          static_cast<int>(f.kw),
          static_cast<int>(stride),
          static_cast<int>(pad_left)};
}

// Rows [first, last) of one image and one vector of channels, for windows that move downwards: used in place if the
// layout allows, otherwise gathered when a window reaches them. Only the latest gathered rows are kept, as dense lines,
// so that they stay in L1. Planes are transposed in blocks of pixels across rows, all at once.
template <class T, class Taps>
class Rows {
 public:
  static int64_t scratch_floats(const Strides& stride, int64_t width, const Lanes& lanes, int64_t first, int64_t last,
                                int64_t kh) {
    if (last <= first || usable(lanes, stride, width)) return 0;
    const int64_t groups = ceil_div(last, Taps::rows) - first / Taps::rows;
    return (stride.c == 1 ? min_of(groups, capacity(kh)) : groups) * width * kLanes;
  }

  Rows() = default;
  // `height` is the whole image's, `kh` the filter's.
  Rows(const T* image, const Strides& stride, int64_t height, int64_t width, const Lanes& lanes, int64_t first,
       int64_t last, int64_t kh, float* scratch)
      : map_{image, stride, lanes, height, width},
        first_(first / Taps::rows),
        last_(last > first ? ceil_div(last, Taps::rows) : first_) {
    if (usable(lanes, stride, width)) {
      base_ = const_cast<float*>(reinterpret_cast<const float*>(image + lanes.first));
      row_ = stride.h, pixel_ = stride.w, base_row_ = 0, gathered_ = last_;
    } else {
      base_ = scratch;
      row_ = width * kLanes, pixel_ = kLanes, base_row_ = gathered_ = first_;
      if (stride.c == 1)
        mask_ = capacity(kh) - 1;
      else
        gather(last_);
    }
  }
  int64_t pixel() const { return pixel_; }
  // Group of Taps::rows rows; null outside.
  const float* operator[](int64_t group) const { return group >= first_ && group < last_ ? at(group) : nullptr; }
  // Points at the groups that a filter reaches whose first row is `top`, and returns the filter for where that row lies
  // in its group. For an even filter the last group may have zero taps only, but must exist.
  PackedFilter window(int64_t top, const PackedFilter& filter, const float** rows) {
    const int64_t group = floor_div(top, Taps::rows);
    if (gathered_ < last_ && gathered_ < group + filter.kh) gather_window(group + filter.kh);
    for (int g = 0; g < filter.kh; ++g) rows[g] = (*this)[group + g];
    return filter.starting_at(top - group * Taps::rows);
  }

 private:
  struct Map {
    const T* image;
    Strides stride;
    Lanes lanes;
    int64_t height, width;
  };

  static bool usable(const Lanes& lanes, const Strides& stride, int64_t width) {
    return Taps::rows == 1 && stays_in_place<T>(lanes, stride, width);
  }
  // Groups kept at a time: a power of two, so that finding one takes no division.
  static int64_t capacity(int64_t kh) {
    int64_t groups = 1;
    while (groups < row_groups<Taps>(kh)) groups *= 2;
    return groups;
  }
  float* at(int64_t group) const { return base_ + ((group - base_row_) & mask_) * row_; }
  // Groups before `end`; those before and after the end of the scratch are not adjacent.
  void gather(int64_t end) {
    while (gathered_ < end) {
      const int64_t place = (gathered_ - base_row_) & mask_, left = mask_ < 0 ? end : mask_ + 1 - place;
      const int64_t next = min_of(end, gathered_ + left);
      Pack<Taps>::template rows<T>(map_.image, map_.stride, gathered_ * Taps::rows,
                                   min_of(map_.height, next * Taps::rows), map_.height, map_.width, map_.lanes,
                                   at(gathered_));
      gathered_ = next;
    }
  }
  // The same, and prefetches the next group, once for all vectors that share its lines.
  void gather_window(int64_t end) {
    end = min_of(end, last_);
    gather(end);
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t channel = map_.lanes.first / map_.lanes.multiplier;
    if (channel % kLine != 0) return;
    for (int64_t r = end * Taps::rows; r < min_of(map_.height, min_of(last_, end + 1) * Taps::rows); ++r)
      prefetch_row(map_.image + r * map_.stride.h + channel, map_.stride.w, 0, map_.width);
  }

  Map map_{};
  float* base_ = nullptr;
  int64_t row_ = 0, pixel_ = 0, base_row_ = 0, first_ = 0, last_ = 0, gathered_ = 0;
  int64_t mask_ = -1;  // all groups exist
};

}  // namespace ffnet::FFNET_ISA
