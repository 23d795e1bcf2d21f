// Runs the CPU kernels' tasks on torch's threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "../cpu/kernels.h"
#include "torch_common.h"

namespace ffnet {

// Threads take the next index when they finish one, so that a stolen core does not hold up the rest.
inline void run_on_torch_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
  });
}

inline Executor executor() { return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_threads}; }

}  // namespace ffnet
