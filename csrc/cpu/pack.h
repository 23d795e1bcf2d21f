// Moving filters and map rows between their strided layout and vectors of channels.
#pragma once

#include "conv_row.h"
#include "kernels.h"
#include "transpose.h"

namespace ffnet::FFNET_ISA {

constexpr int64_t kLanes = Vec::lanes;

FFNET_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FFNET_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FFNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out the parts of a thread's scratch. A row pointer takes the room of two floats.
struct Arena {
  static constexpr int64_t kPointer = 2;
  static_assert(sizeof(const float*) <= kPointer * sizeof(float));
  float* at;
  explicit Arena(int64_t size) : at(thread_scratch(static_cast<size_t>(size))) {}
  float* floats(int64_t count) {
    float* part = at;
    at += count;
    return part;
  }
  const float** pointers(int64_t count) { return reinterpret_cast<const float**>(floats(count * kPointer)); }
};

// Floats that pack_filter writes.
FFNET_INLINE int64_t packed_floats(const Filter& f) { return (f.kh * f.kw + 1) * kLanes; }

// Which channels a vector holds: lane l is channel (first + l) / multiplier of the map; lanes past `count` are zero.
struct Lanes {
  int64_t first, count, multiplier;
};

// True where a row can be used in place: unit channel stride, one channel a lane, no lane missing.
FFNET_INLINE bool in_place(const Lanes& lanes, int64_t channel_stride) {
  return channel_stride == 1 && lanes.multiplier == 1 && lanes.count == kLanes;
}

// `width` pixels of a strided map -> [width][lanes]. `row` points at channel 0 of the first pixel.
inline void gather_row(const float* row, int64_t stride_c, int64_t stride_w, int64_t width, const Lanes& lanes,
                       float* out) {
  if (stride_c == 1 && lanes.multiplier <= 2) {
    const int64_t count = ceil_div(lanes.count, lanes.multiplier);
    const float* from = row + lanes.first / lanes.multiplier;
    for (int64_t i = 0; i < width; ++i) {
      const Vec pixel = Vec::load_first(from + i * stride_w, count);
      (lanes.multiplier == 1 ? pixel : duplicate_lanes(pixel, std::make_index_sequence<Vec::lanes>()))
          .store(out + i * kLanes);
    }
    return;
  }
  if (stride_w == 1 && lanes.multiplier == 1) {
    const float* from = row + lanes.first * stride_c;
    for (int64_t i = 0; i < width; i += kLanes, out += kLanes * kLanes) {
      if (lanes.count == kLanes && i + kLanes <= width) {
        transpose_block(from + i, stride_c, out, kLanes);
      } else {
        const int64_t pixels = min_of(kLanes, width - i);
        transpose_part(from + i, stride_c, lanes.count, pixels, out, kLanes, pixels, kLanes);
      }
    }
    return;
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    const float* from = row + (lanes.first + l) / lanes.multiplier * stride_c;
    for (int64_t i = 0; i < width; ++i) out[i * kLanes + l] = l < lanes.count ? from[i * stride_w] : 0;
  }
}

// [width][lanes] -> `width` pixels of a strided map, one channel a lane.
inline void scatter_row(const float* in, int64_t width, const Lanes& lanes, float* row, int64_t stride_c,
                        int64_t stride_w) {
  if (stride_c == 1) {
    for (int64_t i = 0; i < width; ++i)
      Vec::load(in + i * kLanes).store_first(row + lanes.first + i * stride_w, lanes.count);
    return;
  }
  if (stride_w == 1) {
    float* to = row + lanes.first * stride_c;
    for (int64_t i = 0; i < width; i += kLanes, in += kLanes * kLanes) {
      if (lanes.count == kLanes && i + kLanes <= width) {
        transpose_block(in, kLanes, to + i, stride_c);
      } else {
        const int64_t pixels = min_of(kLanes, width - i);
        transpose_part(in, kLanes, pixels, kLanes, to + i, stride_c, lanes.count, pixels);
      }
    }
    return;
  }
  for (int64_t l = 0; l < lanes.count; ++l)
    for (int64_t i = 0; i < width; ++i) row[(lanes.first + l) * stride_c + i * stride_w] = in[i * kLanes + l];
}

// The same for whole rows `stride.h` apart; rows that follow each other in memory move as one.
inline void gather_rows(const float* image, const Strides& stride, int64_t rows, int64_t width, const Lanes& lanes,
                        float* out) {
  if (stride.h == width * stride.w) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r)
    gather_row(image + r * stride.h, stride.c, stride.w, width, lanes, out + r * width * kLanes);
}

inline void scatter_rows(const float* in, int64_t rows, int64_t width, const Lanes& lanes, float* image,
                         const Strides& stride) {
  if (stride.h == width * stride.w) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r)
    scatter_row(in + r * width * kLanes, width, lanes, image + r * stride.h, stride.c, stride.w);
}

