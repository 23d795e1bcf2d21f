// The CUDA kernels as operators of torch's dispatcher, through the LibTorch stable ABI only. Schemas, fakes and
// autograd of the public operators are in ffnet_kernels/ops; what memory safety needs is checked here again. With
// FFNET_HOST_EXECUTION the same operators take CPU tensors, for the tests (csrc/cuda/host).
#include "define.h"
#include "torch_common.h"

#include <array>
#include <cstdio>
#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/channel_mixer.h"
#include "../cuda/dispatch.h"
#ifdef FFNET_HOST_EXECUTION
#include "../cuda/host/execution.h"
#include "../cuda/host/settings.h"
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace ffnet {
namespace {

#define FFNET_CHECK(condition, ...) STD_TORCH_CHECK(condition, "ffnet_kernels (cuda): ", __VA_ARGS__)

Activation kernel_activation(const std::string& name) {
  const Activation activation = parse_activation(name);
  FFNET_CHECK(has_kernel(activation), "has no kernel for the activation ", name);
  return activation;
}

// Makes the tensor's device the current one while a call runs, on torch's current stream there.
class Session {
 public:
#ifdef FFNET_HOST_EXECUTION
  explicit Session(const Tensor&) : device_(current_device(nullptr)) {}
#else
  explicit Session(const Tensor& t)
      : guard_(t.get_device_index()), device_(current_device(stream(t.get_device_index()))) {}
#endif
  const Device& device() const { return device_; }

 private:
#ifndef FFNET_HOST_EXECUTION
  static void* stream(int32_t index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Device device_;
};

constexpr int64_t kMostElements = int64_t{1} << 28;  // along one dimension: kernels step over rows in 32 bits

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: FFNET_CHECK(false, "takes float32, float16 and bfloat16");
  }
}

void check_like(const Tensor& t, const Tensor& like, const char* name, int64_t dim) {
  FFNET_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions");
  FFNET_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the map's dtype");
  FFNET_CHECK(t.device() == like.device(), name, " must be on the map's device");
}

void check_map(const Tensor& t, const Tensor& like, const char* name) {
  check_like(t, like, name, 4);
  FFNET_CHECK(t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0, name, " must have channels, height and width");
  FFNET_CHECK(t.size(1) <= kMostElements && t.size(2) <= kMostElements && t.size(3) <= kMostElements, name,
              " must have up to 2^28 channels, rows and columns");
}

void check_shape(const Tensor& t, const char* name, const std::array<int64_t, 4>& shape) {
  for (int d = 0; d < 4; ++d) FFNET_CHECK(t.size(d) == shape[d], name, " has a wrong shape at dimension ", d);
}

Map map_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
Map written(Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// A per-channel vector as dense memory; keeps the copy alive where one was needed.
class ChannelVector {
 public:
  ChannelVector(const std::optional<Tensor>& vector, const Tensor& like, const char* name, int64_t channels) {
    if (!vector) return;
    check_like(*vector, like, name, 1);
    FFNET_CHECK(vector->size(0) == channels, name, " must have ", channels, " elements");
    tensor_ = torch::stable::contiguous(*vector);
  }
  const void* data() const { return tensor_ ? tensor_->const_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

Filter filter_of(const Tensor& weight, const Tensor& like, const char* name, const void* bias) {
  check_like(weight, like, name, 4);
  FFNET_CHECK(weight.size(1) == 1 && weight.size(2) > 0 && weight.size(3) > 0 && weight.size(2) <= 1 << 15 &&
                  weight.size(3) <= 1 << 15,
              name, " must have the shape [O, 1, kh, kw]");
  return {weight.const_data_ptr(),
          weight.stride(0),
          weight.stride(2),
          weight.stride(3),
          bias,
          static_cast<int>(weight.size(2)),
          static_cast<int>(weight.size(3))};
}

// A call whose maps and activation are still to be set.
Convolution convolution(const Tensor& x, const Filter& filter, int64_t outputs, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding) {
  FFNET_CHECK(stride.size() == 2 && (stride[0] == 1 || stride[0] == 2) && (stride[1] == 1 || stride[1] == 2),
              "stride must be two numbers, each 1 or 2");
  FFNET_CHECK(padding.size() == 4, "padding must be four numbers");
  for (const int64_t p : padding) FFNET_CHECK(p >= 0 && p <= 1 << 15, "padding must be from 0 to 2^15");
  const int64_t channels = x.size(1);
  FFNET_CHECK(outputs == channels || outputs == 2 * channels, "weight must have one or two filters a channel");
  const int64_t room_h = x.size(2) + padding[0] + padding[1] - filter.kh,
                room_w = x.size(3) + padding[2] + padding[3] - filter.kw;
  FFNET_CHECK(room_h >= 0 && room_w >= 0, "the padded map is smaller than the kernel");
  Convolution call{};
  call.dtype = dtype_of(x);
  call.n = x.size(0), call.channels = channels, call.multiplier = static_cast<int>(outputs / channels);
  call.h = static_cast<int>(x.size(2)), call.w = static_cast<int>(x.size(3));
  call.stride_h = static_cast<int>(stride[0]), call.stride_w = static_cast<int>(stride[1]);
  call.pad_top = static_cast<int>(padding[0]), call.pad_left = static_cast<int>(padding[2]);
  call.out_h = static_cast<int>(room_h / stride[0]) + 1, call.out_w = static_cast<int>(room_w / stride[1]) + 1;
  call.filter = filter;
  return call;
}

// The strides that empty_map would give, of a map that is not made.
Map planned(int64_t width, int64_t channels, bool channels_last) {
  Map map{};
  map.w = channels_last ? channels : 1, map.c = channels_last ? 1 : width, map.h = map.w * width;
  return map;
}

// The layout of a dense map, whose pixels are in the order of memory.
DenseMaps dense_maps(const Tensor& map) {
  check_map(map, map, "map");
  const bool channels_last = suggests_channels_last(map);
  const int64_t c = map.size(1), pixels = map.size(2) * map.size(3);
  const auto adjacent = [&](int64_t stride, int64_t expected, int64_t size) { return size == 1 || stride == expected; };
  const int64_t pixel = channels_last ? c : 1;
  FFNET_CHECK(
      adjacent(map.stride(0), c * pixels, map.size(0)) && adjacent(map.stride(1), channels_last ? 1 : pixels, c) &&
          adjacent(map.stride(2), pixel * map.size(3), map.size(2)) && adjacent(map.stride(3), pixel, map.size(3)),
      "map must be dense");
  return {dtype_of(map), map.size(0), static_cast<int>(c), pixels, channels_last};
}

// out = residual + scale · (out + bias), in place.
void scale_and_add(Tensor& out, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& residual, const Device& device) {
  if (!bias && !scale && !residual) return;
  const int64_t channels = out.size(1);
  const ChannelVector bias_vector(bias, out, "bias", channels), scale_vector(scale, out, "scale", channels);
  const DenseMaps maps = dense_maps(out);
  std::optional<Tensor> dense;  // the residual in out's layout
  if (residual) {
    check_like(*residual, out, "residual", 4);
    check_shape(*residual, "residual", {out.size(0), channels, out.size(2), out.size(3)});
    dense = *residual;
    bool same = true;
    for (int d = 0; d < 4; ++d) same &= out.size(d) == 1 || residual->stride(d) == out.stride(d);
    if (!same) {
      dense = empty_map(out, {out.size(0), channels, out.size(2), out.size(3)}, maps.channels_last);
      torch::stable::copy_(*dense, *residual);
    }
  }
  if (maps.n > 0)
    scale_residual(maps, out.mutable_data_ptr(), bias_vector.data(), scale_vector.data(),
                   dense ? dense->const_data_ptr() : nullptr, device);
}

void run_forward(const Convolution& call, const Device& device) {
  if (call.n == 0) return;
  switch (choose(call, device)) {
    case ConvolutionKernel::stream: return stream_forward(call, device);
    case ConvolutionKernel::banded: return banded_forward(call, device);
    default: return direct_forward(call, device);
  }
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::string& activation) {
  check_map(x, x, "x");
  const ChannelVector bias_vector(bias, x, "bias", weight.size(0));
  Convolution call =
      convolution(x, filter_of(weight, x, "weight", bias_vector.data()), weight.size(0), stride, padding);
  call.activation = kernel_activation(activation);
  const Session session(x);
  Tensor out = empty_map(x, {call.n, weight.size(0), call.out_h, call.out_w},
                         suggests_channels_last(x) || suggests_channels_last(weight));
  call.x = map_of(x), call.out = written(out);
  run_forward(call, session.device());
  return out;
}

// gradient · act'(conv(x) + bias): what the gradients of the convolution are taken of.
Tensor depthwise_conv2d_activation_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding, const std::string& activation) {
  check_map(x, x, "x");
  check_map(grad, x, "grad");
  const ChannelVector bias_vector(bias, x, "bias", weight.size(0));
  Convolution call =
      convolution(x, filter_of(weight, x, "weight", bias_vector.data()), weight.size(0), stride, padding);
  check_shape(grad, "grad", {call.n, weight.size(0), call.out_h, call.out_w});
  call.activation = kernel_activation(activation);
  const Session session(x);
  Tensor out = empty_map(x, {call.n, weight.size(0), call.out_h, call.out_w},
                         suggests_channels_last(x) || suggests_channels_last(weight));
  call.x = map_of(x), call.out = written(out);
  call.gradient = map_of(grad);
  run_forward(call, session.device());
  return out;
}

// Gradient of x, in the shape and format of `like`.
Tensor depthwise_conv2d_dgrad(const Tensor& grad, const Tensor& weight, const Tensor& like,
                              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_map(like, like, "x");
  check_map(grad, like, "grad");
  Convolution call = convolution(like, filter_of(weight, like, "weight", nullptr), weight.size(0), stride, padding);
  check_shape(grad, "grad", {call.n, weight.size(0), call.out_h, call.out_w});
  const Session session(like);
  Tensor out = empty_map(like, {call.n, call.channels, call.h, call.w}, suggests_channels_last(like));
  call.x = written(out), call.out = map_of(grad);
  if (call.n == 0) return out;
  switch (choose_dgrad(call, session.device())) {
    case ConvolutionKernel::stream: stream_dgrad(call, session.device()); break;
    case ConvolutionKernel::banded: banded_dgrad(call, session.device()); break;
    default: direct_dgrad(call, session.device());
  }
  return out;
}

// Partial sums of the gradients of a filter and its bias: [splits, outputs, taps + 1], float32.
Tensor filter_partials(Convolution& call, const Tensor& like, const Device& device) {
  const bool tensor_cores = choose_wgrad(call, device);
  const int64_t splits = call.n == 0    ? 0
                         : tensor_cores ? wgrad_splits(call, device)
                                        : direct_wgrad_splits(call, device);
  const int64_t taps = int64_t{call.filter.kh} * call.filter.kw;
  Tensor partials = torch::stable::empty({splits, call.channels * call.multiplier, taps + 1}, ScalarType::Float,
                                         std::nullopt, like.device());
  if (splits == 0) return partials;
  auto* data = static_cast<float*>(partials.mutable_data_ptr());
  tensor_cores ? wgrad(call, data, device) : direct_wgrad(call, data, device);
  return partials;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_wgrad(const Tensor& grad, const Tensor& x,
                                                  const std::vector<int64_t>& kernel_size,
                                                  const std::vector<int64_t>& stride,
                                                  const std::vector<int64_t>& padding) {
  check_map(x, x, "x");
  check_map(grad, x, "grad");
  FFNET_CHECK(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0 && kernel_size[0] <= 1 << 15 &&
                  kernel_size[1] <= 1 << 15,
              "kernel_size must be (kh, kw)");
  Filter filter{};
  filter.kh = static_cast<int>(kernel_size[0]), filter.kw = static_cast<int>(kernel_size[1]);
  const int64_t outputs = grad.size(1);
  Convolution call = convolution(x, filter, outputs, stride, padding);
  check_shape(grad, "grad", {call.n, outputs, call.out_h, call.out_w});
  const Session session(x);
  Tensor filter_grad = empty_map(x, {outputs, 1, filter.kh, filter.kw}, false);
  Tensor bias_grad = torch::stable::empty({outputs}, x.scalar_type(), std::nullopt, x.device());
  call.x = map_of(x), call.out = map_of(grad);
  const Tensor partials = filter_partials(call, x, session.device());
  finish_filter_gradients({call.dtype, outputs, partials.size(0), static_cast<const float*>(partials.const_data_ptr()),
                           filter, nullptr, filter_grad.mutable_data_ptr(), bias_grad.mutable_data_ptr(), nullptr},
                          session.device());
  return {filter_grad, bias_grad};
}

// An attention whose output is still to be set, and the vectors that it points to.
struct AttentionCall {
  ChannelVector key_bias, value_bias, scale;
  Attention call;
  bool channels_last;

  AttentionCall(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias_, const Tensor& value,
                const std::optional<Tensor>& value_bias_, const std::string& activation,
                const std::optional<Tensor>& scale_, const std::optional<Tensor>& residual)
      : key_bias((check_map(query, query, "query"), key_bias_), query, "key_bias", query.size(1)),
        value_bias(value_bias_, query, "value_bias", query.size(1)),
        scale(scale_, query, "scale", query.size(1)),
        call{},
        channels_last(suggests_channels_last(query) || suggests_channels_last(key) || suggests_channels_last(value)) {
    call.dtype = dtype_of(query);
    call.n = query.size(0), call.channels = query.size(1);
    call.h = static_cast<int>(query.size(2)), call.w = static_cast<int>(query.size(3));
    call.activation = kernel_activation(activation);
    call.query = map_of(query);
    call.key = filter_of(key, query, "key", key_bias.data()),
    call.value = filter_of(value, query, "value", value_bias.data());
    FFNET_CHECK(key.size(0) == query.size(1) && value.size(0) == query.size(1),
                "key and value must have query's channels");
    call.scale = scale.data();
    if (!residual) return;
    check_like(*residual, query, "residual", 4);
    check_shape(*residual, "residual", {query.size(0), query.size(1), query.size(2), query.size(3)});
    call.residual = map_of(*residual);
  }
};

Tensor ffnified_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias,
                          const Tensor& value, const std::optional<Tensor>& value_bias, const std::string& activation,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  AttentionCall a(query, key, key_bias, value, value_bias, activation, scale, residual);
  const Session session(query);
  const std::vector<int64_t> one{1, 1};
  Tensor out = empty_map(query, {a.call.n, a.call.channels, a.call.h, a.call.w}, a.channels_last);
  a.call.out = written(out);
  if (a.call.n == 0) return out;
  if (choose(a.call, session.device()) == AttentionKernel::stream) {
    attention_forward(a.call, session.device());
    return out;
  }
  const auto same = [](const Filter& f) {
    return std::vector<int64_t>{(f.kh - 1) / 2, f.kh / 2, (f.kw - 1) / 2, f.kw / 2};
  };
  Tensor hidden = empty_map(query, {a.call.n, a.call.channels, a.call.h, a.call.w}, a.channels_last);
  Convolution first = convolution(query, a.call.key, a.call.channels, one, same(a.call.key));
  first.x = a.call.query, first.out = written(hidden), first.activation = a.call.activation;
  run_forward(first, session.device());
  Convolution second = convolution(hidden, a.call.value, a.call.channels, one, same(a.call.value));
  second.x = map_of(hidden), second.out = a.call.out, second.activation = Activation::none;
  run_forward(second, session.device());
  scale_and_add(out, std::nullopt, scale, residual, session.device());
  return out;
}

// See attention_backward: (gradient of the query, hidden map, its gradient); takes planes of 16 bits only.
std::tuple<Tensor, Tensor, Tensor> ffnified_attention_dgrad(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                            const std::optional<Tensor>& key_bias, const Tensor& value,
                                                            const std::string& activation,
                                                            const std::optional<Tensor>& scale) {
  AttentionCall a(query, key, key_bias, value, std::nullopt, activation, scale, std::nullopt);
  check_map(grad, query, "grad");
  check_shape(grad, "grad", {a.call.n, a.call.channels, a.call.h, a.call.w});
  const Session session(query);
  const auto make = [&] { return empty_map(query, {a.call.n, a.call.channels, a.call.h, a.call.w}, false); };
  Tensor query_grad = make(), hidden = make(), hidden_grad = make();
  a.call.out = map_of(grad);
  FFNET_CHECK(choose(a.call, session.device()) == AttentionKernel::stream,
              "ffnified_attention_dgrad does not take this call");
  if (a.call.n > 0)
    attention_backward(a.call, {written(query_grad), written(hidden), written(hidden_grad)}, session.device());
  return {query_grad, hidden, hidden_grad};
}

// Gradients of value, value_bias and scale from the gradient of the result and the hidden map.
std::tuple<Tensor, Tensor, Tensor> ffnified_attention_value_grads(const Tensor& grad, const Tensor& hidden,
                                                                  const Tensor& value,
                                                                  const std::optional<Tensor>& value_bias,
                                                                  const std::optional<Tensor>& scale) {
  check_map(hidden, hidden, "hidden");
  check_map(grad, hidden, "grad");
  const int64_t channels = hidden.size(1);
  const ChannelVector bias_vector(value_bias, hidden, "value_bias", channels),
      scale_vector(scale, hidden, "scale", channels);
  const Filter filter = filter_of(value, hidden, "value", bias_vector.data());
  FFNET_CHECK(value.size(0) == channels, "value must have the hidden map's channels");
  const std::vector<int64_t> padding{(filter.kh - 1) / 2, filter.kh / 2, (filter.kw - 1) / 2, filter.kw / 2};
  Convolution call = convolution(hidden, filter, channels, {1, 1}, padding);
  check_shape(grad, "grad", {call.n, channels, call.out_h, call.out_w});
  const Session session(hidden);
  Tensor filter_grad = empty_map(hidden, {channels, 1, filter.kh, filter.kw}, false);
  const auto vector = [&] {
    return torch::stable::empty({channels}, hidden.scalar_type(), std::nullopt, hidden.device());
  };
  Tensor bias_grad = vector(), scale_grad = vector();
  call.x = map_of(hidden), call.out = map_of(grad);
  const Tensor partials = filter_partials(call, hidden, session.device());
  finish_filter_gradients({call.dtype, channels, partials.size(0), static_cast<const float*>(partials.const_data_ptr()),
                           filter, scale_vector.data(), filter_grad.mutable_data_ptr(), bias_grad.mutable_data_ptr(),
                           scale_grad.mutable_data_ptr()},
                          session.device());
  return {filter_grad, bias_grad, scale_grad};
}

bool ffnified_attention_dgrad_takes(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value) {
  AttentionCall a(query, key, std::nullopt, value, std::nullopt, "none", std::nullopt, std::nullopt);
  check_map(grad, query, "grad");
  const Session session(query);
  a.call.out = map_of(grad);
  return !a.channels_last && choose(a.call, session.device()) == AttentionKernel::stream;
}

// The channel mixer behind its depthwise convolution.
ChannelMixer pointwise(const Tensor& x, const Tensor& expand_weight, const Tensor& project_weight,
                       const std::optional<Tensor>& residual, const Tensor& out) {
  check_map(x, x, "x");
  check_like(out, x, "out", 4);
  check_like(expand_weight, x, "expand_weight", 2);
  check_like(project_weight, x, "project_weight", 2);
  FFNET_CHECK(expand_weight.size(1) == x.size(1) && project_weight.size(1) == expand_weight.size(0),
              "expand_weight must be [D, C], project_weight [O, D]");
  ChannelMixer call{};
  call.dtype = dtype_of(x);
  call.n = x.size(0), call.channels = static_cast<int>(x.size(1)),
  call.hidden = static_cast<int>(expand_weight.size(0));
  call.outputs = static_cast<int>(project_weight.size(0));
  call.h = static_cast<int>(x.size(2)), call.w = static_cast<int>(x.size(3));
  call.x = map_of(x), call.out = map_of(out);
  if (residual) {
    check_like(*residual, x, "residual", 4);
    check_shape(*residual, "residual", {call.n, call.outputs, call.h, call.w});
    call.residual = map_of(*residual);
  }
  return call;
}

Matrix matrix_of(const Tensor& weight) { return {weight.const_data_ptr(), weight.stride(0)}; }

// Whether channel_mixer_pointwise takes the call. `out` lends its layout.
bool channel_mixer_takes(const Tensor& x, const Tensor& expand_weight, const Tensor& project_weight,
                         const std::optional<Tensor>& residual, const Tensor& out) {
  const ChannelMixer call = pointwise(x, expand_weight, project_weight, residual, out);
  const Session session(x);
  return expand_weight.stride(1) == 1 && project_weight.stride(1) == 1 && channel_mixer_fits(call, session.device());
}

void channel_mixer_pointwise(const Tensor& x, const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                             const Tensor& project_weight, const std::optional<Tensor>& project_bias,
                             const std::string& activation, const std::optional<Tensor>& scale,
                             const std::optional<Tensor>& residual, Tensor out) {
  FFNET_CHECK(channel_mixer_takes(x, expand_weight, project_weight, residual, out),
              "channel_mixer_pointwise does not take this call");
  ChannelMixer call = pointwise(x, expand_weight, project_weight, residual, out);
  check_map(out, x, "out");
  check_shape(out, "out", {call.n, call.outputs, call.h, call.w});
  const ChannelVector expand(expand_bias, x, "expand_bias", call.hidden),
      project(project_bias, x, "project_bias", call.outputs), scales(scale, x, "scale", call.outputs);
  call.activation = kernel_activation(activation);
  call.expand = matrix_of(expand_weight), call.project = matrix_of(project_weight);
  call.expand_bias = expand.data(), call.project_bias = project.data(), call.scale = scales.data();
  call.out = written(out);
  const Session session(x);
  if (call.n > 0) channel_mixer_forward(call, session.device());
}

void bias_activation_(Tensor map, const std::optional<Tensor>& bias, const std::string& activation) {
  const DenseMaps maps = dense_maps(map);
  const ChannelVector vector(bias, map, "bias", map.size(1));
  const Session session(map);
  if (maps.n > 0)
    bias_activation(maps, kernel_activation(activation), map.mutable_data_ptr(), vector.data(),
                    session.device());
}

// With z = map + bias: gradient becomes gradient · act'(z), map becomes act(z).
void activation_backward_(Tensor map, const std::optional<Tensor>& bias, Tensor gradient,
                          const std::string& activation) {
  const DenseMaps maps = dense_maps(map);
  check_like(gradient, map, "gradient", 4);
  for (int d = 0; d < 4; ++d)
    FFNET_CHECK(gradient.size(d) == map.size(d) && (gradient.size(d) == 1 || gradient.stride(d) == map.stride(d)),
                "gradient must have the map's shape and layout");
  const ChannelVector vector(bias, map, "bias", map.size(1));
  const Session session(map);
  if (maps.n > 0)
    activation_backward(maps, kernel_activation(activation), map.mutable_data_ptr(), vector.data(),
                        gradient.mutable_data_ptr(), session.device());
}

void scale_residual_(Tensor out, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual) {
  const Session session(out);
  scale_and_add(out, bias, scale, residual, session.device());
}

// Which kernels a call of the public operators would start.
std::string describe_depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding) {
  check_map(x, x, "x");
  Convolution call = convolution(x, filter_of(weight, x, "weight", nullptr), weight.size(0), stride, padding);
  const Session session(x);
  call.x = map_of(x),
  call.out = planned(call.out_w, weight.size(0), suggests_channels_last(x) || suggests_channels_last(weight));
  return describe(choose(call, session.device()));
}

std::string describe_ffnified_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const std::optional<Tensor>& residual) {
  AttentionCall a(query, key, std::nullopt, value, std::nullopt, "none", std::nullopt, residual);
  const Session session(query);
  a.call.out = planned(a.call.w, a.call.channels, a.channels_last);
  return describe(choose(a.call, session.device()));
}

#ifdef FFNET_HOST_EXECUTION
void select_host(const std::string& schedule, int64_t seed, int64_t architecture, int64_t multiprocessors,
                 int64_t resident_blocks) {
  host::select_schedule(schedule == "forward"   ? host::Schedule::forward
                        : schedule == "reverse" ? host::Schedule::reverse
                                                : host::Schedule::shuffled,
                        static_cast<uint32_t>(seed));
  host::settings() = {static_cast<int>(architecture), static_cast<int>(multiprocessors),
                      static_cast<int>(resident_blocks)};
}

std::string started_kernels() { return host::started_kernels(); }
#endif

}  // namespace
}  // namespace ffnet

