// The CUDA kernels as operators of torch's dispatcher, through the LibTorch stable ABI only. Schemas, fakes and
// autograd of the public operators are in ffnet_kernels/ops; what memory safety needs is checked here again. With
// FFNET_HOST_EXECUTION the same operators take CPU tensors, for the tests (csrc/cuda/host). This file has the channel
// mixer and what belongs to no operator; torch_cuda_convolution.cpp and torch_cuda_attention.cpp have the others.
#include "torch_cuda.h"

#include "define.h"

#include <cstdio>

#ifdef FFNET_HOST_EXECUTION
#include "../cuda/host/execution.h"
#include "../cuda/host/settings.h"
#endif

namespace ffnet {
namespace {

// The channel mixer behind its depthwise convolution.
ChannelMixer pointwise(const Tensor& x, const Tensor& expand_weight, const Tensor& project_weight,
                       const std::optional<Tensor>& residual, const Tensor& out) {
  check_map(x, x, "x");
  check_like(out, x, "out", 4);
  check_like(expand_weight, x, "expand_weight", 2);
  check_like(project_weight, x, "project_weight", 2);
  FFNET_CHECK(expand_weight.size(1) == x.size(1) && project_weight.size(1) == expand_weight.size(0),
              "expand_weight must be [D, C], project_weight [O, D]");
  ChannelMixer call{};
  call.dtype = dtype_of(x);
  call.n = x.size(0), call.channels = static_cast<int>(x.size(1)),
  call.hidden = static_cast<int>(expand_weight.size(0));
  call.outputs = static_cast<int>(project_weight.size(0));
  call.h = static_cast<int>(x.size(2)), call.w = static_cast<int>(x.size(3));
  call.x = map_of(x), call.out = map_of(out);
  if (residual) {
    check_like(*residual, x, "residual", 4);
    check_shape(*residual, "residual", {call.n, call.outputs, call.h, call.w});
    call.residual = map_of(*residual);
  }
  return call;
}

Matrix matrix_of(const Tensor& weight) { return {weight.const_data_ptr(), weight.stride(0)}; }

// Whether channel_mixer_pointwise takes the call. `out` lends its layout.
bool channel_mixer_takes(const Tensor& x, const Tensor& expand_weight, const Tensor& project_weight,
                         const std::optional<Tensor>& residual, const Tensor& out) {
  const ChannelMixer call = pointwise(x, expand_weight, project_weight, residual, out);
  const Session session(x);
  return expand_weight.stride(1) == 1 && project_weight.stride(1) == 1 && channel_mixer_fits(call, session.device());
}

void channel_mixer_pointwise(const Tensor& x, const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                             const Tensor& project_weight, const std::optional<Tensor>& project_bias,
                             const std::string& activation, const std::optional<Tensor>& scale,
                             const std::optional<Tensor>& residual, Tensor out) {
  FFNET_CHECK(channel_mixer_takes(x, expand_weight, project_weight, residual, out),
              "channel_mixer_pointwise does not take this call");
  ChannelMixer call = pointwise(x, expand_weight, project_weight, residual, out);
  check_map(out, x, "out");
  check_shape(out, "out", {call.n, call.outputs, call.h, call.w});
  const ChannelVector expand(expand_bias, x, "expand_bias", call.hidden),
      project(project_bias, x, "project_bias", call.outputs), scales(scale, x, "scale", call.outputs);
  call.activation = kernel_activation(activation);
  call.expand = matrix_of(expand_weight), call.project = matrix_of(project_weight);
  call.expand_bias = expand.data(), call.project_bias = project.data(), call.scale = scales.data();
  call.out = written(out);
  const Session session(x);
  if (call.n > 0) channel_mixer_forward(call, session.device());
}

void bias_activation_(Tensor map, const std::optional<Tensor>& bias, const std::string& activation) {
  const DenseMaps maps = dense_maps(map);
  const ChannelVector vector(bias, map, "bias", map.size(1));
  const Session session(map);
  if (maps.n > 0)
    bias_activation(maps, kernel_activation(activation), map.mutable_data_ptr(), vector.data(), session.device());
}

// With z = map + bias: gradient becomes gradient · act'(z), map becomes act(z).
void activation_backward_(Tensor map, const std::optional<Tensor>& bias, Tensor gradient,
                          const std::string& activation) {
  const DenseMaps maps = dense_maps(map);
  check_like(gradient, map, "gradient", 4);
  for (int d = 0; d < 4; ++d)
    FFNET_CHECK(gradient.size(d) == map.size(d) && (gradient.size(d) == 1 || gradient.stride(d) == map.stride(d)),
                "gradient must have the map's shape and layout");
  const ChannelVector vector(bias, map, "bias", map.size(1));
  const Session session(map);
  if (maps.n > 0)
    activation_backward(maps, kernel_activation(activation), map.mutable_data_ptr(), vector.data(),
                        gradient.mutable_data_ptr(), session.device());
}

void scale_residual_(Tensor out, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual) {
  const Session session(out);
  scale_and_add(out, bias, scale, residual, session.device());
}

#ifdef FFNET_HOST_EXECUTION
void select_host(const std::string& schedule, int64_t seed, int64_t architecture, int64_t multiprocessors,
                 int64_t resident_blocks) {
  host::select_schedule(schedule == "forward"   ? host::Schedule::forward
                        : schedule == "reverse" ? host::Schedule::reverse
                                                : host::Schedule::shuffled,
                        static_cast<uint32_t>(seed));
  host::settings() = {static_cast<int>(architecture), static_cast<int>(multiprocessors),
                      static_cast<int>(resident_blocks)};
}

std::string started_kernels() { return host::started_kernels(); }
#endif

}  // namespace
}  // namespace ffnet

