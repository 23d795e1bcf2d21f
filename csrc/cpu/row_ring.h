// Rows of one map and one vector of channels as lines [width][lanes] in scratch, of which only the latest exist.
//
// Backward passes read every row many times: dense lines keep a map with many channels from falling on few cache sets.
#pragma once

#include "pack.h"

namespace ffnet::FFNET_ISA {

class RowRing {
 public:
  RowRing() = default;
  // Of a map of `height` rows, `capacity` exist at a time. Windows reach `before` rows above the map and `after` below.
  RowRing(int64_t height, int64_t width, int64_t capacity, int64_t before, int64_t after)
      : width_(width), capacity_(min_of(capacity, height)), height_(height), before_(max_of(before, 0)),
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
  // Fills rows [first, last) from an image.
  void gather(const float* image, const Strides& stride, const Lanes& lanes, int64_t first, int64_t last) {
    while (first < last) {
      const int64_t count = min_of(last - first, capacity_ - first % capacity_);
      gather_rows(image + first * stride.h, stride, count, width_, lanes, line(first));
      first += count;
    }
  }

 private:
  float* lines_ = nullptr;
  const float** table_ = nullptr;
  int64_t width_ = 0, capacity_ = 0, height_ = 0, before_ = 0, after_ = 0;
};

}  // namespace ffnet::FFNET_ISA
