// The depthwise convolution of the CUDA kernels as operators of torch: see torch_cuda.cpp.
#include "torch_cuda.h"

namespace ffnet {
namespace {

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::string& activation) {
  check_map(x, x, "x");
  const ChannelVector bias_vector(bias, x, "bias", weight.size(0));
  Convolution call =
      convolution(x, filter_of(weight, x, "weight", bias_vector.data()), weight.size(0), stride, padding);
  call.activation = kernel_activation(activation);
  const Session session(x);
  Tensor out = empty_map(x, {call.n, weight.size(0), call.out_h, call.out_w},
                         suggests_channels_last(x) || suggests_channels_last(weight));
  call.x = map_of(x), call.out = written(out);
  run_forward(call, session.device());
  return out;
}

// gradient · act'(conv(x) + bias), from which the gradients of the convolution are computed.
Tensor depthwise_conv2d_activation_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding, const std::string& activation) {
  check_map(x, x, "x");
  check_map(grad, x, "grad");
  const ChannelVector bias_vector(bias, x, "bias", weight.size(0));
  Convolution call =
      convolution(x, filter_of(weight, x, "weight", bias_vector.data()), weight.size(0), stride, padding);
  check_shape(grad, "grad", {call.n, weight.size(0), call.out_h, call.out_w});
  call.activation = kernel_activation(activation);
  const Session session(x);
  Tensor out = empty_map(x, {call.n, weight.size(0), call.out_h, call.out_w},
                         suggests_channels_last(x) || suggests_channels_last(weight));
  call.x = map_of(x), call.out = written(out);
  call.gradient = map_of(grad);
  run_forward(call, session.device());
  return out;
}

// Gradient of x, in the shape and format of `like`.
Tensor depthwise_conv2d_dgrad(const Tensor& grad, const Tensor& weight, const Tensor& like,
                              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_map(like, like, "x");
  check_map(grad, like, "grad");
  Convolution call = convolution(like, filter_of(weight, like, "weight", nullptr), weight.size(0), stride, padding);
  check_shape(grad, "grad", {call.n, weight.size(0), call.out_h, call.out_w});
  const Session session(like);
  Tensor out = empty_map(like, {call.n, call.channels, call.h, call.w}, suggests_channels_last(like));
  call.x = written(out), call.out = map_of(grad);
  if (call.n == 0) return out;
  switch (choose_dgrad(call, session.device())) {
    case ConvolutionKernel::stream: stream_dgrad(call, session.device()); break;
    case ConvolutionKernel::banded: banded_dgrad(call, session.device()); break;
    default: direct_dgrad(call, session.device());
  }
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_wgrad(const Tensor& grad, const Tensor& x,
                                                  const std::vector<int64_t>& kernel_size,
                                                  const std::vector<int64_t>& stride,
                                                  const std::vector<int64_t>& padding) {
  check_map(x, x, "x");
  check_map(grad, x, "grad");
  FFNET_CHECK(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0 && kernel_size[0] <= 1 << 15 &&
                  kernel_size[1] <= 1 << 15,
              "kernel_size must be (kh, kw)");
  Filter filter{};
  filter.kh = static_cast<int>(kernel_size[0]), filter.kw = static_cast<int>(kernel_size[1]);
  const int64_t outputs = grad.size(1);
  Convolution call = convolution(x, filter, outputs, stride, padding);
  check_shape(grad, "grad", {call.n, outputs, call.out_h, call.out_w});
  const Session session(x);
  call.x = map_of(x), call.out = map_of(grad);
  const Tensor partials = filter_partials(call, x, session.device());
  FilterGradientTensors grads(partials, filter, x, false);
  grads.finish(nullptr, session.device());
  return {grads.filter, grads.bias};
}

// A depthwise convolution and its activation, as stream_backward takes it.
Convolution backward_call(const Tensor& grad, const Tensor& x, const Filter& filter, int64_t outputs,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_map(x, x, "x");
  check_map(grad, x, "grad");
  Convolution call = convolution(x, filter, outputs, stride, padding);
  check_shape(grad, "grad", {call.n, outputs, call.out_h, call.out_w});
  call.x = map_of(x), call.out = call.gradient = map_of(grad);
  return call;
}

// Whether depthwise_conv2d_gradients takes the call.
bool depthwise_conv2d_gradients_take(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  const Convolution call =
      backward_call(grad, x, filter_of(weight, x, "weight", nullptr), weight.size(0), stride, padding);
  const Session session(x);
  return has_tensor_cores(session.device()) && !suggests_channels_last(x) && !suggests_channels_last(weight) &&
         stream_backward_takes(call);
}

// Gradients of x, weight and bias in one kernel, and one for sums; planes of 16 bits only.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                              const std::optional<Tensor>& bias,
                                                              const std::vector<int64_t>& stride,
                                                              const std::vector<int64_t>& padding,
                                                              const std::string& activation) {
  FFNET_CHECK(depthwise_conv2d_gradients_take(grad, x, weight, stride, padding),
              "depthwise_conv2d_gradients does not take this call");
  const ChannelVector bias_vector(bias, x, "bias", weight.size(0));
  Convolution call =
      backward_call(grad, x, filter_of(weight, x, "weight", bias_vector.data()), weight.size(0), stride, padding);
  call.activation = kernel_activation(activation);
  const Session session(x);
  const Device& device = session.device();
  Tensor x_grad = empty_map(x, {call.n, call.channels, call.h, call.w}, false);
  const Map x_grad_map = written(x_grad);
  const int64_t splits = call.n == 0 ? 0 : stream_backward_splits(call, x_grad_map, device);
  Tensor partials = empty_partials(splits, call.channels, call.filter, x);
  if (call.n > 0) stream_backward(call, x_grad_map, static_cast<float*>(partials.mutable_data_ptr()), device);
  FilterGradientTensors grads(partials, call.filter, x, false);
  grads.finish(nullptr, device);
  return {x_grad, grads.filter, grads.bias};
}

