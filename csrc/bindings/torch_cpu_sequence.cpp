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

const std::string& activation_of(const int64_t* numbers) {
  const int64_t activation = numbers[kActivation];
  STD_TORCH_CHECK(activation >= 0 && activation < int64_t{kActivations.size()},
                  "ffnet_kernels (cpu): a layer of the sequence has an unknown activation");
  return kActivations[activation];
}

Conv2dArguments convolution(const Optional* t, const int64_t* numbers) {
  return {required(t[0]), t[1], std::vector<int64_t>(numbers + kStride, numbers + kPadding),
          std::vector<int64_t>(numbers + kPadding, numbers + kNumbers), activation_of(numbers)};
}

// A layer scale as [C], which may be stored as [C, 1, 1].
Optional flattened(const Optional& scale) {
  if (!scale || scale->dim() != 3 || scale->size(1) != 1 || scale->size(2) != 1) return scale;
  const int64_t channels = scale->size(0), stride = scale->stride(0);
  int64_t offset;
  AtenTensorHandle flat;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(scale->get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(scale->get(), 1, &channels, &stride, offset, &flat));
  return Tensor(flat);
}

Tensor run_layer(const Tensor& x, const Optional* t, const int64_t* numbers, double eps) {
  const Optional residual = numbers[kResidual] ? Optional(x) : std::nullopt;
  switch (numbers[kOperator]) {
    case kConv2d:
    case kDepthwiseConv2d: {
      const Conv2dArguments a = convolution(t, numbers);
      const auto run = numbers[kOperator] == kConv2d ? conv2d : depthwise_conv2d;
      return run(x, a.weight, a.bias, a.stride, a.padding, a.activation);
    }
    case kFfnifiedAttention: {
      // With the projection before it, where the layer has one.
      const Tensor query = t[0] ? conv2d(x, *t[0], t[1], {1, 1}, {0, 0, 0, 0}, "none") : x;
      return ffnified_attention(query, required(t[2]), t[3], required(t[4]), t[5], activation_of(numbers),
                                flattened(t[6]), residual);
    }
    case kPooledLinear: return pooled_linear(x, {t[0], t[1], t[2], t[3], eps}, required(t[4]), t[5]);
    default:
      return channel_mixer(x, required(t[0]), t[1], required(t[2]), t[3], required(t[4]), t[5], activation_of(numbers),
                           flattened(t[6]), residual);
  }
}

Tensor sequence(const Tensor& x, const std::vector<Optional>& tensors, const std::vector<int64_t>& numbers,
                double eps) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % kNumbers == 0, "ffnet_kernels (cpu): expected ",
                  int64_t{kNumbers}, " numbers for each layer of a sequence");
  size_t count = 0;
  for (size_t i = 0; i < numbers.size(); i += kNumbers) {
    const int64_t kind = numbers[i + kOperator];
    STD_TORCH_CHECK(kind >= 0 && kind < kOperators,
                    "ffnet_kernels (cpu): a layer of the sequence has an unknown operator");
    count += kTensors[kind];
  }
  STD_TORCH_CHECK(count == tensors.size(), "ffnet_kernels (cpu): expected ", int64_t(count),
                  " tensors for the layers of the sequence");
  Tensor map = x;
  const Optional* t = tensors.data();
  const int64_t* end = numbers.data() + numbers.size();
  for (const int64_t* layer = numbers.data(); layer != end; layer += kNumbers) {
    const size_t own = kTensors[layer[kOperator]];
    const int64_t* next = layer + kNumbers;
    if (next != end && layer[kOperator] == kConv2d && next[kOperator] == kConv2d) {
      const Optional both = conv2d_pair(map, convolution(t, layer), convolution(t + own, next));
      if (both) {
        map = *both, layer = next, t += own + kTensors[kConv2d];
        continue;
      }
    }
    map = run_layer(map, t, layer, eps);
    t += own;
  }
  return map;
}

}  // namespace
}  // namespace ffnet::cpu_operators

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels, CPU, m) { m.impl("sequence", TORCH_BOX(&ffnet::cpu_operators::sequence)); }
