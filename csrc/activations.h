// The list of the kernels' activations. FFNET_ACTIVATIONS(X) expands to X(name) for each; the names are those in
// schemas and of the functions in cpu/activation.h. ffnet_kernels/backends/activations.py has their PyTorch functions.
// Those that CUDA supports come first: its kernels compare these numbers, and another order costs some of them
// registers.
#pragma once

#define FFNET_ACTIVATIONS(X) \
  X(none) X(gelu) X(gelu_tanh) X(relu) X(silu) X(relu6) X(hardswish) X(hardsigmoid) X(leaky_relu)

namespace ffnet {

#define FFNET_NAME(name) name,
enum class Activation : int { FFNET_ACTIVATIONS(FFNET_NAME) };
#undef FFNET_NAME

}  // namespace ffnet
