// Selects the instruction set: the best of this processor, or the one asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

// Shared with Python and with the benchmarks' helper, so exported from a library that hides everything else.
#define FFNET_EXPORT __attribute__((visibility("default")))

namespace ffnet {

// The instruction sets that this build has and this processor (and its operating system) runs, slowest first, up to the
// one that the environment variable FFNET_KERNELS_ISA names. Throws std::invalid_argument if there is none of that
// name.
FFNET_EXPORT const std::vector<const Kernels*>& usable_kernels();

// The kernels in use: those of `select_isa`, otherwise the fastest. Throws like usable_kernels.
FFNET_EXPORT const Kernels& active_kernels();

// Makes `isa` the active one; an empty name restores the default. Throws std::invalid_argument.
FFNET_EXPORT void select_isa(const std::string& isa);

// Whether this build has kernels for an instruction set, whether or not the processor runs it.
bool is_built(const std::string& isa);

}  // namespace ffnet
