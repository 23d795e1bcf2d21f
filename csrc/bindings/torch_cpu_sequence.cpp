// Layers of a model in a row, as one operator: what lies between them is a call in C++ instead of one through Python.
// ffnet_kernels/sequence.py writes the arguments.
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "torch_cpu.h"

namespace ffnet::cpu_operators {
namespace {

using Optional = std::optional<Tensor>;

// Of one layer in `numbers`; the order is that of sequence.py.
enum Number : size_t { kOperator, kActivation, kResidual, kStride, kPadding = kStride + 2, kNumbers = kPadding + 4 };
enum Operator : int64_t { kConv2d, kDepthwiseConv2d, kFfnifiedAttention, kChannelMixer, kPooledLinear, kOperators };
constexpr std::array<size_t, kOperators> kTensors = {2, 2, 7, 7, 6};
const std::array<std::string, 5> kActivations = {"none", "gelu", "gelu_tanh", "relu", "silu"};

const Tensor& required(const Optional& tensor) {
  STD_TORCH_CHECK(tensor.has_value(), "ffnet_kernels (cpu): a layer of the sequence lacks a weight");
  return *tensor;
}

Tensor run_layer(const Tensor& x, const Optional* tensors, const int64_t* numbers, double eps) {
  const auto is_bool = [](int64_t number) { return number == 0 || number == 1; };
  STD_TORCH_CHECK(
      numbers[kActivation] >= 0 && numbers[kActivation] < int64_t{kActivations.size()} && is_bool(numbers[kResidual]),
      "ffnet_kernels (cpu): a layer of the sequence has unknown options");
  const std::string& activation = kActivations[numbers[kActivation]];
  const Optional residual = numbers[kResidual] ? Optional(x) : std::nullopt;
  const Optional* t = tensors;
  switch (numbers[kOperator]) {
    case kConv2d:
    case kDepthwiseConv2d: {
      const std::vector<int64_t> stride(numbers + kStride, numbers + kPadding);
      const std::vector<int64_t> padding(numbers + kPadding, numbers + kNumbers);
      const auto run = numbers[kOperator] == kConv2d ? conv2d : depthwise_conv2d;
      return run(x, required(t[0]), t[1], stride, padding, activation);
    }
    case kFfnifiedAttention: {
      // With the projection before it, where the layer has one.
      const Tensor query = t[0] ? conv2d(x, *t[0], t[1], {1, 1}, {0, 0, 0, 0}, "none") : x;
      return ffnified_attention(query, required(t[2]), t[3], required(t[4]), t[5], activation, t[6], residual);
    }
    case kPooledLinear: return pooled_linear(x, {t[0], t[1], t[2], t[3], eps}, required(t[4]), t[5]);
    default:
      return channel_mixer(x, required(t[0]), t[1], required(t[2]), t[3], required(t[4]), t[5], activation, t[6],
                           residual);
  }
}

Tensor sequence(const Tensor& x, const std::vector<Optional>& tensors, const std::vector<int64_t>& numbers,
                double eps) {
  STD_TORCH_CHECK(numbers.size() % kNumbers == 0, "ffnet_kernels (cpu): expected ", int64_t{kNumbers},
                  " numbers for each layer of the sequence");
  Tensor map = x;
  size_t used = 0;
  for (const int64_t* layer = numbers.data(); layer != numbers.data() + numbers.size(); layer += kNumbers) {
    STD_TORCH_CHECK(layer[kOperator] >= 0 && layer[kOperator] < kOperators,
                    "ffnet_kernels (cpu): a layer of the sequence has an unknown operator");
    const size_t count = kTensors[layer[kOperator]];
    STD_TORCH_CHECK(tensors.size() - used >= count, "ffnet_kernels (cpu): the sequence has too few tensors");
    map = run_layer(map, tensors.data() + used, layer, eps);
    used += count;
  }
  STD_TORCH_CHECK(used == tensors.size() && used > 0, "ffnet_kernels (cpu): expected the tensors of ",
                  int64_t(numbers.size() / kNumbers), " layers, at least one");
  return map;
}

}  // namespace
}  // namespace ffnet::cpu_operators

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels, CPU, m) { m.impl("sequence", TORCH_BOX(&ffnet::cpu_operators::sequence)); }
