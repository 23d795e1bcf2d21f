// The CPU kernels of training steps as operators, for ffnet_kernels.training, which checks the arguments; checks for
// memory safety are repeated here.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/training.h"
#include "torch_cpu_arguments.h"

namespace {

using ffnet::empty_map;
using ffnet::parse_activation;
using ffnet::ScalarType;
using ffnet::Tensor;
using ffnet::cpu_arguments::executor;
using ffnet::cpu_arguments::has_size;
using ffnet::cpu_arguments::is_pixel_matrix;
using ffnet::cpu_arguments::pixels;
using ffnet::cpu_arguments::storage;
using ffnet::cpu_arguments::strides;

void check_float_cpu(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dim, "ffnet_kernels (cpu): ", name,
                  " must be a ", dim, "-dimensional float32 CPU tensor");
}

// Maps and weights have x's dtype.
void check_like(const Tensor& t, const char* name, int64_t dim, const Tensor& x) {
  ffnet::cpu_arguments::check_map(x, "x");
  ffnet::cpu_arguments::check_cpu(t, name, dim, x);
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

// The arguments of a normalisation.
Tensor empty_float(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::empty(size, ScalarType::Float, std::nullopt, like.device());
}

Tensor empty_channels_last(const Tensor& like, int64_t channels, int64_t h, int64_t w) {
  return empty_map(like, {like.size(0), channels, h, w}, true);
}

// The data of a matrix [pixels][channels] with the pixels and the dtype of `like`.
const void* pixels_of(const Tensor& map, const char* name, const Tensor& like, int64_t channels) {
  check_like(map, name, 4, like);
  const int64_t n = like.size(0), h = like.size(2), w = like.size(3);
  STD_TORCH_CHECK(is_pixel_matrix(map) && has_size(map, {n, channels, h, w}), "ffnet_kernels (cpu): ", name,
                  " must be a dense channels-last map of [", n, ", ", channels, ", ", h, ", ", w, "]");
  return map.const_data_ptr();
}
const float* float_pixels_of(const Tensor& map, const char* name, const Tensor& like, int64_t channels) {
  check_float_cpu(map, name, 4);
  return static_cast<const float*>(pixels_of(map, name, like, channels));
}

// One row of `mean` and `variance` belongs to each normalisation.
ffnet::Norm norm_of(const Tensor& gamma, const Tensor& beta, double eps, float* mean, float* variance,
                    int64_t channels) {
  return {vector_of(gamma, "gamma", channels), vector_of(beta, "beta", channels), static_cast<float>(eps), mean,
          variance};
}

// The data of statistics of `norms` layers; they are written in the forward pass only.
float* statistic_of(const Tensor& statistic, int64_t norms, int64_t channels) {
  STD_TORCH_CHECK(statistic.is_cpu() && statistic.scalar_type() == ScalarType::Float && statistic.is_contiguous() &&
                      statistic.numel() == norms * channels,
                  "ffnet_kernels (cpu): statistics must be ", norms, " x ", channels, " contiguous elements");
  return const_cast<float*>(statistic.const_data_ptr<float>());
}

ffnet::BatchNorm batch_norm_of(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& mean,
                               const Tensor& variance, double eps, const std::string& activation) {
  ffnet::cpu_arguments::check_map(x, "x");
  STD_TORCH_CHECK(x.numel() > 0, "ffnet_kernels (cpu): x must not be empty");
  const int64_t channels = x.size(1);
  ffnet::BatchNorm op{};
  op.storage = storage(x);
  op.pixels = pixels(x), op.channels = channels;
  op.x = pixels_of(x, "x", x, channels);
  op.norm = norm_of(gamma, beta, eps, statistic_of(mean, 1, channels), statistic_of(variance, 1, channels), channels);
  op.activation = parse_activation(activation);
  return op;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                                              const std::string& activation) {
  ffnet::cpu_arguments::check_map(x, "x");
  const int64_t channels = x.size(1);
  Tensor mean = empty_float(x, {channels}), variance = empty_float(x, {channels}),
         out = empty_channels_last(x, channels, x.size(2), x.size(3));
  ffnet::BatchNorm op = batch_norm_of(x, gamma, beta, mean, variance, eps, activation);
  op.out = out.mutable_data_ptr();
  ffnet::active_kernels().batch_norm(op, executor());
  return {out, mean, variance};
}

// Gradients of x, if wanted, gamma and beta.
std::vector<Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                        const Tensor& mean, const Tensor& variance, double eps,
                                        const std::string& activation, bool wants_x) {
  ffnet::BatchNormBackward op{};
  op.forward = batch_norm_of(x, gamma, beta, mean, variance, eps, activation);
  op.grad = pixels_of(grad, "grad", x, x.size(1));
  std::vector<Tensor> gradients;
  if (wants_x) {
    gradients.push_back(empty_channels_last(x, x.size(1), x.size(2), x.size(3)));
    op.x_grad = gradients.back().mutable_data_ptr();
  }
  Tensor gamma_grad = empty_float(x, {x.size(1)}), beta_grad = empty_float(x, {x.size(1)});
  op.gradients = {gamma_grad.mutable_data_ptr<float>(), beta_grad.mutable_data_ptr<float>()};
  gradients.push_back(gamma_grad), gradients.push_back(beta_grad);
  ffnet::active_kernels().batch_norm_backward(op, executor());
  return gradients;
}

