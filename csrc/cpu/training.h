// The arguments of kernels of training steps. Batch normalisation here uses batch statistics. Maps and convolution
// weights have one storage type; tensors of normalisations are float32.
#pragma once

#include "kernels.h"

namespace ffnet {

constexpr int kMaxBranches = 2;

// (y - mean) * gamma / sqrt(variance + eps) + beta, one element for each channel.
struct Norm {
  const float *gamma, *beta;
  float eps;
  float *mean, *variance;  // of the batch (biased): the forward pass writes them, the backward pass reads them
};
struct NormGradients {
  float *gamma, *beta;
};

// A depthwise convolution, padded by half its (odd) filter and without bias, and the normalisation that follows.
struct Branch {
  Filter filter;
  Norm norm;
};

// out = act(sum of the branches)
struct BranchedDepthwise {
  Storage storage;
  int64_t n, channels, multiplier, h, w, out_h, out_w, stride_h, stride_w;
  const void* x;
  Strides x_stride;
  int branches;
  Branch branch[kMaxBranches];
  Activation activation;
  void* out;
  Strides out_stride;
};

struct BranchGradients {
  void* weight;  // contiguous [C, 1, kh, kw]
  NormGradients norm;
};

// Takes stride 1 and one output per channel.
struct BranchedDepthwiseBackward {
  BranchedDepthwise forward;  // out is not read
  const void* grad;
  Strides grad_stride;
  void* x_grad;  // may be null
  Strides x_grad_stride;
  BranchGradients gradients[kMaxBranches];
};

// Maps from here on are dense and channels-last, [pixels][channels]; weights are [outputs][inputs]; all contiguous.

// out = act(norm(x))
struct BatchNorm {
  Storage storage;
  int64_t pixels, channels;
  const void* x;
  Norm norm;
  Activation activation;
  void* out;
};

struct BatchNormBackward {
  BatchNorm forward;  // out is not read
  const void* grad;
  void* x_grad;  // may be null
  NormGradients gradients;
};

// float32 alone: out = residual + scale * (project * act(z) + project_bias), z = expand * x + expand_bias
struct FeedForward {
  int64_t pixels, channels, hidden, outputs;
  const float* x;
  const float *expand, *expand_bias, *project, *project_bias;  // biases may be null
  Activation activation;
  const float *scale, *residual;  // may be null
  float* z;                       // written by the forward pass, read by the backward pass
  float* out;
};

struct FeedForwardBackward {
  FeedForward forward;  // out and residual are not read
  const float* grad;
  float* x_grad;  // may be null
  float *expand_grad, *expand_bias_grad, *project_grad, *project_bias_grad;
  float* scale_grad;  // null where there is no scale
};

}  // namespace ffnet
