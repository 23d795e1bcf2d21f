// The FFNified attention of the CUDA kernels as operators of torch: see torch_cuda.cpp.
#include "torch_cuda.h"

namespace ffnet {
namespace {

// An attention call whose output is still to be set, and the vectors that it points to.
struct AttentionCall {
  ChannelVector key_bias, value_bias, scale;
  Attention call;
  bool channels_last;

  AttentionCall(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias_, const Tensor& value,
                const std::optional<Tensor>& value_bias_, const std::string& activation,
                const std::optional<Tensor>& scale_, const std::optional<Tensor>& residual)
      : key_bias((check_map(query, query, "query"), key_bias_), query, "key_bias", query.size(1)),
        value_bias(value_bias_, query, "value_bias", query.size(1)),
        scale(scale_, query, "scale", query.size(1)),
        call{},
        channels_last(suggests_channels_last(query) || suggests_channels_last(key) || suggests_channels_last(value)) {
    call.dtype = dtype_of(query);
    call.n = query.size(0), call.channels = query.size(1);
    call.h = static_cast<int>(query.size(2)), call.w = static_cast<int>(query.size(3));
    call.activation = kernel_activation(activation);
    call.query = map_of(query);
    call.key = filter_of(key, query, "key", key_bias.data()),
    call.value = filter_of(value, query, "value", value_bias.data());
    FFNET_CHECK(key.size(0) == query.size(1) && value.size(0) == query.size(1),
                "key and value must have query's channels");
    call.scale = scale.data();
    if (!residual) return;
    check_like(*residual, query, "residual", 4);
    check_shape(*residual, "residual", {query.size(0), query.size(1), query.size(2), query.size(3)});
    call.residual = map_of(*residual);
  }
};

Tensor ffnified_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias,
                          const Tensor& value, const std::optional<Tensor>& value_bias, const std::string& activation,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& residual) {
  AttentionCall a(query, key, key_bias, value, value_bias, activation, scale, residual);
  const Session session(query);
  const std::vector<int64_t> one{1, 1};
  Tensor out = empty_map(query, {a.call.n, a.call.channels, a.call.h, a.call.w}, a.channels_last);
  a.call.out = written(out);
  if (a.call.n == 0) return out;
  if (choose(a.call, session.device()) == AttentionKernel::stream) {
    attention_forward(a.call, session.device());
    return out;
  }
  const auto same = [](const Filter& f) {
    return std::vector<int64_t>{(f.kh - 1) / 2, f.kh / 2, (f.kw - 1) / 2, f.kw / 2};
  };
  Tensor hidden = empty_map(query, {a.call.n, a.call.channels, a.call.h, a.call.w}, a.channels_last);
  Convolution first = convolution(query, a.call.key, a.call.channels, one, same(a.call.key));
  first.x = a.call.query, first.out = written(hidden), first.activation = a.call.activation;
  run_forward(first, session.device());
  Convolution second = convolution(hidden, a.call.value, a.call.channels, one, same(a.call.value));
  second.x = map_of(hidden), second.out = a.call.out, second.activation = Activation::none;
  run_forward(second, session.device());
  scale_and_add(out, std::nullopt, scale, residual, session.device());
  return out;
}

// Whether ffnified_attention_gradients takes the call.
bool ffnified_attention_gradients_take(const Tensor& grad, const Tensor& query, const Tensor& key,
                                       const Tensor& value) {
  AttentionCall a(query, key, std::nullopt, value, std::nullopt, "none", std::nullopt, std::nullopt);
  check_map(grad, query, "grad");
  const Session session(query);
  a.call.out = map_of(grad);
  return !a.channels_last && choose(a.call, session.device()) == AttentionKernel::stream;
}

// Gradients of query, key, key_bias, value, value_bias and scale in one kernel, and one for sums; planes of 16 bits
// only.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffnified_attention_gradients(
    const Tensor& grad, const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_bias,
    const Tensor& value, const std::optional<Tensor>& value_bias, const std::string& activation,
    const std::optional<Tensor>& scale) {
  AttentionCall a(query, key, key_bias, value, value_bias, activation, scale, std::nullopt);
  check_map(grad, query, "grad");
  const int64_t channels = a.call.channels;
  check_shape(grad, "grad", {a.call.n, channels, a.call.h, a.call.w});
  const Session session(query);
  const Device& device = session.device();
  FFNET_CHECK(ffnified_attention_gradients_take(grad, query, key, value),
              "ffnified_attention_gradients does not take this call");
  a.call.out = map_of(grad);
  Tensor query_grad = empty_map(query, {a.call.n, channels, a.call.h, a.call.w}, false);
  AttentionGradients gradients{written(query_grad)};
  const int64_t splits = a.call.n == 0 ? 0 : attention_backward_splits(a.call, gradients, device);
  Tensor key_partials = empty_partials(splits, channels, a.call.key, query);
  Tensor value_partials = empty_partials(splits, channels, a.call.value, query);
  gradients.key_partials = static_cast<float*>(key_partials.mutable_data_ptr());
  gradients.value_partials = static_cast<float*>(value_partials.mutable_data_ptr());
  if (a.call.n > 0) attention_backward(a.call, gradients, device);
  FilterGradientTensors key_grads(key_partials, a.call.key, query, false),
      value_grads(value_partials, a.call.value, query, true);
  key_grads.finish(nullptr, device), value_grads.finish(a.scale.data(), device);
  return {query_grad, key_grads.filter, key_grads.bias, value_grads.filter, value_grads.bias, *value_grads.scale};
}

