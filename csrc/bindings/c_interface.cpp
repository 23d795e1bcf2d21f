// Which instruction sets there are and which one runs, for Python to ask through ctypes: C functions need no ABI of
// Python's, so one library serves all its versions.
#include <cstdint>
#include <cstdio>
#include <exception>

#include "../cpu/processor.h"
#include "../cpu/scratch.h"
#include "../cpu/select.h"

extern "C" {

// Makes calls use this instruction set; an empty name returns to the default. 0, or 1 and why that is not possible.
FFNET_EXPORT int ffnet_cpu_select_isa(const char* isa, char* reason, size_t size) {
  try {
    ffnet::select_isa(isa);
    return 0;
  } catch (const std::exception& error) {
    snprintf(reason, size, "%s", error.what());
    return 1;
  }
}

// The name of an instruction set that select_isa takes, slowest first; null beyond the last. Once
// ffnet_cpu_select_isa has answered 0, as all that follows.
FFNET_EXPORT const char* ffnet_cpu_usable_isa(size_t index) {
  const auto& usable = ffnet::usable_kernels();
  return index < usable.size() ? usable[index]->isa : nullptr;
}

// Of the instruction set that calls use: its name, the channels that one vector of it holds, and whether filters of a
// size have code of their own.
FFNET_EXPORT const char* ffnet_cpu_isa() { return ffnet::active_kernels().isa; }
FFNET_EXPORT int ffnet_cpu_lanes() { return ffnet::active_kernels().lanes; }
FFNET_EXPORT int ffnet_cpu_is_unrolled(int64_t kh, int64_t kw) { return ffnet::active_kernels().is_unrolled(kh, kw); }

// An instruction set that this processor runs and this build does not hold; null beyond the last.
FFNET_EXPORT const char* ffnet_cpu_unbuilt_isa(size_t index) {
  for (const char* isa : ffnet::kInstructionSets)
    if (ffnet::processor_runs(isa) && !ffnet::is_built(isa) && index-- == 0) return isa;
  return nullptr;
}

// For tests: whether scratch is handed out full of NaN.
FFNET_EXPORT void ffnet_cpu_poison_scratch(int wanted) { ffnet::poison_scratch(wanted != 0); }

}  // extern "C"
