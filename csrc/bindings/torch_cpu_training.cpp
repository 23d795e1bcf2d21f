// The CPU kernels of training steps as operators, for ffnet_kernels/training.py, which checks the arguments; what
// memory safety needs is checked here again.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/training.h"
#include "torch_cpu_arguments.h"

namespace {

using ffnet::empty_map;
using ffnet::ScalarType;
using ffnet::Tensor;
using ffnet::cpu_arguments::executor;
using ffnet::cpu_arguments::has_size;
using ffnet::cpu_arguments::is_pixel_matrix;
using ffnet::cpu_arguments::parse_activation;
using ffnet::cpu_arguments::pixels;
using ffnet::cpu_arguments::strides;

void check_float_cpu(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dim, "ffnet_kernels (cpu): ", name,
                  " must be a ", dim, "-dimensional float32 CPU tensor");
}

const float* vector_of(const Tensor& t, const char* name, int64_t size) {
  check_float_cpu(t, name, 1);
  STD_TORCH_CHECK(t.size(0) == size && t.is_contiguous(), "ffnet_kernels (cpu): ", name, " must be ", size,
                  " contiguous elements");
  return t.const_data_ptr<float>();
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device());
}

Tensor empty_channels_last(const Tensor& like, int64_t channels, int64_t h, int64_t w) {
  return empty_map(like, {like.size(0), channels, h, w}, true);
}

// Everything but the result; `mean` and `variance` are [branches, outputs] and belong to it in the forward pass.
ffnet::BranchedDepthwise branched(const Tensor& x, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& gammas, const std::vector<Tensor>& betas,
                                  const std::vector<double>& eps, float* mean, float* variance,
                                  const std::vector<int64_t>& stride, const std::string& activation) {
  check_float_cpu(x, "x", 4);
  const size_t branches = weights.size();
  STD_TORCH_CHECK(branches >= 1 && branches <= ffnet::kMaxBranches && gammas.size() == branches &&
                      betas.size() == branches && eps.size() == branches,
                  "ffnet_kernels (cpu): expected 1 or ", ffnet::kMaxBranches,
                  " branches, each with gamma, beta and eps");
  STD_TORCH_CHECK(stride.size() == 2 && (stride[0] == 1 || stride[0] == 2) && (stride[1] == 1 || stride[1] == 2),
                  "ffnet_kernels (cpu): stride must be two numbers, each 1 or 2");
  ffnet::BranchedDepthwise op{};
  op.n = x.size(0), op.channels = x.size(1), op.h = x.size(2), op.w = x.size(3);
  const int64_t outputs = weights[0].size(0);
  STD_TORCH_CHECK(op.n > 0 && op.channels > 0 && op.h > 0 && op.w > 0 && outputs > 0 && outputs % op.channels == 0,
                  "ffnet_kernels (cpu): x must not be empty, a weight must have a multiple of its channels");
  op.multiplier = outputs / op.channels;
  op.stride_h = stride[0], op.stride_w = stride[1];
  op.out_h = (op.h - 1) / op.stride_h + 1, op.out_w = (op.w - 1) / op.stride_w + 1;
  op.x = x.const_data_ptr<float>(), op.x_stride = strides(x);
  op.branches = static_cast<int>(branches);
  for (size_t b = 0; b < branches; ++b) {
    const Tensor& weight = weights[b];
    check_float_cpu(weight, "weight", 4);
    STD_TORCH_CHECK(
        weight.size(0) == outputs && weight.size(1) == 1 && weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1,
        "ffnet_kernels (cpu): a weight must be [outputs, 1, kh, kw], kh and kw odd");
    op.branch[b] = {{weight.const_data_ptr<float>(), nullptr, weight.size(2), weight.size(3), weight.stride(0),
                     weight.stride(2), weight.stride(3)},
                    vector_of(gammas[b], "gamma", outputs),
                    vector_of(betas[b], "beta", outputs),
                    static_cast<float>(eps[b]),
                    mean + static_cast<int64_t>(b) * outputs,
                    variance + static_cast<int64_t>(b) * outputs};
  }
  op.activation = parse_activation(activation);
  return op;
}

