// The CPU's forward operators, called by torch's dispatcher one by one (torch_cpu.cpp) or in a row
// (torch_cpu_sequence.cpp). Arguments are those of the schemas in ffnet_kernels/operators.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch_common.h"

namespace ffnet::cpu_operators {

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::string& activation);

Tensor conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::string& activation);

struct Conv2dArguments {
  const Tensor& weight;
  std::optional<Tensor> bias;
  std::vector<int64_t> stride, padding;
  std::string activation;
};

// One after the other without a map between them; nothing where no kernel does that.
std::optional<Tensor> conv2d_pair(const Tensor& x, const Conv2dArguments& first, const Conv2dArguments& second);

Tensor ffnified_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias,
                          const Tensor& value, const std::optional<Tensor>& value_bias, const std::string& activation,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& residual);

Tensor channel_mixer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                     const Tensor& project_weight, const std::optional<Tensor>& project_bias,
                     const std::string& activation, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual);

// A normalisation by running statistics, all of its tensors or none, before the product.
struct Norm {
  std::optional<Tensor> weight, bias, mean, variance;
  double eps;
};

// weight * norm(mean of the pixels of x) + bias: [N, C, H, W] to [N, O].
Tensor pooled_linear(const Tensor& x, const Norm& norm, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace ffnet::cpu_operators
