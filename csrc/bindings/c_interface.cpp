// Instruction sets available and in use, for Python by way of ctypes: C functions do not depend on Python's ABI, so one
// library serves all Python versions.
#include <cstdint>
#include <cstdio>
#include <exception>

#include "../cpu/processor.h"
#include "../cpu/scratch.h"
#include "../cpu/select.h"

extern "C" {

// Restricts calls to this instruction set; an empty name restores the default. Returns 0, or 1 and an error message.
FFNET_EXPORT int ffnet_cpu_select_isa(const char* isa, char* reason, size_t size) {
  try {
    ffnet::select_isa(isa);
    return 0;
  } catch (const std::exception& error) {
    snprintf(reason, size, "%s", error.what());
    return 1;
  }
}

// The name of an instruction set that select_isa accepts, slowest first; null beyond the last. This and the following
// functions need ffnet_cpu_select_isa to have returned 0.
FFNET_EXPORT const char* ffnet_cpu_usable_isa(size_t index) {
  const auto& usable = ffnet::usable_kernels();
  return index < usable.size() ? usable[index]->isa : nullptr;
}

// The instruction set in use: its name, the channels in one vector, and whether filters of a size have specialised
// code.
FFNET_EXPORT const char* ffnet_cpu_isa() { return ffnet::active_kernels().isa; }
FFNET_EXPORT int ffnet_cpu_lanes() { return ffnet::active_kernels().lanes; }
FFNET_EXPORT int ffnet_cpu_is_unrolled(int64_t kh, int64_t kw) { return ffnet::active_kernels().is_unrolled(kh, kw); }

// An instruction set that this processor runs but this build lacks; null beyond the last.
FFNET_EXPORT const char* ffnet_cpu_unbuilt_isa(size_t index) {
  for (const char* isa : ffnet::kInstructionSets)
    if (ffnet::processor_runs(isa) && !ffnet::is_built(isa) && index-- == 0) return isa;
  return nullptr;
}

// For tests: fills scratch memory with NaN before use.
FFNET_EXPORT void ffnet_cpu_poison_scratch(int wanted) { ffnet::poison_scratch(wanted != 0); }

}  // extern "C"