// For Python, when nothing is traced: 0, or 1 and why the library does not run on a GPU.
extern "C" __attribute__((visibility("default"))) int ffnet_cuda_check_device([[maybe_unused]] int device, char* reason,
                                                                              size_t size) {
  try {
#ifndef FFNET_HOST_EXECUTION
    const torch::stable::accelerator::DeviceGuard guard(device);
#endif
    ffnet::current_device(nullptr);
    return 0;
  } catch (const std::exception& error) {
    snprintf(reason, size, "%s", error.what());
    return 1;
  }
}

FFNET_DEFINE(ffnet_kernels_cuda, FFNET_KERNELS_CUDA_SCHEMAS)

STABLE_TORCH_LIBRARY_FRAGMENT(ffnet_kernels_cuda, m) {
  m.def(
      "channel_mixer_fits(Tensor x, Tensor expand_weight, Tensor project_weight, Tensor? residual, Tensor out) -> "
      "bool");
  m.def(
      "channel_mixer_pointwise(Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, "
      "Tensor? project_bias, str activation, Tensor? scale, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("bias_activation_(Tensor(a!) map, Tensor? bias, str activation) -> ()");
  m.def("activation_backward_(Tensor(a!) map, Tensor? bias, Tensor(b!) gradient, str activation) -> ()");
  m.def("scale_residual_(Tensor(a!) out, Tensor? bias, Tensor? scale, Tensor? residual) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, FFNET_CUDA_KEY, m) {
  using namespace ffnet;
  m.impl("channel_mixer_fits", TORCH_BOX(&channel_mixer_takes));
  m.impl("channel_mixer_pointwise", TORCH_BOX(&channel_mixer_pointwise));
  m.impl("bias_activation_", TORCH_BOX(&bias_activation_));
  m.impl("activation_backward_", TORCH_BOX(&activation_backward_));
  m.impl("scale_residual_", TORCH_BOX(&scale_residual_));
}

#ifdef FFNET_HOST_EXECUTION
STABLE_TORCH_LIBRARY_FRAGMENT(ffnet_kernels_cuda, m) {
  m.def("select_host(str schedule, int seed, int architecture, int multiprocessors, int resident_blocks) -> ()");
  m.def("started_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("select_host", TORCH_BOX(&ffnet::select_host));
  m.impl("started_kernels", TORCH_BOX(&ffnet::started_kernels));
}
#endif
