// The CUDA kernels as plain functions: no torch here. Each starts its kernels on `stream` and returns; nothing
// synchronises or allocates. Pointers are of the current device; a failed start raises std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "../activations.h"

namespace ffnet {

enum class Dtype { float32, float16, bfloat16 };

// Which activations activation.h has. One more cost the kernels' main loops a fifth more instructions, whichever a call
// used.
inline bool has_kernel(Activation activation) {
  return activation == Activation::none || activation == Activation::relu || activation == Activation::gelu ||
         activation == Activation::gelu_tanh || activation == Activation::silu;
}

// A map [N, C, H, W] in any layout; strides in elements.
struct Map {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;  // strides
};

// A depthwise filter [outputs, 1, kh, kw] and the bias of its outputs (dense, or null).
struct Filter {
  const void* data = nullptr;
  int64_t output = 0, y = 0, x = 0;  // strides
  const void* bias = nullptr;
  int kh = 0, kw = 0;
};

// out = act(conv(x, filter) + bias): [n, channels, h, w] to [n, channels·multiplier, out_h, out_w]. Where `gradient`
// (a map like out) has data, out = gradient · act'(conv(x, filter) + bias), from which the gradients are computed.
struct Convolution {
  Dtype dtype;
  int64_t n, channels;
  int multiplier;  // outputs of a channel
  int h, w, out_h, out_w;
  int stride_h, stride_w, pad_top, pad_left;
  Activation activation;
  Map x, out, gradient;
  Filter filter;
};

// out = residual + scale · (conv(act(conv(query, key)), value)): same padding; key and value with their biases. Scale
// (dense) and residual (data) may be null.
struct Attention {
  Dtype dtype;
  int64_t n, channels;
  int h, w;
  Activation activation;
  Map query, out, residual;
  Filter key, value;
  const void* scale;
};

// What decides between kernels besides a call's shape.
struct Device {
  int architecture;  // that kernels were compiled for, 10 · major + minor
  int multiprocessors;
  void* stream;
};

// The current device's properties, with the stream that kernels run on. Raises std::runtime_error where the library has
// no code for it.
Device current_device(void* stream);

// ---- any layout, dtype and architecture, on CUDA cores (direct_convolution.cu, direct_wgrad.cu) ----

void direct_forward(const Convolution& call, const Device& device);

// call.x = gradient of the input, written; call.out = gradient of the result, read. No activation.
void direct_dgrad(const Convolution& call, const Device& device);

// As wgrad below.
int64_t direct_wgrad_splits(const Convolution& call, const Device& device);
void direct_wgrad(const Convolution& call, float* partials, const Device& device);

// ---- 16-bit NCHW planes on tensor cores, sm_80 on ----

// Filters of up to 7 rows and 9 columns, stride 1: each map is read and written once (depthwise_stream.cu).
bool stream_takes(const Convolution& call);
void stream_forward(const Convolution& call, const Device& device);

// As direct_dgrad, for calls that stream_takes and that have one output a channel.
void stream_dgrad(const Convolution& call, const Device& device);

// Backward of a convolution with stride 1 and a result like its map, which stream_takes: reads call.x and
// call.gradient; writes the gradient of x and partial sums of those of the filter and its bias, as `wgrad` below writes
// them (depthwise_backward.cu).
bool stream_backward_takes(const Convolution& call);
int64_t stream_backward_splits(const Convolution& call, const Map& x_grad, const Device& device);
void stream_backward(const Convolution& call, const Map& x_grad, float* partials, const Device& device);

// Any filter up to 31x31, stride 1 or 2, one or two outputs a channel (banded.cu).
bool banded_takes(const Convolution& call);
void banded_forward(const Convolution& call, const Device& device);

// As direct_dgrad.
void banded_dgrad(const Convolution& call, const Device& device);

bool attention_takes(const Attention& call);
void attention_forward(const Attention& call, const Device& device);

// Backward of the attention, with call.out being read as the gradient of the result: the gradient of the query, and
// partial sums of those of the filters and their biases, as `wgrad` below writes them. The value's are of the result
// without its scale. Takes what attention_takes does, all maps being planes.
struct AttentionGradients {
  Map query_grad;
  float *key_partials = nullptr, *value_partials = nullptr;
};
int64_t attention_backward_splits(const Attention& call, const AttentionGradients& gradients, const Device& device);
void attention_backward(const Attention& call, const AttentionGradients& gradients, const Device& device);

// ---- gradients of filters ----

// From call.x and call.out, the gradient of the result; stride 1 or 2, filters up to 31x31 (wgrad.cu). The splits of a
// call write partial sums: [splits][outputs][kh·kw + 1] floats, the last of each being the bias's.
bool wgrad_takes(const Convolution& call);
int64_t wgrad_splits(const Convolution& call, const Device& device);
void wgrad(const Convolution& call, float* partials, const Device& device);

// Adds partial sums up: filter_grad = scale · sums, bias_grad alike, and scale_grad = Σ filter · sums + bias · sum. All
// vectors and filter_grad ([outputs, kh, kw]) dense and of one dtype; those that are null are left out.
struct FilterGradients {
  Dtype dtype;
  int64_t outputs, splits;
  const float* partials;
  Filter filter;  // data may be null where scale_grad is
  const void* scale;
  void *filter_grad, *bias_grad, *scale_grad;
};
void finish_filter_gradients(const FilterGradients& call, const Device& device);

}  // namespace ffnet
