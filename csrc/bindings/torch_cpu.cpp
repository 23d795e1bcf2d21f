// The CPU kernels as operators of torch's dispatcher, through the LibTorch stable ABI only: this library runs in any
// torch from TORCH_TARGET_VERSION on. Schemas, fakes and autograd are in ffnet_kernels/operators.py; arguments have
// been checked by ffnet_kernels/checks.py, and what memory safety needs is checked here again.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/select.h"
#include "torch_executor.h"

namespace {

using ffnet::empty_map;
using ffnet::ScalarType;
using ffnet::suggests_channels_last;
using ffnet::Tensor;

using ffnet::executor;

ffnet::Activation parse_activation(const std::string& name) { return ffnet::parse_activation<ffnet::Activation>(name); }

void check_float_cpu(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dim, "ffnet_kernels (cpu): ", name,
                  " must be a ", dim, "-dimensional float32 CPU tensor");
}

ffnet::Strides strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// A per-channel vector as contiguous memory; keeps the copy alive where one was needed.
class ChannelVector {
 public:
  ChannelVector(const std::optional<Tensor>& vector, const char* name, int64_t channels) {
    if (!vector) return;
    check_float_cpu(*vector, name, 1);
    STD_TORCH_CHECK(vector->size(0) == channels, "ffnet_kernels (cpu): ", name, " must have ", channels, " elements");
    tensor_ = torch::stable::contiguous(*vector);
    data_ = tensor_->const_data_ptr<float>();
  }
  const float* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  const float* data_ = nullptr;
};

ffnet::Filter filter(const Tensor& weight, const char* name, const ChannelVector& bias) {
  check_float_cpu(weight, name, 4);
  STD_TORCH_CHECK(weight.size(1) == 1 && weight.size(2) > 0 && weight.size(3) > 0, "ffnet_kernels (cpu): ", name,
                  " must have the shape [O, 1, kh, kw]");
  return {weight.const_data_ptr<float>(),
          bias.data(),
          weight.size(2),
          weight.size(3),
          weight.stride(0),
          weight.stride(2),
          weight.stride(3)};
}

template <class Op>
void set_residual(Op& op, const std::optional<Tensor>& residual, const std::array<int64_t, 4>& shape) {
  if (!residual) return;
  check_float_cpu(*residual, "residual", 4);
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(residual->size(d) == shape[d], "ffnet_kernels (cpu): residual must have the result's shape");
  op.residual = residual->const_data_ptr<float>(), op.residual_stride = strides(*residual);
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::string& activation) {
  check_float_cpu(x, "x", 4);
  STD_TORCH_CHECK(stride.size() == 2 && (stride[0] == 1 || stride[0] == 2) && (stride[1] == 1 || stride[1] == 2),
                  "ffnet_kernels (cpu): stride must be two numbers, each 1 or 2");
  STD_TORCH_CHECK(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0,
                  "ffnet_kernels (cpu): padding must be (top, bottom, left, right), none of them negative");
  check_float_cpu(weight, "weight", 4);
  const int64_t n = x.size(0), c = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(c > 0 && outputs > 0 && outputs % c == 0,
                  "ffnet_kernels (cpu): weight must have a multiple of x's channels");
  const ChannelVector bias_vector(bias, "bias", outputs);

  ffnet::DepthwiseConv2d op{};
  op.filter = filter(weight, "weight", bias_vector);
  op.n = n, op.channels = c, op.multiplier = outputs / c;
  op.h = x.size(2), op.w = x.size(3);
  op.stride_h = stride[0], op.stride_w = stride[1];
  op.pad_top = padding[0], op.pad_left = padding[2];
  const int64_t room_h = op.h + padding[0] + padding[1] - op.filter.kh,
                room_w = op.w + padding[2] + padding[3] - op.filter.kw;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "ffnet_kernels (cpu): the padded map is smaller than the kernel");
  STD_TORCH_CHECK(op.h > 0 && op.w > 0, "ffnet_kernels (cpu): x must have height and width");
  op.out_h = room_h / op.stride_h + 1, op.out_w = room_w / op.stride_w + 1;
  op.activation = parse_activation(activation);

  Tensor out =
      empty_map(x, {n, outputs, op.out_h, op.out_w}, suggests_channels_last(x) || suggests_channels_last(weight));
  op.x = x.const_data_ptr<float>(), op.x_stride = strides(x);
  op.out = out.mutable_data_ptr<float>(), op.out_stride = strides(out);
  if (n > 0) ffnet::active_kernels().depthwise_conv2d(op, executor());
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_wgrad(const Tensor& grad, const Tensor& x,
                                                  const std::vector<int64_t>& kernel_size,
                                                  const std::vector<int64_t>& padding) {
  check_float_cpu(x, "x", 4);
  check_float_cpu(grad, "grad", 4);
  STD_TORCH_CHECK(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0 && padding.size() == 4,
                  "ffnet_kernels (cpu): kernel_size must be (kh, kw), padding (top, bottom, left, right)");
  ffnet::DepthwiseWgrad op{};
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0 && grad.size(2) > 0 && grad.size(3) > 0,
                  "ffnet_kernels (cpu): x and grad must have height and width");
  op.n = x.size(0), op.channels = x.size(1), op.h = x.size(2), op.w = x.size(3);
  op.out_h = grad.size(2), op.out_w = grad.size(3);
  op.kh = kernel_size[0], op.kw = kernel_size[1], op.pad_top = padding[0], op.pad_left = padding[2];
  STD_TORCH_CHECK(op.channels > 0 && grad.size(0) == op.n && grad.size(1) == op.channels &&
                      op.out_h == op.h + padding[0] + padding[1] - op.kh + 1 &&
                      op.out_w == op.w + padding[2] + padding[3] - op.kw + 1,
                  "ffnet_kernels (cpu): grad must have the shape of the convolution's result");
  Tensor weight_grad = empty_map(x, {op.channels, 1, op.kh, op.kw}, false);
  Tensor bias_grad = torch::stable::empty({op.channels}, ScalarType::Float, std::nullopt, x.device());
  op.x = x.const_data_ptr<float>(), op.x_stride = strides(x);
  op.grad = grad.const_data_ptr<float>(), op.grad_stride = strides(grad);
  op.weight_grad = weight_grad.mutable_data_ptr<float>(), op.bias_grad = bias_grad.mutable_data_ptr<float>();
  ffnet::active_kernels().depthwise_conv2d_wgrad(op, executor());
  return {weight_grad, bias_grad};
}

