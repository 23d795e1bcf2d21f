// Which kernel a call runs: the only place that decides, and the words that `explain` prints for it.
#pragma once

#include "kernels.h"

namespace ffnet {

constexpr int kOldestTensorCores = 80;  // of bfloat16, of 16-deep products and of asynchronous copies

enum class ConvolutionKernel { stream, banded, direct };
enum class AttentionKernel { stream, two_convolutions };

inline bool has_tensor_cores(const Device& device) { return device.architecture >= kOldestTensorCores; }

// 16-bit NCHW planes run on tensor cores; float32, other layouts and older GPUs on CUDA cores.
inline ConvolutionKernel choose(const Convolution& call, const Device& device) {
  if (has_tensor_cores(device)) {
    if (stream_takes(call)) return ConvolutionKernel::stream;
    if (banded_takes(call)) return ConvolutionKernel::banded;
  }
  return ConvolutionKernel::direct;
}

// For the gradient of the input.
inline ConvolutionKernel choose_dgrad(const Convolution& call, const Device& device) {
  if (has_tensor_cores(device)) {
    if (call.multiplier == 1 && stream_takes(call)) return ConvolutionKernel::stream;
    if (banded_takes(call)) return ConvolutionKernel::banded;
  }
  return ConvolutionKernel::direct;
}

// Whether the gradients of the filter are taken by wgrad, else by direct_wgrad.
inline bool choose_wgrad(const Convolution& call, const Device& device) {
  return has_tensor_cores(device) && wgrad_takes(call);
}

inline AttentionKernel choose(const Attention& call, const Device& device) {
  return has_tensor_cores(device) && attention_takes(call) ? AttentionKernel::stream
                                                           : AttentionKernel::two_convolutions;
}

inline const char* describe(ConvolutionKernel kernel) {
  switch (kernel) {
    case ConvolutionKernel::stream: return "tensor cores, panels streamed down the planes";
    case ConvolutionKernel::banded: return "tensor cores, banded filter in shared memory";
    default: return "CUDA cores";
  }
}

inline const char* describe(AttentionKernel kernel) {
  return kernel == AttentionKernel::stream ? "tensor cores, both convolutions in one pass" : "two convolutions";
}

}  // namespace ffnet