std::tuple<Tensor, Tensor, Tensor> branched_depthwise(const Tensor& x, const std::vector<Tensor>& weights,
                                                      const std::vector<Tensor>& gammas,
                                                      const std::vector<Tensor>& betas, const std::vector<double>& eps,
                                                      const std::vector<int64_t>& stride,
                                                      const std::string& activation) {
  STD_TORCH_CHECK(!weights.empty() && weights[0].dim() == 4, "ffnet_kernels (cpu): expected a weight");
  const std::vector<int64_t> size{static_cast<int64_t>(weights.size()), weights[0].size(0)};
  Tensor mean = empty(x, size), variance = empty(x, size);
  ffnet::BranchedDepthwise op = branched(x, weights, gammas, betas, eps, mean.mutable_data_ptr<float>(),
                                         variance.mutable_data_ptr<float>(), stride, activation);
  Tensor out = empty_channels_last(x, weights[0].size(0), op.out_h, op.out_w);
  op.out = out.mutable_data_ptr<float>(), op.out_stride = strides(out);
  ffnet::active_kernels().branched_depthwise(op, executor());
  return {out, mean, variance};
}

// The gradient of x (undefined contents unless wanted), then weight, gamma and beta of each branch.
std::vector<Tensor> branched_depthwise_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights,
                                                const std::vector<Tensor>& gammas, const std::vector<Tensor>& betas,
                                                const Tensor& mean, const Tensor& variance,
                                                const std::vector<double>& eps, const std::string& activation,
                                                bool wants_x) {
  check_float_cpu(grad, "grad", 4);
  STD_TORCH_CHECK(!weights.empty() && weights[0].dim() == 4, "ffnet_kernels (cpu): expected a weight");
  const int64_t outputs = weights[0].size(0), branches = static_cast<int64_t>(weights.size());
  for (const Tensor& statistic : {mean, variance}) {
    check_float_cpu(statistic, "a statistic", 2);
    STD_TORCH_CHECK(statistic.is_contiguous() && statistic.size(0) == branches && statistic.size(1) == outputs,
                    "ffnet_kernels (cpu): statistics must be [branches, outputs]");
  }
  ffnet::BranchedDepthwiseBackward op{};
  op.forward = branched(x, weights, gammas, betas, eps, const_cast<float*>(mean.const_data_ptr<float>()),
                        const_cast<float*>(variance.const_data_ptr<float>()), {1, 1}, activation);
  STD_TORCH_CHECK(op.forward.multiplier == 1, "ffnet_kernels (cpu): expected one output per channel");
  STD_TORCH_CHECK(grad.size(0) == op.forward.n && grad.size(1) == outputs && grad.size(2) == op.forward.h &&
                      grad.size(3) == op.forward.w,
                  "ffnet_kernels (cpu): grad must have the result's shape");
  op.grad = grad.const_data_ptr<float>(), op.grad_stride = strides(grad);
  std::vector<Tensor> gradients;
  if (wants_x) {
    Tensor x_grad = empty_channels_last(x, x.size(1), x.size(2), x.size(3));
    op.x_grad = x_grad.mutable_data_ptr<float>(), op.x_grad_stride = strides(x_grad);
    gradients.push_back(x_grad);
  }
  for (size_t b = 0; b < weights.size(); ++b) {
    Tensor weight = empty(x, {outputs, 1, weights[b].size(2), weights[b].size(3)}), gamma = empty(x, {outputs}),
           beta = empty(x, {outputs});
    op.gradients[b] = {weight.mutable_data_ptr<float>(), gamma.mutable_data_ptr<float>(),
                       beta.mutable_data_ptr<float>()};
    for (const Tensor& gradient : {weight, gamma, beta}) gradients.push_back(gradient);
  }
  ffnet::active_kernels().branched_depthwise_backward(op, executor());
  return gradients;
}

// The data of a matrix [pixels][channels] with the pixels of `like`.
const float* pixels_of(const Tensor& map, const char* name, const Tensor& like, int64_t channels) {
  check_float_cpu(map, name, 4);
  const int64_t n = like.size(0), h = like.size(2), w = like.size(3);
  STD_TORCH_CHECK(is_pixel_matrix(map) && has_size(map, {n, channels, h, w}), "ffnet_kernels (cpu): ", name,
                  " must be a dense channels-last map of [", n, ", ", channels, ", ", h, ", ", w, "]");
  return map.const_data_ptr<float>();
}

