// The CPU kernels of the backward operators. Calls that they do not support go to <operator>_backward_composed, defined
// in ffnet_kernels/ops/_operator.py.
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torch_cpu_arguments.h"

namespace {

using namespace ffnet::cpu_arguments;
using ffnet::ScalarType;
using ffnet::Tensor;
using Optional = std::optional<Tensor>;

template <class... Args>
std::vector<Tensor> composed(const char* name, const std::vector<bool>& mask, const Args&... args) {
  const auto flags = std::make_unique<bool[]>(mask.size());  // a std::vector<bool> has no array of its own
  std::copy(mask.begin(), mask.end(), flags.get());
  const torch::headeronly::HeaderOnlyArrayRef<bool> last(flags.get(), mask.size());
  std::array<StableIValue, sizeof...(Args) + 1> stack{torch::stable::detail::from(args)...,
                                                      torch::stable::detail::from(last)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
}

// The wanted gradients in order, each with the layout of torch.empty_like, which the fakes declare.
class Gradients {
 public:
  Gradients(std::initializer_list<const Tensor*> inputs, const std::vector<bool>& mask) {
    STD_TORCH_CHECK(mask.size() == inputs.size(), "ffnet_kernels (cpu): mask must have ", inputs.size(), " elements");
    size_t i = 0;
    for (const Tensor* input : inputs) {
      STD_TORCH_CHECK(input || !mask[i], "ffnet_kernels (cpu): mask asks for the gradient of a missing tensor");
      if (mask[i]) grads_.push_back(torch::stable::empty_like(*input));
      place_.push_back(mask[i++] ? static_cast<int64_t>(grads_.size()) - 1 : -1);
    }
  }
  // The gradient of the i-th input; null if not wanted.
  Tensor* operator[](size_t i) { return place_[i] < 0 ? nullptr : &grads_[place_[i]]; }
  void* data(size_t i) { return place_[i] < 0 ? nullptr : grads_[place_[i]].mutable_data_ptr(); }
  void set_map(size_t i, void*& map, ffnet::Strides& stride) {
    if (Tensor* grad = (*this)[i]) map = data(i), stride = strides(*grad);
  }
  ffnet::FilterGrad filter(size_t weight, size_t bias) {
    const Tensor* grad = (*this)[weight];
    if (!grad) return {nullptr, 0, 0, 0, data(bias)};
    return {data(weight), grad->stride(0), grad->stride(2), grad->stride(3), data(bias)};
  }
  std::vector<Tensor> take() { return std::move(grads_); }

 private:
  std::vector<Tensor> grads_;
  std::vector<int64_t> place_;
};

const Tensor* pointer(const Optional& tensor) { return tensor ? &*tensor : nullptr; }

void check_residual(const Optional& residual, const Tensor& grad) {
  if (!residual) return;
  check_cpu(*residual, "residual", 4, grad);
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(residual->size(d) == grad.size(d), "ffnet_kernels (cpu): residual must have the result's shape");
}

template <class Op>
void set_grad(Op& op, const Tensor& grad, const Tensor& x, const std::array<int64_t, 4>& shape) {
  check_cpu(grad, "grad", 4, x);
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad.size(d) == shape[d], "ffnet_kernels (cpu): grad must have the result's shape");
  op.grad = grad.const_data_ptr(), op.grad_stride = strides(grad);
}

std::vector<Tensor> depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                              const Optional& bias, const std::vector<int64_t>& stride,
                                              const std::vector<int64_t>& padding, const std::string& activation,
                                              const std::vector<bool>& mask) {
  const bool many = x.dim() == 4 && weight.dim() == 4 && weight.size(0) > 2 * x.size(1);
  if (!has_kernel(x) || many)
    return composed("ffnet_kernels::depthwise_conv2d_backward_composed", mask, grad, x, weight, bias, stride, padding,
                    activation);
  check_map(x, "x");
  const ChannelVector bias_vector(bias, "bias", weight.dim() ? weight.size(0) : 0, x);
  auto op = depthwise_arguments<ffnet::DepthwiseConv2dBackward>(x, weight, bias_vector, stride, padding, activation);
  set_grad(op, grad, x, {op.n, op.channels * op.multiplier, op.out_h, op.out_w});
  Gradients grads({&x, &weight, pointer(bias)}, mask);
  grads.set_map(0, op.x_grad, op.x_grad_stride);
  op.filter_grad = grads.filter(1, 2);
  ffnet::active_kernels().depthwise_conv2d_backward(op, executor());
  return grads.take();
}

