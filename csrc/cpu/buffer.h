// Memory for one call, shared by its tasks. No standard container: its functions, compiled for this instruction set,
// could be linked into the baseline.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

// Aligned, so that no vector straddles two cache lines.
class Buffer {
 public:
  float* data;
  explicit Buffer(int64_t floats) : block_(std::malloc(static_cast<size_t>(floats) * sizeof(float) + kLine)) {
    if (!block_) throw std::bad_alloc();
    data = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(block_) + kLine - 1) / kLine * kLine);
    poison(data, static_cast<size_t>(floats));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(block_); }

 private:
  static constexpr size_t kLine = 64;
  void* block_;
};

}  // namespace ffnet::FFNET_ISA
