// What the libraries' bindings share. Backend is their name in error messages.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

namespace ffnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Activation>
Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "ffnet_kernels: unknown activation '", name, "'");
}

// torch's own test, by strides: the format a convolution of this tensor would answer in (see operators.py).
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

inline Tensor empty_map(const Tensor& like, std::initializer_list<int64_t> size, bool channels_last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace ffnet
