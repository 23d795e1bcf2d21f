// Runs the tasks of an operator on the fastest kernel for its maps' values.
//
// Pairs of bfloat16 (rows.h) multiply rows outside a filter's reach by zero, which makes NaN of an infinity or a NaN
// there. That would show in the results, so each result is checked, and planes that contain a NaN are recomputed tap by
// tap: then NaN is where it belongs, and results do not depend on how the plane was split.
#pragma once

#include <cstdlib>
#include <new>

#include "rows.h"
#include "tiling.h"

namespace ffnet::FFNET_ISA {

// Remembers whether any vector had a NaN (or an infinity: a false alarm only costs time).
struct NanSensor {
  Vec sum = Vec::fill(0);
  FFNET_INLINE void see(Vec x) { sum = fma(x, Vec::fill(0), sum); }
  // `width` vectors `pixel` floats apart; in four parts for the latency of additions.
  FFNET_INLINE void see_row(const float* row, int64_t pixel, int64_t width) {
    Vec part[4] = {sum, Vec::fill(0), Vec::fill(0), Vec::fill(0)};
    int64_t i = 0;
    for (; i + 4 <= width; i += 4)
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) part[p] = fma(Vec::load(row + (i + p) * pixel), Vec::fill(0), part[p]);
    for (; i < width; ++i) part[0] = fma(Vec::load(row + i * pixel), Vec::fill(0), part[0]);
    sum = (part[0] + part[1]) + (part[2] + part[3]);
  }
  bool alarmed() const {
    float lanes[Vec::lanes];
    sum.store(lanes);
    for (const float lane : lanes)
      if (lane != lane) return true;
    return false;
  }
};

// One flag a plane, set from any thread.
class Flags {
 public:
  explicit Flags(int64_t planes) : flags_(static_cast<unsigned char*>(std::calloc(static_cast<size_t>(planes), 1))) {
    if (!flags_) throw std::bad_alloc();
  }
  Flags(const Flags&) = delete;
  ~Flags() { std::free(flags_); }
  void set(int64_t plane) {
    __atomic_store_n(flags_ + plane, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&any_, true, __ATOMIC_RELAXED);
  }
  bool operator[](int64_t plane) const { return flags_[plane]; }
  bool any() const { return any_; }

 private:
  unsigned char* flags_;
  bool any_ = false;
};

// The tasks of an operator, for all planes or `only` some; those with an alarm are recorded in `alarms`.
template <class Op>
struct Tasks {
  const Op& op;
  const Tiling& tiling;
  Flags* alarms;
  const Flags* only;
};

// Task<T, Taps>(op, tiling, task) prepares a task; its `bool run(image)` runs it for one image and returns whether
// there was an alarm.
template <template <class, class> class Task, class T, class Taps, class Op>
void run_tasks(const Tasks<Op>& tasks, const Executor& executor) {
  const auto body = [](void* context, int64_t index) {
    const auto& all = *static_cast<const Tasks<Op>*>(context);
    const Tiling& tiling = all.tiling;
    const int64_t first = tiling.first_image(index), last = tiling.last_image(index);
    const auto is_wanted = [&](int64_t n) { return !all.only || (*all.only)[tiling.plane(index, n)]; };
    bool wanted = false;
    for (int64_t n = first; n < last; ++n) wanted = wanted || is_wanted(n);
    if (!wanted) return;
    Task<T, Taps> task{all.op, tiling, index};
    for (int64_t n = first; n < last; ++n)
      if (is_wanted(n) && task.run(n) && all.alarms) all.alarms->set(tiling.plane(index, n));
  };
  executor.run(tasks.tiling.tasks(), body, const_cast<Tasks<Op>*>(&tasks));
}

#if defined(__AVX512BF16__)
template <template <class, class> class Task, class Op>
void run_in_pairs(const Op& op, const Tiling& tiling, const Executor& executor) {
  Flags alarms(tiling.planes());
  run_tasks<Task, BFloat16, PairTaps, Op>({op, tiling, &alarms, nullptr}, executor);
  if (alarms.any()) run_tasks<Task, BFloat16, FloatTaps, Op>({op, tiling, nullptr, &alarms}, executor);
}
#endif

template <template <class, class> class Task, class Op>
void run_storage(const Op& op, const Tiling& tiling, const Executor& executor) {
#if defined(__AVX512BF16__)
  if (op.storage == Storage::bfloat16) return run_in_pairs<Task>(op, tiling, executor);
#endif
  with_storage(op.storage, [&](auto element) {
    run_tasks<Task, decltype(element), FloatTaps, Op>({op, tiling, nullptr, nullptr}, executor);
  });
}

}  // namespace ffnet::FFNET_ISA