// The parameters of the branches, of which there are one or two.
struct Branches {
  const Tensor &weight, &gamma, &beta;
  const std::optional<Tensor>&other_weight, &other_gamma, &other_beta;
  const std::vector<double>& eps;

  int count() const { return other_weight ? 2 : 1; }
  int64_t outputs() const {
    STD_TORCH_CHECK(weight.dim() == 4, "ffnet_kernels (cpu): a weight must be [outputs, 1, kh, kw]");
    return weight.size(0);
  }

  ffnet::Branch branch(int b, const Tensor& x, float* mean, float* variance) const {
    const Tensor& filter = b == 0 ? weight : *other_weight;
    check_like(filter, "weight", 4, x);
    STD_TORCH_CHECK(
        filter.size(0) == outputs() && filter.size(1) == 1 && filter.size(2) % 2 == 1 && filter.size(3) % 2 == 1,
        "ffnet_kernels (cpu): a weight must be [outputs, 1, kh, kw], kh and kw odd");
    return {{filter.const_data_ptr(), nullptr, filter.size(2), filter.size(3), filter.stride(0), filter.stride(2),
             filter.stride(3)},
            norm_of(b == 0 ? gamma : *other_gamma, b == 0 ? beta : *other_beta, eps[static_cast<size_t>(b)],
                    mean + b * outputs(), variance + b * outputs(), outputs())};
  }

  // All arguments except the result.
  ffnet::BranchedDepthwise of(const Tensor& x, const Tensor& mean, const Tensor& variance,
                              const std::vector<int64_t>& stride, const std::string& activation) const {
    ffnet::cpu_arguments::check_map(x, "x");
    STD_TORCH_CHECK(eps.size() == static_cast<size_t>(count()) && other_weight.has_value() == other_gamma.has_value() &&
                        other_weight.has_value() == other_beta.has_value(),
                    "ffnet_kernels (cpu): expected 1 or 2 branches, each with gamma, beta and eps");
    STD_TORCH_CHECK(stride.size() == 2 && (stride[0] == 1 || stride[0] == 2) && (stride[1] == 1 || stride[1] == 2),
                    "ffnet_kernels (cpu): stride must be two numbers, each 1 or 2");
    ffnet::BranchedDepthwise op{};
    op.storage = storage(x);
    op.n = x.size(0), op.channels = x.size(1), op.h = x.size(2), op.w = x.size(3);
    STD_TORCH_CHECK(
        op.n > 0 && op.channels > 0 && op.h > 0 && op.w > 0 && outputs() > 0 && outputs() % op.channels == 0,
        "ffnet_kernels (cpu): x must not be empty, a weight must have a multiple of its channels");
    op.multiplier = outputs() / op.channels;
    op.stride_h = stride[0], op.stride_w = stride[1];
    op.out_h = (op.h - 1) / op.stride_h + 1, op.out_w = (op.w - 1) / op.stride_w + 1;
    op.x = x.const_data_ptr(), op.x_stride = strides(x);
    op.branches = count();
    for (int b = 0; b < count(); ++b)
      op.branch[b] = branch(b, x, statistic_of(mean, count(), outputs()), statistic_of(variance, count(), outputs()));
    op.activation = parse_activation(activation);
    return op;
  }
};

