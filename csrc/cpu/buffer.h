// Memory for one call, shared by its tasks. No standard container: its functions, compiled for this instruction set,
// could be linked into the baseline.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace ffnet::FFNET_ISA {

struct Buffer {
  float* data;
  explicit Buffer(int64_t floats)
      : data(static_cast<float*>(std::malloc(static_cast<size_t>(floats) * sizeof(float)))) {
    if (!data) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

}  // namespace ffnet::FFNET_ISA
