// The CPU kernels as operators of torch's dispatcher, through the LibTorch stable ABI only: this library runs in any
// torch from TORCH_TARGET_VERSION on. Fakes and autograd are in ffnet_kernels/ops. Checks for memory safety are here;
// ffnet_kernels/ops/_arguments.py raises the errors meant for users.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "define.h"
#include "torch_cpu.h"
#include "torch_cpu_arguments.h"

namespace ffnet::cpu_operators {

using namespace cpu_arguments;

namespace {

template <class Op>
void set_residual(Op& op, const std::optional<Tensor>& residual, const std::array<int64_t, 4>& shape, const Tensor& x) {
  if (!residual) return;
  check_cpu(*residual, "residual", 4, x);
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(residual->size(d) == shape[d], "ffnet_kernels (cpu): residual must have the result's shape");
  op.residual = residual->const_data_ptr(), op.residual_stride = strides(*residual);
}

// A 1x1 weight [rows, columns] or [rows, columns, 1, 1] with adjacent columns; keeps a copy alive if one was needed.
class PointwiseWeight {
 public:
  PointwiseWeight(const Tensor& weight, const char* name, int64_t columns, const Tensor& x) : tensor_(weight) {
    const bool filter = weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1;
    check_cpu(weight, name, filter ? 4 : 2, x);
    STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) == columns, "ffnet_kernels (cpu): ", name,
                    " must have rows and ", columns, " columns");
    if (weight.stride(1) != 1) tensor_ = torch::stable::contiguous(weight);
  }
  const void* data() const { return tensor_.const_data_ptr(); }
  int64_t rows() const { return tensor_.size(0); }
  int64_t stride() const { return tensor_.stride(0); }

 private:
  Tensor tensor_;
};

}  // namespace

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::string& activation) {
  check_map(x, "x");
  const ChannelVector bias_vector(bias, "bias", weight.dim() ? weight.size(0) : 0, x);
  auto op = depthwise_arguments<ffnet::DepthwiseConv2d>(x, weight, bias_vector, stride, padding, activation);
  const int64_t n = op.n, outputs = op.channels * op.multiplier;
  STD_TORCH_CHECK(op.multiplier <= 2, "ffnet_kernels (cpu): weight must have one or two filters for each channel");
  Tensor out =
      empty_map(x, {n, outputs, op.out_h, op.out_w}, suggests_channels_last(x) || suggests_channels_last(weight));
  op.out = out.mutable_data_ptr(), op.out_stride = strides(out);
  if (n > 0) ffnet::active_kernels().depthwise_conv2d(op, executor());
  return out;
}

Tensor ffnified_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias,
                          const Tensor& value, const std::optional<Tensor>& value_bias, const std::string& activation,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  const AttentionVectors vectors(query, key_bias, value_bias, scale);
  auto op = attention_arguments<ffnet::FfnifiedAttention>(query, key, value, vectors, activation);
  const int64_t n = op.n, c = op.channels, h = op.h, w = op.w;
  set_residual(op, residual, {n, c, h, w}, query);
  Tensor out = empty_map(query, {n, c, h, w},
                         suggests_channels_last(query) || suggests_channels_last(key) || suggests_channels_last(value));
  op.out = out.mutable_data_ptr(), op.out_stride = strides(out);
  if (n > 0) ffnet::active_kernels().ffnified_attention(op, executor());
  return out;
}

namespace {

Tensor mix_channels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const LayerNorm* norm,
                    const Tensor& expand_weight, const std::optional<Tensor>& expand_bias, const Tensor& project_weight,
                    const std::optional<Tensor>& project_bias, const std::string& activation,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  check_map(x, "x");
  check_cpu(weight, "weight", 4, x);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(c > 0 && h > 0 && w > 0 && weight.size(0) == c, "ffnet_kernels (cpu): weight must have x's channels");
  const PointwiseWeight expand(expand_weight, "expand_weight", c, x),
      project(project_weight, "project_weight", expand.rows(), x);
  const ChannelVector bias_vector(bias, "bias", c, x), expand_vector(expand_bias, "expand_bias", expand.rows(), x),
      project_vector(project_bias, "project_bias", project.rows(), x), scale_vector(scale, "scale", project.rows(), x);

  ffnet::ChannelMixer op{};
  op.storage = storage(x);
  op.filter = filter(weight, "weight", bias_vector, x);
  op.n = n, op.channels = c, op.h = op.out_h = h, op.w = op.out_w = w;
  op.hidden = expand.rows(), op.outputs = project.rows();
  op.pad_top = (op.filter.kh - 1) / 2, op.pad_left = (op.filter.kw - 1) / 2;
  op.norm = norm;
  op.expand = expand.data(), op.expand_stride = expand.stride(), op.expand_bias = expand_vector.data();
  op.project = project.data(), op.project_stride = project.stride(), op.project_bias = project_vector.data();
  op.activation = parse_activation(activation);
  op.scale = scale_vector.data();
  set_residual(op, residual, {n, op.outputs, h, w}, x);
  Tensor out = empty_map(x, {n, op.outputs, h, w}, suggests_channels_last(x) || suggests_channels_last(weight));
  op.x = x.const_data_ptr(), op.x_stride = strides(x);
  op.out = out.mutable_data_ptr(), op.out_stride = strides(out);
  if (n > 0) ffnet::active_kernels().channel_mixer(op, executor());
  return out;
}

}  // namespace

Tensor channel_mixer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                     const Tensor& project_weight, const std::optional<Tensor>& project_bias,
                     const std::string& activation, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual) {
  return mix_channels(x, weight, bias, nullptr, expand_weight, expand_bias, project_weight, project_bias, activation,
                      scale, residual);
}