// For Python, while nothing is traced: 0, or 1 and why the library does not run on a GPU.
extern "C" __attribute__((visibility("default"))) int ffnet_cuda_check_device([[maybe_unused]] int device, char* reason,
                                                                              size_t size) {
  try {
#ifndef FFNET_HOST_EXECUTION
    const torch::stable::accelerator::DeviceGuard guard(device);
#endif
    ffnet::current_device(nullptr);
    return 0;
  } catch (const std::exception& error) {
    snprintf(reason, size, "%s", error.what());
    return 1;
  }
}

FFNET_DEFINE(ffnet_kernels_cuda, FFNET_KERNELS_CUDA_SCHEMAS)

STABLE_TORCH_LIBRARY_FRAGMENT(ffnet_kernels_cuda, m) {
  m.def(
      "depthwise_conv2d_activation_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] "
      "padding, "
      "str activation) -> Tensor");
  m.def("depthwise_conv2d_dgrad(Tensor grad, Tensor weight, Tensor like, int[2] stride, int[4] padding) -> Tensor");
  m.def(
      "depthwise_conv2d_wgrad(Tensor grad, Tensor x, int[2] kernel_size, int[2] stride, int[4] padding) -> (Tensor, "
      "Tensor)");
  m.def(
      "ffnified_attention_dgrad(Tensor grad, Tensor query, Tensor key, Tensor? key_bias, Tensor value, str activation, "
      "Tensor? scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ffnified_attention_value_grads(Tensor grad, Tensor hidden, Tensor value, Tensor? value_bias, Tensor? scale) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("ffnified_attention_dgrad_takes(Tensor grad, Tensor query, Tensor key, Tensor value) -> bool");
  m.def(
      "channel_mixer_fits(Tensor x, Tensor expand_weight, Tensor project_weight, Tensor? residual, Tensor out) -> "
      "bool");
  m.def(
      "channel_mixer_pointwise(Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, "
      "Tensor? project_bias, str activation, Tensor? scale, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("bias_activation_(Tensor(a!) map, Tensor? bias, str activation) -> ()");
  m.def("activation_backward_(Tensor(a!) map, Tensor? bias, Tensor(b!) gradient, str activation) -> ()");
  m.def("scale_residual_(Tensor(a!) out, Tensor? bias, Tensor? scale, Tensor? residual) -> ()");
  m.def("describe_depthwise_conv2d(Tensor x, Tensor weight, int[2] stride, int[4] padding) -> str");
  m.def("describe_ffnified_attention(Tensor query, Tensor key, Tensor value, Tensor? residual) -> str");
#ifdef FFNET_HOST_EXECUTION
  m.def("select_host(str schedule, int seed, int architecture, int multiprocessors, int resident_blocks) -> ()");
  m.def("started_kernels() -> str");
#endif
}

#ifdef FFNET_HOST_EXECUTION
STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("select_host", TORCH_BOX(&ffnet::select_host));
  m.impl("started_kernels", TORCH_BOX(&ffnet::started_kernels));
}
STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, CUDA, m) {
#endif
  using namespace ffnet;
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_activation_backward", TORCH_BOX(&depthwise_conv2d_activation_backward));
  m.impl("depthwise_conv2d_dgrad", TORCH_BOX(&depthwise_conv2d_dgrad));
  m.impl("depthwise_conv2d_wgrad", TORCH_BOX(&depthwise_conv2d_wgrad));
  m.impl("ffnified_attention", TORCH_BOX(&ffnified_attention));
  m.impl("ffnified_attention_dgrad", TORCH_BOX(&ffnified_attention_dgrad));
  m.impl("ffnified_attention_value_grads", TORCH_BOX(&ffnified_attention_value_grads));
  m.impl("ffnified_attention_dgrad_takes", TORCH_BOX(&ffnified_attention_dgrad_takes));
  m.impl("channel_mixer_fits", TORCH_BOX(&channel_mixer_takes));
  m.impl("channel_mixer_pointwise", TORCH_BOX(&channel_mixer_pointwise));
  m.impl("bias_activation_", TORCH_BOX(&bias_activation_));
  m.impl("activation_backward_", TORCH_BOX(&activation_backward_));
  m.impl("scale_residual_", TORCH_BOX(&scale_residual_));
  m.impl("describe_depthwise_conv2d", TORCH_BOX(&describe_depthwise_conv2d));
  m.impl("describe_ffnified_attention", TORCH_BOX(&describe_ffnified_attention));
}
