// Rows of one map and one vector of channels as lines [width][lanes] in scratch, of which only the latest exist.
//
// Backward passes read every row many times: dense lines keep a map with many channels from falling on few cache sets.
#pragma once

#include <type_traits>

#include "tiling.h"

namespace ffnet::FFNET_ISA {

// One map of an operator, for one vector of channels.
template <class T>
struct MapView {
  T* data;
  Strides stride;
  Lanes lanes;
  int64_t height, width;
  T* row(int64_t n, int64_t r) const { return data + n * stride.n + r * stride.h; }
  // Prefetches row r while something else is computed, or that of the next image if this one ends before it: a
  // vector of channels of a channels-last map is one cache line of each pixel, a pattern that hardware prefetchers do
  // not follow.
  FFNET_INLINE void prefetch(int64_t n, int64_t r, bool more_images) const {
    if (r >= height) {
      if (!more_images) return;
      ++n, r -= height;
    }
    if (stride.c != 1 || r >= height) return;
    const T* from = row(n, r) + lanes.first / lanes.multiplier;
    for (int64_t i = 0; i < width; ++i) __builtin_prefetch(from + i * stride.w, std::is_const_v<T> ? 0 : 1);
  }
};

class RowRing {
 public:
  RowRing() = default;
  // Of a map of `height` rows, `capacity` exist at a time. Windows reach `before` rows above the map and `after` below.
  RowRing(int64_t height, int64_t width, int64_t capacity, int64_t before, int64_t after)
      : width_(width),
        capacity_(min_of(capacity, height)),
        height_(height),
        before_(max_of(before, 0)),
        after_(max_of(after, 0)) {}
  int64_t scratch_floats() const {
    return capacity_ * width_ * kLanes + (before_ + height_ + after_) * Arena::kPointer;
  }
  void place(Arena& arena) {
    lines_ = arena.floats(capacity_ * width_ * kLanes);
    table_ = arena.pointers(before_ + height_ + after_);
    for (int64_t r = -before_; r < height_ + after_; ++r)
      table_[before_ + r] = r >= 0 && r < height_ ? line(r) : nullptr;
  }
  float* line(int64_t row) const { return lines_ + row % capacity_ * width_ * kLanes; }
  // Pointers to rows from `first` on, null outside the map.
  const float* const* window(int64_t first) const { return table_ + before_ + first; }
  // Fills rows [first, last) from an image of a map.
  template <class T>
  void gather(const MapView<const T>& map, int64_t n, int64_t first, int64_t last) {
    while (first < last) {
      const int64_t count = min_of(last - first, capacity_ - first % capacity_);
      gather_rows(map.row(n, first), map.stride, count, width_, map.lanes, line(first));
      first += count;
    }
  }

 private:
  float* lines_ = nullptr;
  const float** table_ = nullptr;
  int64_t width_ = 0, capacity_ = 0, height_ = 0, before_ = 0, after_ = 0;
};

}  // namespace ffnet::FFNET_ISA
