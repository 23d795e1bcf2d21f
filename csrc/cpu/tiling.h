// How work is cut into tasks, and a thread's scratch memory.
#pragma once

#include "layout.h"

namespace ffnet::FFNET_ISA {

// Allocates parts of a thread's scratch. A row pointer takes the space of two floats.
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

// task = (group of adjacent vectors of channels, some images, strip of output rows), channels outermost so that
// consecutive tasks share filters. A plane is one group of one image.
struct Tiling {
  int64_t groups, group_size, images, images_per_task, strips, rows, height;
  int64_t chunks() const { return ceil_div(images, images_per_task); }
  int64_t tasks() const { return groups * chunks() * strips; }
  int64_t planes() const { return groups * images; }
  int64_t group(int64_t task) const { return task / (chunks() * strips); }
  int64_t plane(int64_t task, int64_t image) const { return group(task) * images + image; }
  int64_t first_channel(int64_t task) const { return group(task) * group_size * kLanes; }
  int64_t first_image(int64_t task) const { return task / strips % chunks() * images_per_task; }
  int64_t last_image(int64_t task) const { return min_of(first_image(task) + images_per_task, images); }
  int64_t first_row(int64_t task) const { return task % strips * rows; }
  int64_t last_row(int64_t task) const { return min_of(first_row(task) + rows, height); }
};

// Rows of a batch that one task takes through all channels at once.
inline Tiling strips_of_batch(int64_t strips, int64_t rows, int64_t height) {
  return {1, 1, 1, 1, strips, rows, height};
}

// Vectors of channels of a channels-last map that one task processes together: those that share lines. Runs of several
// lines are faster if an image outgrows L2, since each page is then visited once per run, and if a vector is half a
// line, most of all with small filters. The rows that a run rereads should stay in L2.
constexpr int64_t kMaxGroup = 128 / kLanes;
inline int64_t group_size(Storage storage, int64_t image_elements, int64_t kh, int64_t width, int64_t vectors) {
  constexpr bool kWholeLines = Vec::lanes == 16;
  constexpr int64_t kRowFloats = 64 * 1024, kImageBytes = 1 << 20, kRun = 8;
  const int64_t in_line = vectors_in_line(storage), lines = ceil_div(vectors, in_line);
  const bool by_runs = !kWholeLines || image_elements * bytes_of(storage) > kImageBytes;
  const int64_t longest = min_of(kh <= 3 ? kMaxGroup : kRun, kRowFloats / (kh * width * kLanes));
  const int64_t run = by_runs ? max_of(1, longest / in_line) : 1;
  return min_of(vectors, in_line * ceil_div(lines, ceil_div(lines, run)));  // of nearly equal size
}

// The most rows of a strip: of planes, which are gathered whole, as many as keep the copy in L2, but not so few that
// the `halo` rows around a strip outweigh it.
inline int64_t longest_strip(bool planes, int64_t width, int64_t height, int64_t halo) {
  constexpr int64_t kGatheredFloats = 48 * 1024;
  return planes ? max_of(kGatheredFloats / (width * kLanes) - halo, max_of(1, 2 * halo)) : height;
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
    if (cost < best_cost) best_cost = cost, best = {groups, group, images, 1, used, rows, height};
  }
  return best;
}

// Lets tasks of a few pixels take several images, for which filters are packed once, if enough tasks remain.
inline Tiling share_filters(Tiling tiling, int64_t width, int threads) {
  constexpr int64_t kPixels = 1024, kTasksPerThread = 8;
  const int64_t wanted = ceil_div(kPixels, tiling.rows * width);
  tiling.images_per_task = max_of(1, min_of(wanted, tiling.tasks() / (kTasksPerThread * threads)));
  return tiling;
}

}  // namespace ffnet::FFNET_ISA