Tensor ffnified_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias,
                          const Tensor& value, const std::optional<Tensor>& value_bias, const std::string& activation,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  check_float_cpu(query, "query", 4);
  check_float_cpu(key, "key", 4);
  check_float_cpu(value, "value", 4);
  const int64_t n = query.size(0), c = query.size(1), h = query.size(2), w = query.size(3);
  STD_TORCH_CHECK(c > 0 && h > 0 && w > 0, "ffnet_kernels (cpu): query must have channels, height and width");
  STD_TORCH_CHECK(key.size(0) == c && value.size(0) == c,
                  "ffnet_kernels (cpu): key and value must have query's channels");
  const ChannelVector key_vector(key_bias, "key_bias", c), value_vector(value_bias, "value_bias", c),
      scale_vector(scale, "scale", c);

  ffnet::FfnifiedAttention op{};
  op.key = filter(key, "key", key_vector), op.value = filter(value, "value", value_vector);
  op.n = n, op.channels = c, op.h = h, op.w = w;
  op.key_pad_top = (op.key.kh - 1) / 2, op.key_pad_left = (op.key.kw - 1) / 2;
  op.value_pad_top = (op.value.kh - 1) / 2, op.value_pad_left = (op.value.kw - 1) / 2;
  op.activation = parse_activation(activation);
  op.scale = scale_vector.data();
  set_residual(op, residual, {n, c, h, w});
  Tensor out = empty_map(query, {n, c, h, w},
                         suggests_channels_last(query) || suggests_channels_last(key) || suggests_channels_last(value));
  op.query = query.const_data_ptr<float>(), op.query_stride = strides(query);
  op.out = out.mutable_data_ptr<float>(), op.out_stride = strides(out);
  if (n > 0) ffnet::active_kernels().ffnified_attention(op, executor());
  return out;
}

// A 1x1 weight [rows, columns] with adjacent columns; keeps the copy alive where one was needed.
class PointwiseWeight {
 public:
  PointwiseWeight(const Tensor& weight, const char* name, int64_t columns) : tensor_(weight) {
    check_float_cpu(weight, name, 2);
    STD_TORCH_CHECK(weight.size(1) == columns, "ffnet_kernels (cpu): ", name, " must have ", columns, " columns");
    if (weight.stride(1) != 1) tensor_ = torch::stable::contiguous(weight);
  }
  const float* data() const { return tensor_.const_data_ptr<float>(); }
  int64_t rows() const { return tensor_.size(0); }
  int64_t stride() const { return tensor_.stride(0); }

 private:
  Tensor tensor_;
};

Tensor channel_mixer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                     const Tensor& project_weight, const std::optional<Tensor>& project_bias,
                     const std::string& activation, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual) {
  check_float_cpu(x, "x", 4);
  check_float_cpu(weight, "weight", 4);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(c > 0 && h > 0 && w > 0 && weight.size(0) == c, "ffnet_kernels (cpu): weight must have x's channels");
  const PointwiseWeight expand(expand_weight, "expand_weight", c),
      project(project_weight, "project_weight", expand.rows());
  const ChannelVector bias_vector(bias, "bias", c), expand_vector(expand_bias, "expand_bias", expand.rows()),
      project_vector(project_bias, "project_bias", project.rows()), scale_vector(scale, "scale", project.rows());

  ffnet::ChannelMixer op{};
  op.filter = filter(weight, "weight", bias_vector);
  op.n = n, op.channels = c, op.h = h, op.w = w;
  op.hidden = expand.rows(), op.outputs = project.rows();
  op.pad_top = (op.filter.kh - 1) / 2, op.pad_left = (op.filter.kw - 1) / 2;
  op.expand = expand.data(), op.expand_stride = expand.stride(), op.expand_bias = expand_vector.data();
  op.project = project.data(), op.project_stride = project.stride(), op.project_bias = project_vector.data();
  op.activation = parse_activation(activation);
  op.scale = scale_vector.data();
  set_residual(op, residual, {n, op.outputs, h, w});
  Tensor out = empty_map(x, {n, op.outputs, h, w}, suggests_channels_last(x) || suggests_channels_last(weight));
  op.x = x.const_data_ptr<float>(), op.x_stride = strides(x);
  op.out = out.mutable_data_ptr<float>(), op.out_stride = strides(out);
  if (n > 0) ffnet::active_kernels().channel_mixer(op, executor());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_wgrad", TORCH_BOX(&depthwise_conv2d_wgrad));
  m.impl("ffnified_attention", TORCH_BOX(&ffnified_attention));
  m.impl("channel_mixer", TORCH_BOX(&channel_mixer));
}
