// What both kernels of the attention's backward have in common.
#pragma once

#include "activation.h"
#include "filter_sums.h"
#include "stream.h"

namespace ffnet {

struct AttentionBackwardParameters : StreamParameters {
  int gradient_ahead;  // rows by which the gradient is ahead of the query
  Plane query, gradient, query_grad;
  FilterView key, value_mirrored, key_mirrored;
  const uint16_t *key_bias, *scale;
  ActivationParameters activation;
  float *key_partials, *value_partials;
};

// attention_backward_planes.cu: whether it takes the call. Chooses its splits, and starts it where `start` is true.
bool attention_backward_of_planes(const KernelChoice& choice, AttentionBackwardParameters& p, bool start,
                                  const Device& device);

#if FFNET_HAS_SM80

// A warp's partial sums; its memory is free for them.
template <class T, int K, bool HALO>
FFNET_DEVICE void store_attention_gradients(const AttentionBackwardParameters& p, const StreamTask& task,
                                            const FilterSums<T, K, HALO>& key, const FilterSums<T, K, HALO>& value,
                                            const MapSums<T>& biases) {
  auto* matrix = reinterpret_cast<float*>(task.memory);
  const int64_t place = task.split * p.channels + task.channel;
  const int key_taps = p.key.kh * p.key.kw, value_taps = p.value_mirrored.kh * p.value_mirrored.kw;
  float* key_partials = p.key_partials + place * (key_taps + 1);
  float* value_partials = p.value_partials + place * (value_taps + 1);
  key.store(matrix, p.key, key_partials, task.lane);
  value.store(matrix, p.value_mirrored, value_partials, task.lane);
  const float key_sum = biases.first(), value_sum = biases.second();
  if (task.lane == 0) key_partials[key_taps] = key_sum, value_partials[value_taps] = value_sum;
}

#endif  // FFNET_HAS_SM80

}  // namespace ffnet
