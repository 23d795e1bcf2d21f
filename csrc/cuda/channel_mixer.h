// The channel mixer after its depthwise convolution, per pixel: out = residual + scale·(W2·act(W1·x + b1) + b2).
//
// Few channels: one kernel does it all and the hidden map never reaches memory. Many: a library multiplies and the
// element-wise kernels below do the rest in one pass each.
#pragma once

#include "kernels.h"

namespace ffnet {

// A matrix whose rows are `stride` elements apart and whose columns are adjacent.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Biases, scale and residual may be null; all of them have the maps' dtype. `out` may be `x` or the residual itself.
struct ChannelMixer {
  Dtype dtype;
  int64_t n;
  int channels, hidden, outputs;
  int h, w;
  Activation activation;
  Map x, residual, out;
  Matrix expand, project;  // W1: [hidden, channels], W2: [outputs, hidden]
  const void *expand_bias = nullptr, *project_bias = nullptr, *scale = nullptr;
};

// Whether channel_mixer_forward takes the call: 16-bit storage, sm_80 on, at most 128 channels and outputs, maps all
// NCHW or all channels-last with the pixels of an image evenly spaced.
bool channel_mixer_fits(const ChannelMixer& call, const Device& device);
void channel_mixer_forward(const ChannelMixer& call, const Device& device);

// What the element-wise kernels work on: dense maps of one layout, [n, channels, pixels] or [n, pixels, channels].
struct DenseMaps {
  Dtype dtype;
  int64_t n;
  int channels;
  int64_t pixels;
  bool channels_last;
};

// map = act(map + bias); a null bias adds nothing.
void bias_activation(const DenseMaps& maps, Activation activation, void* map, const void* bias, const Device& device);

// out = residual + scale·(out + bias); each of residual, scale and bias may be null.
void scale_residual(const DenseMaps& maps, void* out, const void* bias, const void* scale, const void* residual,
                    const Device& device);

// With z = map + bias: gradient = gradient·act'(z), then map = act(z).
void activation_backward(const DenseMaps& maps, Activation activation, void* map, const void* bias, void* gradient,
                         const Device& device);

}  // namespace ffnet
