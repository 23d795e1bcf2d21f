// How work is cut into tasks, and a thread's scratch memory.
#pragma once

#include "layout.h"

namespace ffnet::FFNET_ISA {

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

// task = (group of adjacent vectors of channels, image, strip of output rows), channels outermost so that consecutive
// tasks share filters.
struct Tiling {
  int64_t groups, group_size, images, strips, rows, height;
  int64_t tasks() const { return groups * images * strips; }
  int64_t planes() const { return groups * images; }
  int64_t plane(int64_t task) const { return task / strips; }
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