// Which kernels a call of the public operator would start.
std::string describe_depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding) {
  check_map(x, x, "x");
  Convolution call = convolution(x, filter_of(weight, x, "weight", nullptr), weight.size(0), stride, padding);
  const Session session(x);
  call.x = map_of(x),
  call.out = planned(call.out_w, weight.size(0), suggests_channels_last(x) || suggests_channels_last(weight));
  return describe(choose(call, session.device()));
}

}  // namespace
}  // namespace ffnet

STABLE_TORCH_LIBRARY_FRAGMENT(ffnet_kernels_cuda, m) {
  m.def(
      "depthwise_conv2d_activation_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] "
      "padding, "
      "str activation) -> Tensor");
  m.def("depthwise_conv2d_dgrad(Tensor grad, Tensor weight, Tensor like, int[2] stride, int[4] padding) -> Tensor");
  m.def(
      "depthwise_conv2d_wgrad(Tensor grad, Tensor x, int[2] kernel_size, int[2] stride, int[4] padding) -> (Tensor, "
      "Tensor)");
  m.def(
      "depthwise_conv2d_gradients(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
      "str activation) -> (Tensor, Tensor, Tensor)");
  m.def("depthwise_conv2d_gradients_take(Tensor grad, Tensor x, Tensor weight, int[2] stride, int[4] padding) -> bool");
  m.def("describe_depthwise_conv2d(Tensor x, Tensor weight, int[2] stride, int[4] padding) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, FFNET_CUDA_KEY, m) {
  using namespace ffnet;
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_activation_backward", TORCH_BOX(&depthwise_conv2d_activation_backward));
  m.impl("depthwise_conv2d_dgrad", TORCH_BOX(&depthwise_conv2d_dgrad));
  m.impl("depthwise_conv2d_wgrad", TORCH_BOX(&depthwise_conv2d_wgrad));
  m.impl("depthwise_conv2d_gradients", TORCH_BOX(&depthwise_conv2d_gradients));
  m.impl("depthwise_conv2d_gradients_take", TORCH_BOX(&depthwise_conv2d_gradients_take));
  m.impl("describe_depthwise_conv2d", TORCH_BOX(&describe_depthwise_conv2d));
}
