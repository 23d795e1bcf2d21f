// Shared by the libraries' bindings. Backend is their name in error messages.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>

#include "../activations.h"

namespace ffnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Activation parse_activation(const std::string& name) {
#define FFNET_CASE(known) \
  if (name == #known) return Activation::known;
  FFNET_ACTIVATIONS(FFNET_CASE)
#undef FFNET_CASE
  STD_TORCH_CHECK(false, "ffnet_kernels: unknown activation '", name, "'");
}

// torch's own test, by strides, of the format that a convolution of this tensor would return
// (ffnet_kernels/backends/maps.py).
inline bool suggests_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), stride = t.strides();
  if (stride[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || stride[d] < least || (d == 0 && least == stride[1])) return false;
    least = sizes[d] > 1 ? stride[d] * sizes[d] : stride[d];
  }
  return true;
}

// Allocates a map like torch::stable::empty, which looks up its operator by name in every call; for a small map that
// takes as long as the kernel.
inline Tensor empty_map(const Tensor& like, const std::array<int64_t, 4>& size, bool channels_last) {
  const auto [n, c, h, w] = size;
  const auto at_least_one = [](int64_t x) { return x > 1 ? x : 1; };
  const int64_t row = at_least_one(w), plane = at_least_one(h) * row;
  const std::array<int64_t, 4> stride = channels_last ? std::array<int64_t, 4>{h * w * c, 1, w * c, c}
                                                      : std::array<int64_t, 4>{at_least_one(c) * plane, plane, row, 1};
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, size.data(), stride.data(), dtype, device_type, device_index, &out));
  return Tensor(out);
}

}  // namespace ffnet
