// The arguments of CPU kernels, and the table of kernels that each instruction set provides.
// Free of torch: kernels compile in seconds and run under sanitizers or another host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activations.h"

namespace ffnet {

// The element type of maps and weights; sums are float32. Biases and layer scales are always float32.
enum class Storage : int { float32, bfloat16, float16 };
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Strides of a [N, C, H, W] map, in elements.
struct Strides {
  int64_t n, c, h, w;
};

// A depthwise filter [O, 1, kh, kw] with element strides, and its bias [O] (contiguous, may be null).
struct Filter {
  const void* weight;
  const float* bias;
  int64_t kh, kw;
  int64_t stride_o, stride_h, stride_w;
};

// Runs body(context, i) once for every i in [0, count), on any threads, in any order.
struct Executor {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
};

// What a depthwise convolution and its gradients read.
struct DepthwiseInput {
  Storage storage;
  int64_t n, channels, multiplier;
  int64_t h, w, out_h, out_w;
  int64_t stride_h, stride_w, pad_top, pad_left;
  const void* x;
  Strides x_stride;
  Filter filter;
  Activation activation;
};

// out[n, o, i, j] = act(bias[o] + sum_{ky, kx} x[n, o / multiplier, i*stride_h - pad_top + ky, ...] * weight[o, ky,
// kx])
struct DepthwiseConv2d : DepthwiseInput {
  void* out;
  Strides out_stride;
};

// What an FFNified attention and its gradients read.
struct AttentionInput {
  Storage storage;
  int64_t n, channels, h, w;
  const void* query;
  Strides query_stride;
  Filter key, value;
  int64_t key_pad_top, key_pad_left, value_pad_top, value_pad_left;
  Activation activation;
  const float* scale;  // [C] contiguous, may be null
};

// out = residual + scale * (DW(act(DW(query; key)); value)), both convolutions stride 1 and "same" padded.
struct FfnifiedAttention : AttentionInput {
  const void* residual;  // may be null
  Strides residual_stride;
  void* out;
  Strides out_stride;
};

// (x - mean) / sqrt(variance + eps) * weight + bias, mean and variance over the channels of a pixel.
struct LayerNorm {
  const float *weight, *bias;  // [channels] contiguous, may be null
  float eps;
};

// out = residual + scale * (project * act(expand * norm(DW(x; filter)) + expand_bias) + project_bias), "same" padded.
struct ChannelMixer {
  Storage storage;
  int64_t n, channels, hidden, outputs, h, w, out_h, out_w;  // out_h = h, out_w = w
  const void* x;
  Strides x_stride;
  Filter filter;
  int64_t pad_top, pad_left;
  const LayerNorm* norm;  // null: none
  const void* expand;     // [hidden][channels], rows expand_stride apart
  int64_t expand_stride;
  const float* expand_bias;  // [hidden] contiguous, may be null
  const void* project;       // [outputs][hidden], rows project_stride apart
  int64_t project_stride;
  const float* project_bias;  // [outputs] contiguous, may be null
  Activation activation;
  const float* scale;    // [outputs] contiguous, may be null
  const void* residual;  // may be null
  Strides residual_stride;
  void* out;
  Strides out_stride;
};

// out = residual + scale * act(conv(x; weight) + bias), one group.
struct Conv2d {
  Storage storage;
  int64_t n, channels, outputs;
  int64_t h, w, out_h, out_w;
  int64_t kh, kw, stride_h, stride_w, pad_top, pad_left;
  const void* x;
  Strides x_stride;
  const void* weight;  // [outputs][kh * kw * channels], rows weight_stride apart
  int64_t weight_stride;
  bool channels_inside;  // order of a row: [kh][kw][channels], else [channels][kh][kw]
  const float* bias;     // [outputs] contiguous, may be null
  Activation activation;
  const float* scale;    // [outputs] contiguous, may be null
  const void* residual;  // may be null
  Strides residual_stride;
  void* out;
  Strides out_stride;
};

// Of a filter [O, 1, kh, kw] and its bias [O] (contiguous); either may be null. Elements are those of the maps.
struct FilterGrad {
  void* weight;
  int64_t stride_o, stride_h, stride_w;
  void* bias;
};

// Gradients of DepthwiseConv2d, with one or two outputs per channel; null ones are not wanted.
struct DepthwiseConv2dBackward : DepthwiseInput {
  const void* grad;
  Strides grad_stride;
  void* x_grad;
  Strides x_grad_stride;
  FilterGrad filter_grad;
};

// Gradients of FfnifiedAttention; null ones are not wanted. That of the residual is the incoming one.
struct FfnifiedAttentionBackward : AttentionInput {
  const void* grad;
  Strides grad_stride;
  void* query_grad;
  Strides query_grad_stride;
  FilterGrad key_grad, value_grad;
  void* scale_grad;  // [C] contiguous
};

// Gradients of a 1x1 convolution; maps are dense and channels-last, [pixels][channels], all float32 and contiguous.
struct PointwiseConv2dBackward {
  int64_t pixels, inputs, outputs;
  const float *grad, *x, *weight;
  float *x_grad, *weight_grad, *bias_grad;  // may be null; the bias' needs the weight's
};

// training.h
struct BatchNorm;
struct BatchNormBackward;
struct BranchedDepthwise;
struct BranchedDepthwiseBackward;
struct FeedForward;
struct FeedForwardBackward;

// The list of kernels: name and arguments of each.
#define FFNET_KERNELS(X)                                    \
  X(depthwise_conv2d, DepthwiseConv2d)                      \
  X(depthwise_conv2d_backward, DepthwiseConv2dBackward)     \
  X(ffnified_attention, FfnifiedAttention)                  \
  X(ffnified_attention_backward, FfnifiedAttentionBackward) \
  X(channel_mixer, ChannelMixer)                            \
  X(conv2d, Conv2d)                                         \
  X(pointwise_conv2d_backward, PointwiseConv2dBackward)     \
  X(batch_norm, BatchNorm)                                  \
  X(batch_norm_backward, BatchNormBackward)                 \
  X(branched_depthwise, BranchedDepthwise)                  \
  X(branched_depthwise_backward, BranchedDepthwiseBackward) \
  X(feed_forward, FeedForward)                              \
  X(feed_forward_backward, FeedForwardBackward)

struct Kernels {
  const char* isa;
  int lanes;  // channels computed together
#define FFNET_POINTER(name, Operation) void (*name)(const Operation&, const Executor&);
  FFNET_KERNELS(FFNET_POINTER)
#undef FFNET_POINTER
  bool (*is_unrolled)(int64_t kh, int64_t kw);  // whether filters of this size have specialised code
  // Whether two convolutions can be run as one, and that is faster; ignores the second one's x and strides, and the
  // first one's out. conv2d_pair throws std::invalid_argument for what pairs_conv2d refuses.
  bool (*pairs_conv2d)(const Conv2d& first, const Conv2d& second);
  void (*conv2d_pair)(const Conv2d& first, const Conv2d& second, const Executor&);
  int64_t (*multiply_adds)(Storage, int64_t rounds);  // on registers, for benchmarks: returns how many were done
};

// Instruction sets, slowest first; a build has some of them.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

// Scratch of at least `floats` floats, 64-byte aligned, owned by the calling thread and reused between calls.
// Throws std::bad_alloc.
float* thread_scratch(size_t floats);

// Called with all scratch before its first use; tests have it filled with NaN to reveal reads of unwritten memory.
void poison(float* scratch, size_t floats);

}  // namespace ffnet
