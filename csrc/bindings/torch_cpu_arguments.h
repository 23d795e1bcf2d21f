// Converts tensors to arguments of CPU kernels, with the checks that memory safety needs.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/select.h"
#include "../cpu/storage.h"
#include "torch_common.h"

namespace ffnet::cpu_arguments {

// Threads take the next index when they finish one, so that a core taken by another process does not delay the rest.
inline void run_on_torch_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
  });
}

inline Executor executor() { return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_threads}; }

inline Storage storage(const Tensor& map) {
  switch (map.scalar_type()) {
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    case ScalarType::Float: return Storage::float32;
    default: STD_TORCH_CHECK(false, "ffnet_kernels (cpu): takes float32, bfloat16 and float16");
  }
}

inline bool has_kernel(const Tensor& map) {
  const ScalarType type = map.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// The map that determines how the others are read.
inline void check_map(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && has_kernel(t), "ffnet_kernels (cpu): ", name,
                  " must be a 4-dimensional CPU tensor of float32, bfloat16 or float16");
}

// A CPU tensor of `dim` dimensions with elements of x's type.
inline void check_cpu(const Tensor& t, const char* name, int64_t dim, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == dim && t.scalar_type() == x.scalar_type(), "ffnet_kernels (cpu): ", name,
                  " must be a ", dim, "-dimensional CPU tensor of the map's dtype");
}

inline Strides strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Whether a tensor is a dense channels-last map: a matrix [pixels][channels].
inline bool is_pixel_matrix(const Tensor& t) {
  if (!t.is_cpu() || t.dim() != 4) return false;
  const int64_t c = t.size(1), w = t.size(3), stride[] = {t.size(2) * w * c, 1, w * c, c};
  for (int d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != stride[d]) return false;
  return true;
}

inline int64_t pixels(const Tensor& map) { return map.size(0) * map.size(2) * map.size(3); }

inline bool has_size(const Tensor& map, const std::array<int64_t, 4>& size) {
  for (int d = 0; d < 4; ++d)
    if (map.size(d) != size[d]) return false;
  return true;
}

// A per-channel vector as contiguous float32; keeps a copy alive if one was needed.
class ChannelVector {
 public:
  ChannelVector(const std::optional<Tensor>& vector, const char* name, int64_t channels, const Tensor& x) {
    if (!vector) return;
    check_cpu(*vector, name, 1, x);
    STD_TORCH_CHECK(vector->size(0) == channels, "ffnet_kernels (cpu): ", name, " must have ", channels, " elements");
    tensor_ = channels == 1 || vector->stride(0) == 1 ? *vector : torch::stable::contiguous(*vector);
    if (x.scalar_type() == ScalarType::Float) {
      data_ = static_cast<const float*>(tensor_->const_data_ptr());
    } else {
      widened_.resize(channels);
      if (x.scalar_type() == ScalarType::Half)
        widen<Float16>();
      else
        widen<BFloat16>();
    }
  }
  ChannelVector(const ChannelVector&) = delete;
  const float* data() const { return data_; }

 private:
  template <class T>
  void widen() {
    const T* from = static_cast<const T*>(tensor_->const_data_ptr());
    for (size_t i = 0; i < widened_.size(); ++i) widened_[i] = baseline::to_float(from[i]);
    data_ = widened_.data();
  }

  std::optional<Tensor> tensor_;
  std::vector<float> widened_;
  const float* data_ = nullptr;
};

inline Filter filter(const Tensor& weight, const char* name, const ChannelVector& bias, const Tensor& x) {
  check_cpu(weight, name, 4, x);
  STD_TORCH_CHECK(weight.size(1) == 1 && weight.size(2) > 0 && weight.size(3) > 0, "ffnet_kernels (cpu): ", name,
                  " must have the shape [O, 1, kh, kw]");
  return {weight.const_data_ptr(), bias.data(),      weight.size(2),  weight.size(3),
          weight.stride(0),        weight.stride(2), weight.stride(3)};
}