std::tuple<Tensor, Tensor, Tensor> branched_depthwise(const Tensor& x, const Tensor& weight, const Tensor& gamma,
                                                      const Tensor& beta, const std::optional<Tensor>& other_weight,
                                                      const std::optional<Tensor>& other_gamma,
                                                      const std::optional<Tensor>& other_beta,
                                                      const std::vector<double>& eps,
                                                      const std::vector<int64_t>& stride,
                                                      const std::string& activation) {
  const Branches branches{weight, gamma, beta, other_weight, other_gamma, other_beta, eps};
  const std::vector<int64_t> size{branches.count(), branches.outputs()};
  Tensor mean = empty_float(x, size), variance = empty_float(x, size);
  ffnet::BranchedDepthwise op = branches.of(x, mean, variance, stride, activation);
  Tensor out = empty_channels_last(x, branches.outputs(), op.out_h, op.out_w);
  op.out = out.mutable_data_ptr(), op.out_stride = strides(out);
  ffnet::active_kernels().branched_depthwise(op, executor());
  return {out, mean, variance};
}

// The gradient of x, if wanted, then weight, gamma and beta of each branch.
std::vector<Tensor> branched_depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                const Tensor& gamma, const Tensor& beta,
                                                const std::optional<Tensor>& other_weight,
                                                const std::optional<Tensor>& other_gamma,
                                                const std::optional<Tensor>& other_beta, const Tensor& mean,
                                                const Tensor& variance, const std::vector<double>& eps,
                                                const std::string& activation, bool wants_x) {
  check_like(grad, "grad", 4, x);
  const Branches branches{weight, gamma, beta, other_weight, other_gamma, other_beta, eps};
  const int64_t outputs = branches.outputs();
  ffnet::BranchedDepthwiseBackward op{};
  op.forward = branches.of(x, mean, variance, {1, 1}, activation);
  STD_TORCH_CHECK(op.forward.multiplier == 1, "ffnet_kernels (cpu): expected one output per channel");
  STD_TORCH_CHECK(has_size(grad, {op.forward.n, outputs, op.forward.h, op.forward.w}),
                  "ffnet_kernels (cpu): grad must have the result's shape");
  op.grad = grad.const_data_ptr(), op.grad_stride = strides(grad);
  std::vector<Tensor> gradients;
  if (wants_x) {
    gradients.push_back(empty_channels_last(x, x.size(1), x.size(2), x.size(3)));
    op.x_grad = gradients.back().mutable_data_ptr(), op.x_grad_stride = strides(gradients.back());
  }
  for (int b = 0; b < branches.count(); ++b) {
    const ffnet::Filter& filter = op.forward.branch[b].filter;
    Tensor of_weight = empty(x, {outputs, 1, filter.kh, filter.kw}), of_gamma = empty_float(x, {outputs}),
           of_beta = empty_float(x, {outputs});
    op.gradients[b] = {of_weight.mutable_data_ptr(),
                       {of_gamma.mutable_data_ptr<float>(), of_beta.mutable_data_ptr<float>()}};
    for (const Tensor& gradient : {of_weight, of_gamma, of_beta}) gradients.push_back(gradient);
  }
  ffnet::active_kernels().branched_depthwise_backward(op, executor());
  return gradients;
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
  op.x = float_pixels_of(x, "x", x, channels);
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
  if (residual) op.residual = float_pixels_of(*residual, "residual", x, op.outputs);
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
  f.z = const_cast<float*>(float_pixels_of(z, "z", x, f.hidden));
  op.grad = float_pixels_of(grad, "grad", x, f.outputs);
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
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("branched_depthwise", TORCH_BOX(&branched_depthwise));
  m.impl("branched_depthwise_backward", TORCH_BOX(&branched_depthwise_backward));
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
}