std::vector<Tensor> ffnified_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                const Optional& key_bias, const Tensor& value,
                                                const Optional& value_bias, const std::string& activation,
                                                const Optional& scale, const Optional& residual,
                                                const std::vector<bool>& mask) {
  if (!has_kernel(query))
    return composed("ffnet_kernels::ffnified_attention_backward_composed", mask, grad, query, key, key_bias, value,
                    value_bias, activation, scale, residual);
  const AttentionVectors vectors(query, key_bias, value_bias, scale);
  auto op = attention_arguments<ffnet::FfnifiedAttentionBackward>(query, key, value, vectors, activation);
  set_grad(op, grad, query, {op.n, op.channels, op.h, op.w});
  check_residual(residual, grad);
  Gradients grads({&query, &key, pointer(key_bias), &value, pointer(value_bias), pointer(scale), pointer(residual)},
                  mask);
  grads.set_map(0, op.query_grad, op.query_grad_stride);
  op.key_grad = grads.filter(1, 2), op.value_grad = grads.filter(3, 4), op.scale_grad = grads.data(5);
  if (Tensor* residual_grad = grads[6]) torch::stable::copy_(*residual_grad, grad);
  ffnet::active_kernels().ffnified_attention_backward(op, executor());
  return grads.take();
}

// Whether the call differentiates a 1x1 convolution of pixels.
bool is_pointwise(const Tensor& grad, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::string& activation) {
  const auto all = [](const std::vector<int64_t>& values, int64_t value) {
    return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v == value; });
  };
  if (x.scalar_type() != ScalarType::Float || grad.scalar_type() != ScalarType::Float ||
      weight.scalar_type() != ScalarType::Float)
    return false;
  // A dense weight [outputs, inputs, 1, 1] is such a matrix, too.
  return is_pixel_matrix(grad) && is_pixel_matrix(x) && is_pixel_matrix(weight) && x.numel() > 0 &&
         weight.size(0) > 0 && has_size(weight, {weight.size(0), x.size(1), 1, 1}) &&
         has_size(grad, {x.size(0), weight.size(0), x.size(2), x.size(3)}) && all(stride, 1) && all(padding, 0) &&
         activation == "none";
}

std::vector<Tensor> conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& bias,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::string& activation, const Optional& scale, const Optional& residual,
                                    const std::vector<bool>& mask) {
  const bool bias_alone = mask.size() == 5 && mask[2] && !mask[1];
  if (bias_alone || scale || residual || !is_pointwise(grad, x, weight, stride, padding, activation))
    return composed("ffnet_kernels::conv2d_backward_composed", mask, grad, x, weight, bias, stride, padding, activation,
                    scale, residual);
  const ChannelVector checked(bias, "bias", weight.size(0), x);
  Gradients grads({&x, &weight, pointer(bias), nullptr, nullptr}, mask);
  const auto data = [&](size_t i) { return static_cast<float*>(grads.data(i)); };
  ffnet::active_kernels().pointwise_conv2d_backward(
      {pixels(x), x.size(1), weight.size(0), grad.const_data_ptr<float>(), x.const_data_ptr<float>(),
       weight.const_data_ptr<float>(), data(0), data(1), data(2)},
      executor());
  return grads.take();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels, CPU, m) {
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  m.impl("ffnified_attention_backward", TORCH_BOX(&ffnified_attention_backward));
}
