#include "select.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "processor.h"

namespace ffnet {
namespace {

// The instruction sets in this build, slowest first.
constexpr const Kernels* (*kTables[])() = {FFNET_TABLES};

// Those of them that this processor runs.
std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> usable;
  for (const auto table : kTables)
    if (processor_runs(table()->isa)) usable.push_back(table());
  return usable;
}

[[noreturn]] void refuse(const std::string& origin, const std::string& isa, const std::string& names) {
  throw std::invalid_argument(origin + " names the instruction set '" + isa + "', but there are: " + names);
}

// FFNET_KERNELS_ISA restricts the processor to an instruction set and those below it.
std::vector<const Kernels*> detect_up_to_limit() {
  const char* limit = std::getenv("FFNET_KERNELS_ISA");
  if (!limit || !*limit) return detect();
  std::string names;
  for (const char* isa : kInstructionSets) {
    names += (names.empty() ? "" : ", ") + std::string(isa);
    if (std::strcmp(isa, limit) != 0) continue;
    std::vector<const Kernels*> usable = detect();
    while (!usable.empty() && is_better(usable.back()->isa, limit)) usable.pop_back();
    return usable;
  }
  refuse("FFNET_KERNELS_ISA", limit, names);
}

std::atomic<const Kernels*> active{nullptr};

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
  const Kernels* chosen = isa.empty() ? usable_kernels().back() : nullptr;
  std::string names;
  for (const Kernels* kernels : usable_kernels()) {
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
    if (isa == kernels->isa) chosen = kernels;
  }
  if (!chosen) refuse("select_isa", isa, names);
  active.store(chosen, std::memory_order_relaxed);
}

bool is_built(const std::string& isa) {
  return std::any_of(std::begin(kTables), std::end(kTables), [&](auto table) { return isa == table()->isa; });
}

}  // namespace ffnet
