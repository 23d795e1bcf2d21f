// The element-wise passes of the channel mixer around products that a library computes. Memory bounds them: each reads
// and writes a map once, in vectors of 16 bytes where rows of channels or of pixels consist of whole ones.
#include <algorithm>

#include "activation.h"
#include "channel_mixer.h"
#include "device.h"
#include "storage.h"

namespace ffnet {
namespace {

constexpr int kThreads = 256;

// The map as vectors: `inner` of them in a row have one channel index, of which there are `channels`. An index stands
// for one channel, or where channels are innermost for all those of a vector.
struct Parameters {
  void *map, *other;
  const void *bias, *scale;
  ActivationParameters activation;
  int64_t vectors = 0, inner = 0;
  int channels = 0, steps = 0;  // vectors of a thread
  bool channel_vectors = false;
};

template <class T>
FFNET_DEVICE float activate(const ActivationParameters& activation, float x) {
  return sizeof(T) == 4 ? activate_exact(activation.kind, x) : activate_fast(activation, x);
}

struct BiasActivation {
  static constexpr bool kReadsOther = false, kWritesOther = false;
  template <class T>
  FFNET_DEVICE static void apply(const Parameters& p, float& map, float&, float bias, float) {
    map = activate<T>(p.activation, map + bias);
  }
};

struct ScaleResidual {
  static constexpr bool kReadsOther = true, kWritesOther = false;
  template <class T>
  FFNET_DEVICE static void apply(const Parameters& p, float& map, float& other, float bias, float scale) {
    map = scale * (map + bias);
    if (p.other) map += other;
  }
};

struct ActivationBackward {
  static constexpr bool kReadsOther = true, kWritesOther = true;
  template <class T>
  FFNET_DEVICE static void apply(const Parameters& p, float& map, float& other, float bias, float) {
    const float x = map + bias;
    if (sizeof(T) == 4) {
      map = activate_exact(p.activation.kind, x);
      other *= derivative_exact(p.activation.kind, x);
    } else {
      other *= derivative_fast(p.activation, x, map);
    }
  }
};

template <class Operation, class T, int SIZE>
FFNET_KERNEL(kThreads, 4)
elementwise_kernel(FFNET_PARAMETER Parameters p) {
  struct alignas(SIZE * sizeof(T)) Vector {
    T values[SIZE];
  };
  Vector *map = static_cast<Vector*>(p.map), *other = static_cast<Vector*>(p.other);
  const T *bias = static_cast<const T*>(p.bias), *scale = static_cast<const T*>(p.scale);
  int64_t i = static_cast<int64_t>(block_x()) * kThreads * p.steps + thread_index(), inner;
  int channel;
  if (p.vectors >> 31) {
    inner = i % p.inner;
    channel = static_cast<int>(i / p.inner % p.channels);
  } else {  // a fifth of the instructions
    const auto small = static_cast<uint32_t>(i), small_inner = static_cast<uint32_t>(p.inner);
    inner = small % small_inner;
    channel = static_cast<int>(small / small_inner % static_cast<uint32_t>(p.channels));
  }
  for (int step = 0; step < p.steps && i < p.vectors; ++step, i += kThreads) {
    Vector values = map[i], others{};
    if (Operation::kReadsOther && p.other) others = other[i];
    const auto of_channel = [&](const T* per_channel, float missing) {
      struct {
        float values[SIZE];
      } result;
      if (per_channel && SIZE > 1 && p.channel_vectors) {
        const Vector loaded = reinterpret_cast<const Vector*>(per_channel)[channel];
#pragma unroll
        for (int e = 0; e < SIZE; ++e) result.values[e] = to_float(loaded.values[e]);
      } else {
        const float value = per_channel ? to_float(per_channel[channel]) : missing;
#pragma unroll
        for (int e = 0; e < SIZE; ++e) result.values[e] = value;
      }
      return result;
    };
    const auto biases = of_channel(bias, 0), scales = of_channel(scale, 1);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) {
      float value = to_float(values.values[e]), second = to_float(others.values[e]);
      Operation::template apply<T>(p, value, second, biases.values[e], scales.values[e]);
      values.values[e] = from_float<T>(value);
      others.values[e] = from_float<T>(second);
    }
    map[i] = values;
    if (Operation::kWritesOther) other[i] = others;
    // The next vector's place without a division.
    inner += kThreads % p.inner;
    channel += kThreads / p.inner % p.channels;
    if (inner >= p.inner) inner -= p.inner, ++channel;
    if (channel >= p.channels) channel -= p.channels;
  }
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class Operation, class T>
void start(const char* name, const DenseMaps& maps, Parameters p, const Device& device) {
  constexpr int kSize = 16 / sizeof(T);
  const int64_t row = maps.channels_last ? maps.channels : maps.pixels;
  const bool per_channel_aligned = !maps.channels_last || (aligned(p.bias, 16) && aligned(p.scale, 16));
  const int size = row % kSize == 0 && aligned(p.map, 16) && aligned(p.other, 16) && per_channel_aligned ? kSize : 1;
  p.vectors = maps.n * maps.channels * maps.pixels / size;
  if (p.vectors == 0) return;
  p.channel_vectors = maps.channels_last;
  p.inner = maps.channels_last ? 1 : maps.pixels / size;
  p.channels = maps.channels_last ? maps.channels / size : maps.channels;
  const int64_t blocks = (p.vectors + kThreads - 1) / kThreads;
  p.steps = static_cast<int>(std::clamp<int64_t>(blocks / (8 * std::max(device.multiprocessors, 1)), 1, 8));
  Grid grid;
  grid.x = (blocks + p.steps - 1) / p.steps;
  grid.threads = kThreads;
  launch(name, size == 1 ? elementwise_kernel<Operation, T, 1> : elementwise_kernel<Operation, T, kSize>, grid, p,
         device.stream);
}

template <class Operation>
void start(const char* name, const DenseMaps& maps, const Parameters& p, const Device& device) {
  with_storage(maps.dtype, [&](auto element) { start<Operation, decltype(element)>(name, maps, p, device); });
}

}  // namespace

void bias_activation(const DenseMaps& maps, Activation activation, void* map, const void* bias, const Device& device) {
  start<BiasActivation>("elementwise_kernel (bias_activation)", maps,
                        {map, nullptr, bias, nullptr, activation_parameters(activation)}, device);
}

void scale_residual(const DenseMaps& maps, void* out, const void* bias, const void* scale, const void* residual,
                    const Device& device) {
  start<ScaleResidual>("elementwise_kernel (scale_residual)", maps, {out, const_cast<void*>(residual), bias, scale, {}},
                       device);
}

void activation_backward(const DenseMaps& maps, Activation activation, void* map, const void* bias, void* gradient,
                         const Device& device) {
  start<ActivationBackward>("elementwise_kernel (activation_backward)", maps,
                            {map, gradient, bias, nullptr, activation_parameters(activation)}, device);
}

}  // namespace ffnet
