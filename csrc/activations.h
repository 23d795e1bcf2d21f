// Every activation of the kernels, once. FFNET_ACTIVATIONS(X) puts X(name) for each: names of the schemas, and of the
// functions in cpu/activation.h. What they are in PyTorch is in ffnet_kernels/backends/activations.py. Those that CUDA
// has come first: its kernels compare these numbers, and another order costs some of them registers.
#pragma once

#define FFNET_ACTIVATIONS(X) \
  X(none) X(gelu) X(gelu_tanh) X(relu) X(silu) X(relu6) X(hardswish) X(hardsigmoid) X(leaky_relu)

namespace ffnet {

#define FFNET_NAME(name) name,
enum class Activation : int { FFNET_ACTIVATIONS(FFNET_NAME) };
#undef FFNET_NAME

}  // namespace ffnet
