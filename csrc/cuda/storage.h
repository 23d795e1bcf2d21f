// From the storage type of a call to that of its kernel. What a kernel does not take is refused here, whoever calls:
// read as another type it would give wrong numbers, and of another size it would pass the end of the maps.
#pragma once

#include <stdexcept>

#include "kernels.h"
#include "types.h"

namespace ffnet {

// f of a 16-bit element: of the kernels on tensor cores. Throws std::invalid_argument for any other.
template <class F>
void with_16_bit_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float16: return f(Half{});
    case Dtype::bfloat16: return f(BFloat16{});
    default: throw std::invalid_argument("ffnet_kernels (cuda): this kernel takes float16 and bfloat16");
  }
}

// f of an element. Throws std::invalid_argument where there is no such type.
template <class F>
void with_storage(Dtype dtype, const F& f) {
  dtype == Dtype::float32 ? f(0.0f) : with_16_bit_storage(dtype, f);
}

}  // namespace ffnet
