// What the bindings of the CUDA kernels share: checks of arguments, calls made from them, partial sums. Arguments of
// the public operators have been checked by ffnet_kernels/ops/_arguments.py; what memory safety needs is checked here
// again.
#pragma once

#include "torch_common.h"

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/channel_mixer.h"
#include "../cuda/dispatch.h"
#ifdef FFNET_HOST_EXECUTION
#define FFNET_CUDA_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define FFNET_CUDA_KEY CUDA
#endif

namespace ffnet {

#define FFNET_CHECK(condition, ...) STD_TORCH_CHECK(condition, "ffnet_kernels (cuda): ", __VA_ARGS__)

inline Activation kernel_activation(const std::string& name) {
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

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: FFNET_CHECK(false, "takes float32, float16 and bfloat16");
  }
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name, int64_t dim) {
  FFNET_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions");
  FFNET_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the map's dtype");
  FFNET_CHECK(t.device() == like.device(), name, " must be on the map's device");
}

inline void check_map(const Tensor& t, const Tensor& like, const char* name) {
  check_like(t, like, name, 4);
  FFNET_CHECK(t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0, name, " must have channels, height and width");
  FFNET_CHECK(t.size(1) <= kMostElements && t.size(2) <= kMostElements && t.size(3) <= kMostElements, name,
              " must have up to 2^28 channels, rows and columns");
}

inline void check_shape(const Tensor& t, const char* name, const std::array<int64_t, 4>& shape) {
  for (int d = 0; d < 4; ++d) FFNET_CHECK(t.size(d) == shape[d], name, " has a wrong shape at dimension ", d);
}

inline Map map_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
inline Map written(Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// A per-channel vector as dense memory; keeps the copy alive if one was needed.
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

inline Filter filter_of(const Tensor& weight, const Tensor& like, const char* name, const void* bias) {
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
inline Convolution convolution(const Tensor& x, const Filter& filter, int64_t outputs,
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
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
inline Map planned(int64_t width, int64_t channels, bool channels_last) {
  Map map{};
  map.w = channels_last ? channels : 1, map.c = channels_last ? 1 : width, map.h = map.w * width;
  return map;
}

// The layout of a dense map, whose pixels are in the order of memory.
inline DenseMaps dense_maps(const Tensor& map) {
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
inline void scale_and_add(Tensor& out, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
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

inline void run_forward(const Convolution& call, const Device& device) {
  if (call.n == 0) return;
  switch (choose(call, device)) {
    case ConvolutionKernel::stream: return stream_forward(call, device);
    case ConvolutionKernel::banded: return banded_forward(call, device);
    default: return direct_forward(call, device);
  }
}

// Partial sums of the gradients of a filter and its bias: [splits, outputs, taps + 1], float32.
inline Tensor empty_partials(int64_t splits, int64_t outputs, const Filter& filter, const Tensor& like) {
  return torch::stable::empty({splits, outputs, int64_t{filter.kh} * filter.kw + 1}, ScalarType::Float, std::nullopt,
                              like.device());
}

inline Tensor filter_partials(Convolution& call, const Tensor& like, const Device& device) {
  const bool tensor_cores = choose_wgrad(call, device);
  const int64_t splits = call.n == 0    ? 0
                         : tensor_cores ? wgrad_splits(call, device)
                                        : direct_wgrad_splits(call, device);
  Tensor partials = empty_partials(splits, call.channels * call.multiplier, call.filter, like);
  if (splits == 0) return partials;
  auto* data = static_cast<float*>(partials.mutable_data_ptr());
  tensor_cores ? wgrad(call, data, device) : direct_wgrad(call, data, device);
  return partials;
}

// The gradients that partial sums add up to: of a filter, its bias and, if wanted, the scale of its results.
struct FilterGradientTensors {
  const Tensor& partials;
  FilterGradients call{};
  Tensor filter, bias;
  std::optional<Tensor> scale;

  FilterGradientTensors(const Tensor& partials_, const Filter& of, const Tensor& like, bool with_scale)
      : partials(partials_), filter(empty_map(like, {partials_.size(1), 1, of.kh, of.kw}, false)), bias(vector(like)) {
    if (with_scale) scale = vector(like);
    call.dtype = dtype_of(like);
    call.filter = of;
  }

  void finish(const void* scale_data, const Device& device) {
    call.outputs = partials.size(1), call.splits = partials.size(0);
    call.partials = static_cast<const float*>(partials.const_data_ptr());
    call.scale = scale_data;
    call.filter_grad = filter.mutable_data_ptr(), call.bias_grad = bias.mutable_data_ptr();
    call.scale_grad = scale ? scale->mutable_data_ptr() : nullptr;
    finish_filter_gradients(call, device);
  }

 private:
  Tensor vector(const Tensor& like) const {
    return torch::stable::empty({partials.size(1)}, like.scalar_type(), std::nullopt, like.device());
  }
};

}  // namespace ffnet