// The same with a LayerNorm over the channels after the depthwise convolution.
Tensor norm_mixer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                  const Tensor& expand_weight, const std::optional<Tensor>& expand_bias, const Tensor& project_weight,
                  const std::optional<Tensor>& project_bias, const std::string& activation,
                  const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  check_map(x, "x");
  const ChannelVector gamma(norm_weight, "norm_weight", x.size(1), x), beta(norm_bias, "norm_bias", x.size(1), x);
  const LayerNorm norm{gamma.data(), beta.data(), static_cast<float>(eps)};
  return mix_channels(x, weight, bias, &norm, expand_weight, expand_bias, project_weight, project_bias, activation,
                      scale, residual);
}

namespace {

// All arguments for a map [n, c, h, w] of x's type except the map and the result; keeps copies alive if any were
// needed.
class Conv2dCall {
 public:
  Conv2dCall(const Tensor& x, const std::array<int64_t, 4>& size, const Tensor& weight,
             const std::optional<Tensor>& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
             const std::string& activation)
      : bias_(bias, "bias", weight.dim() ? weight.size(0) : 0, x), rows_(weight) {
    check_cpu(weight, "weight", 4, x);
    const int64_t c = size[1], outputs = weight.size(0);
    STD_TORCH_CHECK(c > 0 && outputs > 0 && weight.size(1) == c && weight.size(2) > 0 && weight.size(3) > 0,
                    "ffnet_kernels (cpu): weight must have the shape [O, ", c, ", kh, kw]");
    op.storage = storage(x);
    op.n = size[0], op.channels = c, op.outputs = outputs, op.h = size[2], op.w = size[3];
    op.kh = weight.size(2), op.kw = weight.size(3);
    set_geometry(op, op.kh, op.kw, stride, padding);
    // A row is read in the order in which it is stored; anything else is copied.
    const int64_t taps = op.kh * op.kw;
    const auto row_is = [&](int64_t c_step, int64_t y_step, int64_t x_step) {
      return (c == 1 || weight.stride(1) == c_step) && (op.kh == 1 || weight.stride(2) == y_step) &&
             (op.kw == 1 || weight.stride(3) == x_step);
    };
    op.channels_inside = row_is(1, op.kw * c, c);
    if (!op.channels_inside && !row_is(taps, op.kw, 1)) rows_ = torch::stable::contiguous(weight);
    op.weight = rows_.const_data_ptr(), op.weight_stride = rows_.stride(0);
    op.bias = bias_.data();
    op.activation = parse_activation(activation);
  }

  Tensor result(const Tensor& x, bool channels_last) {
    Tensor out = empty_map(x, {op.n, op.outputs, op.out_h, op.out_w}, channels_last);
    op.out = out.mutable_data_ptr(), op.out_stride = strides(out);
    return out;
  }

  Conv2d op{};

 private:
  ChannelVector bias_;
  Tensor rows_;
};

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::string& activation,
              const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  check_map(x, "x");
  Conv2dCall call(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, weight, bias, stride, padding, activation);
  const ChannelVector scale_vector(scale, "scale", call.op.outputs, x);
  call.op.scale = scale_vector.data();
  set_residual(call.op, residual, {call.op.n, call.op.outputs, call.op.out_h, call.op.out_w}, x);
  Tensor out = call.result(x, suggests_channels_last(x) || suggests_channels_last(weight));
  call.op.x = x.const_data_ptr(), call.op.x_stride = strides(x);
  if (call.op.n > 0) active_kernels().conv2d(call.op, executor());
  return out;
}

// The second convolution on the result of the first, which is computed as it is read, if there is a kernel for that.
Tensor conv2d_pair(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::string& activation, const Tensor& next_weight, const std::optional<Tensor>& next_bias,
                   const std::vector<int64_t>& next_stride, const std::vector<int64_t>& next_padding,
                   const std::string& next_activation) {
  check_map(x, "x");
  Conv2dCall one(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, weight, bias, stride, padding, activation);
  Conv2dCall two(x, {one.op.n, one.op.outputs, one.op.out_h, one.op.out_w}, next_weight, next_bias, next_stride,
                 next_padding, next_activation);
  const Kernels& kernels = active_kernels();
  // If all extents are 1, the result's format follows the map's strides.
  const bool single = one.op.n == 0 || one.op.outputs * one.op.out_h * one.op.out_w == 1;
  if (single || !kernels.pairs_conv2d(one.op, two.op))
    return conv2d(conv2d(x, weight, bias, stride, padding, activation, {}, {}), next_weight, next_bias, next_stride,
                  next_padding, next_activation, {}, {});
  const bool channels_last = suggests_channels_last(x) || suggests_channels_last(weight);
  Tensor out = two.result(x, channels_last || suggests_channels_last(next_weight));
  one.op.x = x.const_data_ptr(), one.op.x_stride = strides(x);
  kernels.conv2d_pair(one.op, two.op, executor());
  return out;
}

}  // namespace ffnet::cpu_operators

using namespace ffnet;

FFNET_DEFINE(ffnet_kernels, FFNET_KERNELS_SCHEMAS)
FFNET_DEFINE(ffnet_kernels_training, FFNET_KERNELS_TRAINING_SCHEMAS)

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&cpu_operators::conv2d));
  m.impl("conv2d_pair", TORCH_BOX(&cpu_operators::conv2d_pair));
  m.impl("depthwise_conv2d", TORCH_BOX(&cpu_operators::depthwise_conv2d));
  m.impl("ffnified_attention", TORCH_BOX(&cpu_operators::ffnified_attention));
  m.impl("channel_mixer", TORCH_BOX(&cpu_operators::channel_mixer));
  m.impl("norm_mixer", TORCH_BOX(&cpu_operators::norm_mixer));
}
