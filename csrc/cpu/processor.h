// Detects the instruction sets that this processor and operating system support, when a library is loaded and in the
// build.
#pragma once

#include <cstring>

namespace ffnet {

// Slowest first.
constexpr const char* kInstructionSets[] = {"baseline", "avx2", "avx512", "avx512bf16"};

// Of two of them.
inline bool is_better(const char* isa, const char* than) {
  for (const char* name : kInstructionSets) {
    if (std::strcmp(name, isa) == 0) return false;
    if (std::strcmp(name, than) == 0) return true;
  }
  return false;
}

inline bool processor_runs(const char* isa) {
  const auto is = [&](const char* name) { return std::strcmp(isa, name) == 0; };
  if (is("baseline")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();  // also checks XGETBV, as registers that the operating system does not save cannot be used
  if (is("avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (is("avx512")) return avx512;
  if (is("avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

}  // namespace ffnet
