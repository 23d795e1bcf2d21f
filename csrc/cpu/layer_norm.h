// Layer normalisation over the channels of panels [channel][kPanel pixels]: each lane holds the statistics of its
// pixel.
#pragma once

#include "gemm.h"
#include "norm.h"

namespace ffnet::FFNET_ISA {

// Sum over channels of f of a vector of pixels; running sums are kept short.
template <class F>
FFNET_INLINE Vec sum_channels(const float* pixels, int64_t channels, F f) {
  constexpr int64_t kRun = 64;
  Vec total = Vec::fill(0);
  for (int64_t c = 0; c < channels; c += kRun) {
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return Vec::load(pixels + (c + i) * kPanel); };
    total = total + sum_vectors(min_of(kRun, channels - c), at, f);
  }
  return total;
}

// Normalises pixels + bias in place. Deviations are from a rounded mean, whose error is the deviations' own mean, so a
// mean that is large compared to the deviations affects neither the variance nor the result.
inline void normalize_pixels(const LayerNorm& norm, const float* bias, int64_t channels, float* pixels) {
  for (int64_t c = 0; bias && c < channels; ++c)
    (Vec::load(pixels + c * kPanel) + Vec::fill(bias[c])).store(pixels + c * kPanel);
  const Vec share = Vec::fill(1.f / static_cast<float>(channels));
  const Vec middle = sum_channels(pixels, channels, [](Vec x) { return x; }) * share;
  const Vec off = sum_channels(pixels, channels, [middle](Vec x) { return x - middle; }) * share;
  const auto square = [middle, off](Vec x) { return ((x - middle) - off) * ((x - middle) - off); };
  const Vec variance = sum_channels(pixels, channels, square) * share;
  float values[kLanes];
  variance.store(values);
  for (float& value : values) value = 1 / __builtin_sqrtf(value + norm.eps);
  const Vec inverse = Vec::load(values);
  for (int64_t c = 0; c < channels; ++c) {
    float* at = pixels + c * kPanel;
    const Vec x = ((Vec::load(at) - middle) - off) * inverse;
    const Vec shift = Vec::fill(norm.bias ? norm.bias[c] : 0);
    (norm.weight ? fma(x, Vec::fill(norm.weight[c]), shift) : x + shift).store(at);
  }
}

// A panel of float32 plus bias, which may be null, as the B of a product; `pixels` change, and may be `panel` where
// taps are single floats.
template <class Taps>
void normalize_panel(const LayerNorm& norm, const float* bias, int64_t channels, float* pixels, float* panel) {
  for (int64_t p = 0; p < kPanel; p += kLanes) normalize_pixels(norm, bias, channels, pixels + p);
  if (pixels != panel) store_panel<Taps>(pixels, 0, channels, panel);
}

}  // namespace ffnet::FFNET_ISA
