// The CPU's inference operators, defined in torch_cpu.cpp; their schemas are in ffnet_kernels/ops/schemas.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch_common.h"

namespace ffnet::cpu_operators {

using Optional = std::optional<Tensor>;
using Numbers = std::vector<int64_t>;

Tensor conv2d(const Tensor& x, const Tensor& weight, const Optional& bias, const Numbers& stride,
              const Numbers& padding, const std::string& activation, const Optional& scale, const Optional& residual);
Tensor conv2d_pair(const Tensor& x, const Tensor& weight, const Optional& bias, const Numbers& stride,
                   const Numbers& padding, const std::string& activation, const Tensor& next_weight,
                   const Optional& next_bias, const Numbers& next_stride, const Numbers& next_padding,
                   const std::string& next_activation);
Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const Optional& bias, const Numbers& stride,
                        const Numbers& padding, const std::string& activation);
Tensor ffnified_attention(const Tensor& query, const Tensor& key, const Optional& key_bias, const Tensor& value,
                          const Optional& value_bias, const std::string& activation, const Optional& scale,
                          const Optional& residual);
Tensor channel_mixer(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& expand_weight,
                     const Optional& expand_bias, const Tensor& project_weight, const Optional& project_bias,
                     const std::string& activation, const Optional& scale, const Optional& residual);
Tensor norm_mixer(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& norm_weight,
                  const Optional& norm_bias, double eps, const Tensor& expand_weight, const Optional& expand_bias,
                  const Tensor& project_weight, const Optional& project_bias, const std::string& activation,
                  const Optional& scale, const Optional& residual);

}  // namespace ffnet::cpu_operators
