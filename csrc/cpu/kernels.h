// What a CPU kernel takes, and the table of kernels each instruction set provides.
// Free of torch: kernels compile in seconds and run under sanitizers or another host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ffnet {

enum class Activation : int { none, gelu, gelu_tanh, relu, silu };

// Strides of a [N, C, H, W] map, in elements.
struct Strides {
  int64_t n, c, h, w;
};

// A depthwise filter [O, 1, kh, kw] with element strides, and its bias [O] (contiguous, may be null).
struct Filter {
  const float* weight;
  const float* bias;
  int64_t kh, kw;
  int64_t stride_o, stride_h, stride_w;
};

// Runs body(context, i) once for every i in [0, count), on any threads, in any order.
struct Executor {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
};

// out[n, o, i, j] = act(bias[o] + sum_{ky, kx} x[n, o / multiplier, i*stride_h - pad_top + ky, ...] * weight[o, ky, kx])
struct DepthwiseConv2d {
  int64_t n, channels, multiplier;
  int64_t h, w, out_h, out_w;
  int64_t stride_h, stride_w, pad_top, pad_left;
  const float* x;
  Strides x_stride;
  Filter filter;
  Activation activation;
  float* out;
  Strides out_stride;
};

// out = residual + scale * (DW(act(DW(query; key)); value)), both convolutions stride 1 and "same" padded.
struct FfnifiedAttention {
  int64_t n, channels, h, w;
  const float* query;
  Strides query_stride;
  Filter key, value;
  int64_t key_pad_top, key_pad_left, value_pad_top, value_pad_left;
  Activation activation;
  const float* scale;     // [C] contiguous, may be null
  const float* residual;  // may be null
  Strides residual_stride;
  float* out;
  Strides out_stride;
};

// out = residual + scale * (project * act(expand * (DW(x; filter)) + expand_bias) + project_bias), "same" padded.
struct ChannelMixer {
  int64_t n, channels, hidden, outputs, h, w;
  const float* x;
  Strides x_stride;
  Filter filter;
  int64_t pad_top, pad_left;
  const float* expand;  // [hidden][channels], rows expand_stride apart
  int64_t expand_stride;
  const float* expand_bias;  // [hidden] contiguous, may be null
  const float* project;      // [outputs][hidden], rows project_stride apart
  int64_t project_stride;
  const float* project_bias;  // [outputs] contiguous, may be null
  Activation activation;
  const float* scale;     // [outputs] contiguous, may be null
  const float* residual;  // may be null
  Strides residual_stride;
  float* out;
  Strides out_stride;
};

// Of a filter [O, 1, kh, kw] and its bias [O] (contiguous); either may be null.
struct FilterGrad {
  float* weight;
  int64_t stride_o, stride_h, stride_w;
  float* bias;
};

// Gradients of DepthwiseConv2d, of one or two outputs per channel; those that are null are not wanted.
struct DepthwiseConv2dBackward {
  int64_t n, channels, multiplier;
  int64_t h, w, out_h, out_w;
  int64_t stride_h, stride_w, pad_top, pad_left;
  const float* x;
  Strides x_stride;
  Filter filter;
  Activation activation;
  const float* grad;
  Strides grad_stride;
  float* x_grad;
  Strides x_grad_stride;
  FilterGrad filter_grad;
};

// Gradients of FfnifiedAttention; those that are null are not wanted. That of the residual is the incoming one.
struct FfnifiedAttentionBackward {
  int64_t n, channels, h, w;
  const float* query;
  Strides query_stride;
  Filter key, value;
  int64_t key_pad_top, key_pad_left, value_pad_top, value_pad_left;
  Activation activation;
  const float* scale;  // [C] contiguous, may be null
  const float* grad;
  Strides grad_stride;
  float* query_grad;
  Strides query_grad_stride;
  FilterGrad key_grad, value_grad;
  float* scale_grad;  // [C] contiguous
};

struct TrainingKernels;

struct Kernels {
  const char* isa;
  int lanes;  // channels computed together
  bool (*is_unrolled)(int64_t kh, int64_t kw);  // whether filters of this size have code of their own
  void (*depthwise_conv2d)(const DepthwiseConv2d&, const Executor&);
  void (*depthwise_conv2d_backward)(const DepthwiseConv2dBackward&, const Executor&);
  void (*ffnified_attention)(const FfnifiedAttention&, const Executor&);
  void (*ffnified_attention_backward)(const FfnifiedAttentionBackward&, const Executor&);
  void (*channel_mixer)(const ChannelMixer&, const Executor&);
  const TrainingKernels* (*training)();  // see training.h
};

// Instruction sets, slowest first; null where this build holds none for them.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// Scratch of at least `floats` floats, 64-byte aligned, owned by the calling thread and reused between calls.
// Throws std::bad_alloc.
float* thread_scratch(size_t floats);

}  // namespace ffnet
