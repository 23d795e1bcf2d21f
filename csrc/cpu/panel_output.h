// From panels of pixels (gemm.h) to maps: residual + scale * value.
#pragma once

#include "gemm.h"
#include "retry.h"

namespace ffnet::FFNET_ISA {

FFNET_INLINE int64_t whole_vectors(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

// The place of pixel p of a strip in a map; the rows of all images are numbered consecutively.
struct Pixels {
  Strides stride;
  int64_t width, height, first_row;
  int64_t operator()(int64_t p) const {
    const int64_t row = first_row + p / width;
    return row / height * stride.n + row % height * stride.h + p % width * stride.w;
  }
};

// Whether elements at these offsets lie next to each other: for repeated rows (an expanded map), checking the ends is
// not enough.
FFNET_INLINE bool is_run(const int64_t* at, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (at[i] != at[0] + i) return false;
  return true;
}

// Applied to a value before it is stored in the map; either may be null.
struct Addend {
  const float* scale = nullptr;
  const void* residual = nullptr;
  Strides residual_stride{};
};

template <class T>
class PanelOutput {
 public:
  // Op has outputs, out and the size of the result; `first_row` is that of the strip.
  template <class Op>
  PanelOutput(const Op& op, int64_t first_row, const Addend& addend = {})
      : channels_(op.outputs),
        scale_(addend.scale),
        out_(static_cast<T*>(op.out)),
        residual_(static_cast<const T*>(addend.residual)),
        out_at_{op.out_stride, op.out_w, op.out_h, first_row},
        residual_at_{addend.residual_stride, op.out_w, op.out_h, first_row} {}

  // A panel whose first pixel is the strip's pixel `first`, and of which `count` exist.
  void write(const float* panel, int64_t first, int64_t count, NanSensor& sensor) const {
    for (int64_t p = 0; p < count; p += kLanes) {
      int64_t out_at[kLanes], residual_at[kLanes];
      const int64_t pixels = min_of(kLanes, count - p);
      for (int64_t i = 0; i < pixels; ++i) {
        out_at[i] = out_at_(first + p + i);
        residual_at[i] = residual_ ? residual_at_(first + p + i) : 0;
      }
      if (out_at_.stride.c == 1 && (!residual_ || residual_at_.stride.c == 1)) {
        write_vectors(panel + p, pixels, out_at, residual_at, sensor);
      } else {
        write_elements(panel + p, pixels, out_at, residual_at, sensor);
      }
    }
  }

 private:
  void write_vectors(const float* panel, int64_t pixels, const int64_t* out_at, const int64_t* residual_at,
                     NanSensor& sensor) const {
    for (int64_t c = 0; c < channels_; c += kLanes) {
      const int64_t count = min_of(kLanes, channels_ - c);
      const Vec scale = scale_ ? Vec::load_first(scale_ + c, count) : Vec::fill(1);
      const auto read = [&](int64_t i) __attribute__((always_inline)) { return Vec::load(panel + (c + i) * kPanel); };
      if (!scale_ && !residual_) {  // copied bitwise, as a float may hold a pair of bfloat16
        transpose_block(
            read, count,
            [&](int64_t i, Vec x) __attribute__((always_inline)) { store_first(x, out_ + out_at[i] + c, count); },
            pixels);
        for (int64_t i = 0; i < count; ++i) sensor.see(read(i));
        continue;
      }
      const auto write = [&](int64_t i, Vec x) __attribute__((always_inline)) {
        const Vec base = residual_ ? load_first(residual_ + residual_at[i] + c, count) : Vec::fill(0);
        x = fma(x, scale, base);
        sensor.see(x);
        store_first(x, out_ + out_at[i] + c, count);
      };
      transpose_block(read, count, write, pixels);
    }
  }

  void write_elements(const float* panel, int64_t pixels, const int64_t* out_at, const int64_t* residual_at,
                      NanSensor& sensor) const {
    // Pixels next to each other move as a vector.
    const bool row = is_run(out_at, pixels) && (!residual_ || is_run(residual_at, pixels));
    for (int64_t c = 0; c < channels_; ++c) {
      const Vec value = Vec::load(panel + c * kPanel) * Vec::fill(scale_ ? scale_[c] : 1);
      T* out = out_ + c * out_at_.stride.c;
      const T* residual = residual_ + (residual_ ? c * residual_at_.stride.c : 0);
      if (row) {
        const Vec x = residual_ ? value + load_first(residual + residual_at[0], pixels) : value;
        sensor.see(x);
        store_first(x, out + out_at[0], pixels);
        continue;
      }
      float values[kLanes];
      value.store(values);
      sensor.see(value);
      for (int64_t i = 0; i < pixels; ++i)
        from_float(values[i] + (residual_ ? to_float(residual[residual_at[i]]) : 0), out[out_at[i]]);
    }
  }

  int64_t channels_;
  const float* scale_;
  T* out_;
  const T* residual_;
  Pixels out_at_, residual_at_;
};

}  // namespace ffnet::FFNET_ISA