// Gradients of value, value_bias and scale from the gradient of the result and the hidden map.
std::tuple<Tensor, Tensor, Tensor> ffnified_attention_value_grads(const Tensor& grad, const Tensor& hidden,
                                                                  const Tensor& value,
                                                                  const std::optional<Tensor>& value_bias,
                                                                  const std::optional<Tensor>& scale) {
  check_map(hidden, hidden, "hidden");
  check_map(grad, hidden, "grad");
  const int64_t channels = hidden.size(1);
  const ChannelVector bias_vector(value_bias, hidden, "value_bias", channels),
      scale_vector(scale, hidden, "scale", channels);
  const Filter filter = filter_of(value, hidden, "value", bias_vector.data());
  FFNET_CHECK(value.size(0) == channels, "value must have the hidden map's channels");
  const std::vector<int64_t> padding{(filter.kh - 1) / 2, filter.kh / 2, (filter.kw - 1) / 2, filter.kw / 2};
  Convolution call = convolution(hidden, filter, channels, {1, 1}, padding);
  check_shape(grad, "grad", {call.n, channels, call.out_h, call.out_w});
  const Session session(hidden);
  call.x = map_of(hidden), call.out = map_of(grad);
  const Tensor partials = filter_partials(call, hidden, session.device());
  FilterGradientTensors grads(partials, filter, hidden, true);
  grads.finish(scale_vector.data(), session.device());
  return {grads.filter, grads.bias, *grads.scale};
}

// Which kernels a call of the public operator would start.
std::string describe_ffnified_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const std::optional<Tensor>& residual) {
  AttentionCall a(query, key, std::nullopt, value, std::nullopt, "none", std::nullopt, residual);
  const Session session(query);
  a.call.out = planned(a.call.w, a.call.channels, a.channels_last);
  return describe(choose(a.call, session.device()));
}

}  // namespace
}  // namespace ffnet

STABLE_TORCH_LIBRARY_FRAGMENT(ffnet_kernels_cuda, m) {
  m.def(
      "ffnified_attention_gradients(Tensor grad, Tensor query, Tensor key, Tensor? key_bias, Tensor value, "
      "Tensor? value_bias, str activation, Tensor? scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("ffnified_attention_gradients_take(Tensor grad, Tensor query, Tensor key, Tensor value) -> bool");
  m.def(
      "ffnified_attention_value_grads(Tensor grad, Tensor hidden, Tensor value, Tensor? value_bias, Tensor? scale) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("describe_ffnified_attention(Tensor query, Tensor key, Tensor value, Tensor? residual) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels_cuda, FFNET_CUDA_KEY, m) {
  using namespace ffnet;
  m.impl("ffnified_attention", TORCH_BOX(&ffnified_attention));
  m.impl("ffnified_attention_gradients", TORCH_BOX(&ffnified_attention_gradients));
  m.impl("ffnified_attention_gradients_take", TORCH_BOX(&ffnified_attention_gradients_take));
  m.impl("ffnified_attention_value_grads", TORCH_BOX(&ffnified_attention_value_grads));
  m.impl("describe_ffnified_attention", TORCH_BOX(&describe_ffnified_attention));
}
