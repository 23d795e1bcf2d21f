#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "kernels.h"

namespace ffnet {
namespace {

std::atomic<bool> poisoned{false};

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

void poison_scratch(bool wanted) { poisoned.store(wanted, std::memory_order_relaxed); }

void poison(float* scratch, size_t floats) {
  if (poisoned.load(std::memory_order_relaxed)) std::fill_n(scratch, floats, std::numeric_limits<float>::quiet_NaN());
}

float* thread_scratch(size_t floats) {
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local size_t capacity = 0;
  if (floats > capacity) {
    buffer.reset();
    capacity = 0;
    const size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    capacity = bytes / sizeof(float);
  }
  poison(buffer.get(), floats);
  return buffer.get();
}

}  // namespace ffnet
