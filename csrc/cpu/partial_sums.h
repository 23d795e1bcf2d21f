// How a backward pass is cut into tasks, and the sums over pixels that each task produces.
//
// A task is a vector of channels and a chunk of the images' strips. Chunks depend on the shape only and their sums are
// added in order, so results do not depend on the number of threads.
#pragma once

#include "buffer.h"
#include "tiling.h"

namespace ffnet::FFNET_ISA {

class GradientTiling {
 public:
  GradientTiling(int64_t vectors, int64_t images, int64_t height)
      : images_(images), height_(height), vectors_(vectors) {
    constexpr int64_t kLeastTasks = 32, kStripTasks = 16;  // fewer by strips, which recompute the rows around them
    constexpr int64_t kLeastRows = 32;
    const int64_t whole = max_of(1, vectors * images);
    strips_ = max_of(1, min_of(ceil_div(kStripTasks, whole), height / kLeastRows));
    chunks_ = max_of(1, min_of(images * strips_, ceil_div(kLeastTasks, vectors)));
  }
  int64_t vectors() const { return vectors_; }
  int64_t chunks() const { return chunks_; }
  int64_t tasks() const { return vectors_ * chunks_; }
  // Neighbouring vectors of a chunk follow each other: they share the pages and lines of channels-last maps.
  int64_t vector(int64_t task) const { return task % vectors_; }
  // Runs body(context, task) for all tasks; a thread takes `together` neighbouring vectors of channels one after the
  // other (vectors_in_line).
  void run(const Executor& executor, int64_t together, void (*body)(void*, int64_t), void* context) const {
    struct Groups {
      int64_t vectors, together;
      void (*body)(void*, int64_t);
      void* context;
    } groups{vectors_, together, body, context};
    const auto run_group = [](void* all, int64_t index) {
      const auto& groups = *static_cast<const Groups*>(all);
      const int64_t in_chunk = ceil_div(groups.vectors, groups.together), first = index % in_chunk * groups.together;
      const int64_t task = index / in_chunk * groups.vectors;
      for (int64_t v = first; v < min_of(groups.vectors, first + groups.together); ++v)
        groups.body(groups.context, task + v);
    };
    executor.run(chunks_ * ceil_div(vectors_, together), run_group, &groups);
  }
  // f(image, first row, last row, whether the task goes on with the next image) for the strips of a task.
  template <class F>
  void for_each_strip(int64_t task, const F& f) const {
    const int64_t chunk = task / vectors_, all = images_ * strips_;
    const int64_t last = (chunk + 1) * all / chunks_;
    for (int64_t i = chunk * all / chunks_; i < last; ++i) {
      const int64_t strip = i % strips_;
      f(i / strips_, strip * height_ / strips_, (strip + 1) * height_ / strips_, strips_ == 1 && i + 1 < last);
    }
  }

 private:
  int64_t images_, height_, vectors_, strips_, chunks_;
};

// `floats` sums of each task.
class PartialSums {
 public:
  PartialSums(const GradientTiling& tiling, int64_t floats)
      : vectors_(tiling.vectors()), chunks_(tiling.chunks()), floats_(floats), data_(tiling.tasks() * floats) {}
  // The sums of a task, zeroed.
  float* start(int64_t task) const {
    float* sums = data_.data + task * floats_;
    for (int64_t i = 0; i < floats_; ++i) sums[i] = 0;
    return sums;
  }
  // The sums of a vector of channels over all chunks.
  float* total(int64_t vector) const {
    float* sums = data_.data + vector * floats_;
    for (int64_t i = 0; i < floats_; i += kLanes) {
      Vec total = Vec::load(sums + i);
      for (int64_t chunk = 1; chunk < chunks_; ++chunk)
        total = total + Vec::load(sums + chunk * vectors_ * floats_ + i);
      total.store(sums + i);
    }
    return sums;
  }

 private:
  int64_t vectors_, chunks_, floats_;
  Buffer data_;
};

// A task of `Work`, which has `tiling`, `sums` and the `lanes` of a vector: Task's `run` for each of its strips.
template <class Task, class Work>
void run_gradient_task(void* context, int64_t index) {
  const Work& work = *static_cast<const Work*>(context);
  Task task(work, work.lanes(work.tiling.vector(index)), work.sums.start(index));
  work.tiling.for_each_strip(
      index, [&](int64_t n, int64_t first, int64_t last, bool more) { task.run(n, first, last, more); });
}

}  // namespace ffnet::FFNET_ISA
