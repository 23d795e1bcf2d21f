#include "select.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

namespace ffnet {
namespace {

// What this build holds and this processor runs.
std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> usable{baseline_kernels()};
#if defined(FFNET_HAVE_X86_KERNELS)
  __builtin_cpu_init();  // asks XGETBV too: registers the operating system does not save do not count
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    usable.push_back(avx2_kernels());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    usable.push_back(avx512_kernels());
    if (__builtin_cpu_supports("avx512bf16")) usable.push_back(avx512bf16_kernels());
  }
#endif
  return usable;
}

size_t find(const std::vector<const Kernels*>& usable, const std::string& isa, const char* origin) {
  std::string names;
  for (size_t i = 0; i < usable.size(); ++i) {
    if (isa == usable[i]->isa) return i;
    names += (i ? ", " : "") + std::string(usable[i]->isa);
  }
  throw std::invalid_argument(std::string(origin) + " names the instruction set '" + isa +
                              "', but this build and processor run: " + names);
}

// With FFNET_KERNELS_ISA the processor passes for one that has nothing better.
std::vector<const Kernels*> detect_up_to_limit() {
  std::vector<const Kernels*> usable = detect();
  const char* limit = std::getenv("FFNET_KERNELS_ISA");
  if (limit && *limit) usable.resize(find(usable, limit, "FFNET_KERNELS_ISA") + 1);
  return usable;
}

std::atomic<const Kernels*> active{nullptr};
std::atomic<bool> poisoned{false};

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable = detect_up_to_limit();
  return usable;
}

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) active.store(kernels = usable_kernels().back(), std::memory_order_relaxed);
  return *kernels;
}

void select_isa(const std::string& isa) {
  const auto& usable = usable_kernels();
  active.store(isa.empty() ? usable.back() : usable[find(usable, isa, "select_isa")], std::memory_order_relaxed);
}

void poison_scratch(bool wanted) { poisoned.store(wanted, std::memory_order_relaxed); }

void poison(float* scratch, size_t floats) {
  if (poisoned.load(std::memory_order_relaxed))
    std::fill_n(scratch, floats, std::numeric_limits<float>::quiet_NaN());
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
