// The weight of a convolution as taps (rows.h) of a product.
#pragma once

#include "product.h"
#include "tiling.h"

namespace ffnet::FFNET_ISA {

// [outputs][points][channels], or, where channels are not inside, [outputs][channels][points]; an output's elements are
// adjacent, outputs `stride` elements apart.
struct Weight {
  const void* data;
  int64_t outputs, channels, points;
  bool channels_inside;
  int64_t stride;
};

// Rows [points][taps of the channels]: in place, or a converted copy of a block of them. Channels are zero-padded to
// whole taps.
template <class T, class Taps>
class WeightRows {
 public:
  static constexpr int64_t kMost = kProductRows > kLanes ? kProductRows : kLanes;  // rows of a block
  static int64_t scratch_floats(const Weight& w) { return kMost * w.points * taps(w.channels); }

  WeightRows(const Weight& weight, float* scratch) : weight_(weight), scratch_(scratch) {
    const auto address = reinterpret_cast<uintptr_t>(weight.data);
    in_place_ = sizeof(T) * Taps::rows == sizeof(float) && weight.channels % Taps::rows == 0 &&
                weight.stride % Taps::rows == 0 && address % sizeof(float) == 0 && is_ordered();
  }
  int64_t depth() const { return weight_.points * taps(weight_.channels); }
  int64_t stride() const { return in_place_ ? weight_.stride / Taps::rows : depth(); }
  const float* block(int64_t first, int64_t rows) const {
    const T* from = static_cast<const T*>(weight_.data) + first * weight_.stride;
    if (in_place_) return reinterpret_cast<const float*>(from);
    float* out = scratch_;
    for (int64_t r = 0; r < rows; ++r, from += weight_.stride)
      for (int64_t p = 0; p < weight_.points; ++p, out += taps(weight_.channels)) copy(from, p, out);
    return scratch_;
  }

 private:
  static int64_t taps(int64_t channels) { return ceil_div(channels, Taps::rows); }
  bool is_ordered() const { return weight_.channels_inside || weight_.points == 1 || weight_.channels == 1; }

  // One point of a row.
  void copy(const T* row, int64_t point, float* out) const {
    const int64_t channels = weight_.channels, step = is_ordered() ? 1 : weight_.points;
    row += is_ordered() ? point * channels : point;
    if constexpr (Taps::rows == 1) {
      int64_t c = 0;
      for (; step == 1 && c + kLanes <= channels; c += kLanes) load(row + c).store(out + c);
      for (; c < channels; ++c) out[c] = to_float(row[c * step]);
    } else {
      T pair[2];
      for (int64_t c = 0; c < channels; c += 2) {
        pair[0] = row[c * step];
        pair[1] = c + 1 < channels ? row[(c + 1) * step] : T();
        __builtin_memcpy(out + c / 2, pair, sizeof pair);
      }
    }
  }

  Weight weight_;
  float* scratch_;
  bool in_place_;
};

// A weight as the right operand: panels of kPanel outputs, [depth][kPanel] each, padded with zeros.
struct PackedWeight {
  const float* data;
  int64_t depth, outputs;  // depth in taps
  int64_t panels() const { return ceil_div(outputs, kPanel); }
  int64_t floats() const { return panels() * depth * kPanel; }
  const float* panel(int64_t j) const { return data + j * depth * kPanel; }
  int64_t columns(int64_t j) const { return min_of(kPanel, outputs - j * kPanel); }
};

template <class T, class Taps>
void pack_panel(const Weight& weight, int64_t j, float* panel) {
  Arena arena(WeightRows<T, Taps>::scratch_floats(weight));
  const WeightRows<T, Taps> rows(weight, arena.at);
  const int64_t depth = rows.depth();
  for (int64_t v = 0; v < kPanel; v += kLanes) {
    const int64_t first = j * kPanel + v, count = max_of(0, min_of(kLanes, weight.outputs - first));
    const float* from = count ? rows.block(first, count) : nullptr;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t taps = min_of(kLanes, depth - k);
      transpose_block(
          [&](int64_t r) __attribute__((always_inline)) { return Vec::load_first(from + r * rows.stride() + k, taps); },
          count, [&](int64_t i, Vec x) __attribute__((always_inline)) { x.store(panel + (k + i) * kPanel + v); }, taps);
    }
  }
}

}  // namespace ffnet::FFNET_ISA