// Sets stride, padding and the size of the result from the size of the map.
template <class Op>
void set_geometry(Op& op, int64_t kh, int64_t kw, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(stride.size() == 2 && (stride[0] == 1 || stride[0] == 2) && (stride[1] == 1 || stride[1] == 2),
                  "ffnet_kernels (cpu): stride must be two numbers, each 1 or 2");
  STD_TORCH_CHECK(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0,
                  "ffnet_kernels (cpu): padding must be (top, bottom, left, right), none of them negative");
  op.stride_h = stride[0], op.stride_w = stride[1];
  op.pad_top = padding[0], op.pad_left = padding[2];
  const int64_t room_h = op.h + padding[0] + padding[1] - kh, room_w = op.w + padding[2] + padding[3] - kw;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "ffnet_kernels (cpu): the padded map is smaller than the kernel");
  STD_TORCH_CHECK(op.h > 0 && op.w > 0, "ffnet_kernels (cpu): x must have height and width");
  op.out_h = room_h / op.stride_h + 1, op.out_w = room_w / op.stride_w + 1;
}

// The arguments that a depthwise convolution and its backward pass share.
template <class Op>
Op depthwise_arguments(const Tensor& x, const Tensor& weight, const ChannelVector& bias,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::string& activation) {
  check_map(x, "x");
  check_cpu(weight, "weight", 4, x);
  const int64_t c = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(c > 0 && outputs > 0 && outputs % c == 0,
                  "ffnet_kernels (cpu): weight must have a multiple of x's channels");
  Op op{};
  op.storage = storage(x);
  op.filter = filter(weight, "weight", bias, x);
  op.n = x.size(0), op.channels = c, op.multiplier = outputs / c;
  op.h = x.size(2), op.w = x.size(3);
  set_geometry(op, op.filter.kh, op.filter.kw, stride, padding);
  op.activation = parse_activation(activation);
  op.x = x.const_data_ptr(), op.x_stride = strides(x);
  return op;
}

struct AttentionVectors {
  ChannelVector key_bias, value_bias, scale;
  AttentionVectors(const Tensor& query, const std::optional<Tensor>& key, const std::optional<Tensor>& value,
                   const std::optional<Tensor>& layer_scale)
      : key_bias(key, "key_bias", channels(query), query),
        value_bias(value, "value_bias", channels(query), query),
        scale(layer_scale, "scale", channels(query), query) {}

 private:
  static int64_t channels(const Tensor& query) {
    check_map(query, "query");
    return query.size(1);
  }
};

// The same for ffnified_attention.
template <class Op>
Op attention_arguments(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionVectors& vectors,
                       const std::string& activation) {
  check_map(query, "query");
  check_cpu(key, "key", 4, query);
  check_cpu(value, "value", 4, query);
  Op op{};
  op.storage = storage(query);
  op.n = query.size(0), op.channels = query.size(1), op.h = query.size(2), op.w = query.size(3);
  STD_TORCH_CHECK(op.channels > 0 && op.h > 0 && op.w > 0,
                  "ffnet_kernels (cpu): query must have channels, height and width");
  STD_TORCH_CHECK(key.size(0) == op.channels && value.size(0) == op.channels,
                  "ffnet_kernels (cpu): key and value must have query's channels");
  op.key = filter(key, "key", vectors.key_bias, query), op.value = filter(value, "value", vectors.value_bias, query);
  op.key_pad_top = (op.key.kh - 1) / 2, op.key_pad_left = (op.key.kw - 1) / 2;
  op.value_pad_top = (op.value.kh - 1) / 2, op.value_pad_left = (op.value.kw - 1) / 2;
  op.activation = parse_activation(activation);
  op.scale = vectors.scale.data();
  op.query = query.const_data_ptr(), op.query_stride = strides(query);
  return op;
}

}  // namespace ffnet::cpu_arguments