const float* matrix_of(const Tensor& weight, const char* name, int64_t columns) {
  check_float_cpu(weight, name, 2);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) > 0 && weight.size(1) == columns,
                  "ffnet_kernels (cpu): ", name, " must be a contiguous matrix of ", columns, " columns");
  return weight.const_data_ptr<float>();
}

const float* optional_vector(const std::optional<Tensor>& t, const char* name, int64_t size) {
  return t ? vector_of(*t, name, size) : nullptr;
}

ffnet::FeedForward feed_forward_of(const Tensor& x, const Tensor& expand_weight,
                                   const std::optional<Tensor>& expand_bias, const Tensor& project_weight,
                                   const std::optional<Tensor>& project_bias, const std::string& activation,
                                   const std::optional<Tensor>& scale) {
  check_float_cpu(x, "x", 4);
  STD_TORCH_CHECK(x.numel() > 0, "ffnet_kernels (cpu): x must not be empty");
  const int64_t channels = x.size(1), hidden = expand_weight.size(0), outputs = project_weight.size(0);
  ffnet::FeedForward op{};
  op.pixels = pixels(x), op.channels = channels, op.hidden = hidden, op.outputs = outputs;
  op.x = pixels_of(x, "x", x, channels);
  op.expand = matrix_of(expand_weight, "expand_weight", channels);
  op.project = matrix_of(project_weight, "project_weight", hidden);
  op.expand_bias = optional_vector(expand_bias, "expand_bias", hidden);
  op.project_bias = optional_vector(project_bias, "project_bias", outputs);
  op.activation = parse_activation(activation);
  op.scale = optional_vector(scale, "scale", outputs);
  return op;
}

// The result and z, the hidden map before its activation.
std::tuple<Tensor, Tensor> feed_forward(const Tensor& x, const Tensor& expand_weight,
                                        const std::optional<Tensor>& expand_bias, const Tensor& project_weight,
                                        const std::optional<Tensor>& project_bias, const std::string& activation,
                                        const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  ffnet::FeedForward op =
      feed_forward_of(x, expand_weight, expand_bias, project_weight, project_bias, activation, scale);
  if (residual) op.residual = pixels_of(*residual, "residual", x, op.outputs);
  Tensor z = empty_channels_last(x, op.hidden, x.size(2), x.size(3)),
         out = empty_channels_last(x, op.outputs, x.size(2), x.size(3));
  op.z = z.mutable_data_ptr<float>(), op.out = out.mutable_data_ptr<float>();
  ffnet::active_kernels().feed_forward(op, executor());
  return {out, z};
}

// Gradients of x, if wanted, expand_weight, expand_bias, project_weight, project_bias (whether or not there are
// biases), and, where there is one, of the scale.
std::vector<Tensor> feed_forward_backward(const Tensor& grad, const Tensor& x, const Tensor& z,
                                          const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                                          const Tensor& project_weight, const std::optional<Tensor>& project_bias,
                                          const std::string& activation, const std::optional<Tensor>& scale,
                                          bool wants_x) {
  ffnet::FeedForwardBackward op{};
  ffnet::FeedForward& f = op.forward;
  f = feed_forward_of(x, expand_weight, expand_bias, project_weight, project_bias, activation, scale);
  f.z = const_cast<float*>(pixels_of(z, "z", x, f.hidden));
  op.grad = pixels_of(grad, "grad", x, f.outputs);
  std::vector<Tensor> gradients;
  const auto add = [&](Tensor gradient) {
    gradients.push_back(gradient);
    return gradient.mutable_data_ptr<float>();
  };
  if (wants_x) op.x_grad = add(empty_channels_last(x, f.channels, x.size(2), x.size(3)));
  op.expand_grad = add(empty(x, {f.hidden, f.channels})), op.expand_bias_grad = add(empty(x, {f.hidden}));
  op.project_grad = add(empty(x, {f.outputs, f.hidden})), op.project_bias_grad = add(empty(x, {f.outputs}));
  if (scale) op.scale_grad = add(empty(x, {f.outputs}));
  ffnet::active_kernels().feed_forward_backward(op, executor());
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_training, CPU, m) {
  m.impl("branched_depthwise", TORCH_BOX(&branched_depthwise));
  m.impl("branched_depthwise_backward", TORCH_BOX(&branched_depthwise_backward));
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
}
