// Every activation of the kernels, once. FFNET_ACTIVATIONS(X) puts X(name) for each: names of the schemas, and of the
// functions in cpu/activation.h. What they are in PyTorch is in ffnet_kernels/backends/activations.py.
#pragma once

#define FFNET_ACTIVATIONS(X) X(none) X(relu) X(relu6) X(gelu) X(gelu_tanh) X(silu) X(hardswish)

namespace ffnet {

#define FFNET_NAME(name) name,
enum class Activation : int { FFNET_ACTIVATIONS(FFNET_NAME) };
#undef FFNET_NAME

}  // namespace ffnet
