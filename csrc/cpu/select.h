// Which instruction set runs: the best of this processor, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

// Shared with Python and with the benchmarks' helper, so exported from a library that hides everything else.
#define FFNET_EXPORT __attribute__((visibility("default")))

namespace ffnet {

// Those that this build holds and this processor (and its operating system) runs, slowest first, up to the one that the
// environment variable FFNET_KERNELS_ISA names. Throws std::invalid_argument where there is none of that name.
FFNET_EXPORT const std::vector<const Kernels*>& usable_kernels();

// The kernels calls use: those of `select_isa`, else the fastest. Throws as usable_kernels does.
FFNET_EXPORT const Kernels& active_kernels();

// Makes `isa` the active one; an empty name returns to the default. Throws std::invalid_argument.
FFNET_EXPORT void select_isa(const std::string& isa);

// Whether this build holds kernels for an instruction set, whatever the processor runs.
bool is_built(const std::string& isa);

}  // namespace ffnet
