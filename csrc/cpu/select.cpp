#include "select.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

namespace ffnet {
namespace {

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

const Kernels* find(const std::string& isa, const char* origin) {
  std::string names;
  for (const Kernels* kernels : usable_kernels()) {
    if (isa == kernels->isa) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument(std::string(origin) + " names the instruction set '" + isa +
                              "', but this build and processor run: " + names);
}

const Kernels* default_kernels() {
  const char* name = std::getenv("FFNET_KERNELS_ISA");
  return name && *name ? find(name, "FFNET_KERNELS_ISA") : usable_kernels().back();
}

std::atomic<const Kernels*> active{nullptr};

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable = detect();
  return usable;
}

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) active.store(kernels = default_kernels(), std::memory_order_relaxed);
  return *kernels;
}

void select_isa(const std::string& isa) {
  active.store(isa.empty() ? default_kernels() : find(isa, "select_isa"), std::memory_order_relaxed);
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
  return buffer.get();
}

}  // namespace ffnet
