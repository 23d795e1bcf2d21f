// Runs the tasks of an operator on the fastest kernel for what its maps consist of.
//
// Pairs of bfloat16 (rows.h) multiply rows outside a filter's reach by zero, which makes NaN of an infinity or a NaN
// there. It would show in the results, so each result is looked at, and planes that hold a NaN are computed again tap
// by tap: NaN is then where it belongs, and a result does not depend on how the plane was cut.
#pragma once

#include <cstdlib>
#include <new>

#include "rows.h"
#include "tiling.h"

namespace ffnet::FFNET_ISA {

// Remembers whether any vector it saw holds a NaN (or an infinity: a false alarm only costs time).
struct NanSensor {
  Vec sum = Vec::fill(0);
  FFNET_INLINE void see(Vec x) { sum = fma(x, Vec::fill(0), sum); }
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

// The tasks of an operator: of all planes, or `only` of some; those with an alarm are put down in `alarms`.
template <class Op>
struct Tasks {
  const Op& op;
  const Tiling& tiling;
  Flags* alarms;
  const Flags* only;
};

// Run has `template <class T, class Taps> static bool task(const Op&, const Tiling&, int64_t task)`, which tells
// whether there was an alarm.
template <class Run, class T, class Taps, class Op>
void run_tasks(const Tasks<Op>& tasks, const Executor& executor) {
  const auto body = [](void* context, int64_t task) {
    const auto& all = *static_cast<const Tasks<Op>*>(context);
    const int64_t plane = all.tiling.plane(task);
    if (all.only && !(*all.only)[plane]) return;
    if (Run::template task<T, Taps>(all.op, all.tiling, task) && all.alarms) all.alarms->set(plane);
  };
  executor.run(tasks.tiling.tasks(), body, const_cast<Tasks<Op>*>(&tasks));
}

#if defined(__AVX512BF16__)
template <class Run, class Op>
void run_in_pairs(const Op& op, const Tiling& tiling, const Executor& executor) {
  Flags alarms(tiling.planes());
  run_tasks<Run, BFloat16, PairTaps, Op>({op, tiling, &alarms, nullptr}, executor);
  if (alarms.any()) run_tasks<Run, BFloat16, FloatTaps, Op>({op, tiling, nullptr, &alarms}, executor);
}
#endif

template <class Run, class Op>
void run_storage(const Op& op, const Tiling& tiling, const Executor& executor) {
#if defined(__AVX512BF16__)
  if (op.storage == Storage::bfloat16) return run_in_pairs<Run>(op, tiling, executor);
#endif
  with_storage(op.storage, [&](auto element) {
    run_tasks<Run, decltype(element), FloatTaps, Op>({op, tiling, nullptr, nullptr}, executor);
  });
}

}  // namespace ffnet::FFNET_ISA
