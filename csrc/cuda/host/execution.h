// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibers, warp collectives and barriers are
// rendezvous between them, shared memory is a heap block of the exact size, filled with NaN. Included by device.h where
// the compiler is not nvcc.
//
// It shows wrong results, reads out of bounds (under AddressSanitizer) and missing barriers (under ThreadSanitizer, or
// as results that depend on the schedule). It does not show bank conflicts, occupancy or the approximations of
// hardware.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace ffnet::host {

constexpr int kWarp = 32;

// How the threads of a block take turns, and when asynchronous copies land: a correct kernel computes the same in all.
enum class Schedule { forward, reverse, shuffled };
void select_schedule(Schedule schedule, uint32_t seed);

struct Index {
  unsigned x, y, z;
};

// Of the thread that runs.
int thread_index();
Index block_index();
Index grid_size();
int block_threads();
unsigned char* shared_memory();

void sync_block();

// A rendezvous of a warp's 32 lanes. The last to arrive runs `compute(inputs, outputs)` for all. `site` names the
// collective: lanes that meet in different ones are a fault.
using Compute = void (*)(const void* const inputs[kWarp], void* const outputs[kWarp]);
void warp_collective(const char* site, const void* input, void* output, Compute compute);

// Asynchronous copies land when their group is waited for; in the reverse schedule at once.
void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void commit_copies();
void wait_for_copies(int groups_left);

[[noreturn]] void fault(const char* what);

// The kernels that this thread of the host has started since the last call, a line each, with tabs between: the name,
// the place of the kernel's code in the library in hexadecimal, by which `nm` tells its template arguments, the blocks.
void record_start(const char* name, const void* code, int64_t blocks);
std::string started_kernels();

// Runs `kernel` for every thread of every block.
void run_grid(Index grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace ffnet::host