// Packs the filters of a vector of output channels as [kh][kw][lanes], then the bias; what is missing is zero. A filter
// is a map of kh x kw pixels; ffnet_kernels.optimize stores it channels-last, which is copied a vector at a time.
inline PackedFilter pack_filter(const Filter& f, int64_t first, int64_t count, int64_t stride, int64_t pad_left,
                                float* out) {
  const Lanes lanes{first, count, 1};
  gather_rows(f.weight, {0, f.stride_o, f.stride_h, f.stride_w}, f.kh, f.kw, lanes, out);
  float* bias = out + f.kh * f.kw * kLanes;
  (f.bias ? Vec::load_first(f.bias + first, count) : Vec::fill(0)).store(bias);
  return {out, bias, static_cast<int>(f.kh), static_cast<int>(f.kw), static_cast<int>(stride),
          static_cast<int>(pad_left)};
}

// Rows [first, last) of one image and one vector of channels, used in place where the layout allows, else gathered.
class Rows {
 public:
  Rows() = default;
  Rows(const float* image, const Strides& stride, int64_t width, const Lanes& lanes, int64_t first, int64_t last,
       float* scratch)
      : first_(first), last_(last) {
    if (in_place(lanes, stride.c)) {
      base_ = image + lanes.first;
      row_ = stride.h, pixel_ = stride.w, base_row_ = 0;
    } else {
      base_ = scratch;
      row_ = width * kLanes, pixel_ = kLanes, base_row_ = first;
      if (last > first) gather_rows(image + first * stride.h, stride, last - first, width, lanes, scratch);
    }
  }
  int64_t pixel() const { return pixel_; }
  // Null outside [first, last).
  const float* operator[](int64_t r) const { return r >= first_ && r < last_ ? base_ + (r - base_row_) * row_ : nullptr; }

 private:
  const float* base_ = nullptr;
  int64_t row_ = 0, pixel_ = 0, base_row_ = 0, first_ = 0, last_ = 0;
};

// Asks for pixels [first, last) of a row that will be needed one row later; a vector of channels of a channels-last map
// is one cache line of each pixel, a pattern that hardware prefetchers do not follow.
FFNET_INLINE void prefetch_row(const float* row, int64_t pixel, int64_t first, int64_t last) {
  if (!row) return;
  for (int64_t i = first; i < last; ++i) __builtin_prefetch(row + i * pixel);
}

// How the work is cut: task = (group of adjacent vectors of channels, image, strip of output rows), channels outermost
// so that consecutive tasks share filters.
struct Tiling {
  int64_t groups, group_size, images, strips, rows, height;
  int64_t tasks() const { return groups * images * strips; }
  int64_t first_channel(int64_t task) const { return task / (images * strips) * group_size * kLanes; }
  int64_t image(int64_t task) const { return task / strips % images; }
  int64_t first_row(int64_t task) const { return task % strips * rows; }
  int64_t last_row(int64_t task) const { return min_of(first_row(task) + rows, height); }
};

// Vectors of channels that one task takes through its rows together: whole runs of a channels-last row are used while
// their pages and lines are at hand. What the group rereads, `row_floats` for each vector, should stay in L2.
constexpr int64_t kMaxGroup = 8;
inline int64_t group_size(bool gathered, int64_t row_floats, int64_t vectors) {
  constexpr int64_t kGroupFloats = 64 * 1024;
  return gathered ? 1 : max_of(1, min_of(min_of(kMaxGroup, vectors), kGroupFloats / row_floats));
}

// Rows a strip should have at most: where the map is gathered, what keeps the copy inside L2, but never so few that
// the `halo` rows around a strip outweigh it.
inline int64_t longest_strip(bool gathered, int64_t width, int64_t height, int64_t halo) {
  constexpr int64_t kGatheredFloats = 48 * 1024;
  return gathered ? max_of(kGatheredFloats / (width * kLanes) - halo, max_of(1, 2 * halo)) : height;
}

// Cuts into as many strips as balance the threads, counting `halo` rows of extra work a strip, each strip holding at
// most `max_rows` rows.
inline Tiling tile(int64_t vectors, int64_t group, int64_t images, int64_t height, int64_t halo, int64_t max_rows,
                   int threads) {
  const int64_t groups = ceil_div(vectors, group), fewest = ceil_div(height, max_rows);
  Tiling best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t strips = fewest; strips <= max_of(fewest, min_of(height, 64)); ++strips) {
    const int64_t rows = ceil_div(height, strips), used = ceil_div(height, rows);
    const int64_t cost = ceil_div(groups * images * used, threads) * (rows + halo);
    if (cost < best_cost) best_cost = cost, best = {groups, group, images, used, rows, height};
  }
  return best;
}

}  // namespace ffnet::FFNET_ISA
