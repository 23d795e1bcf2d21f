// conv2d of 1x1 filters on a few pixels, such as those of squeeze-and-excitation:
// residual + scale * act(weight * x + bias).
//
// Each weight is used for a pixel or a few, so that reading it is what takes time: rows of the weight are read in
// order, a vector along the channels at a time. As many sums as a vector has lanes run side by side, of some outputs of
// some pixels; a transposition turns what their lanes hold into one vector of results.
#include "activation.h"
#include "buffer.h"
#include "conv2d.h"
#include "layout.h"

namespace ffnet::FFNET_ISA {
namespace {

template <class T>
class FewPixels {
 public:
  explicit FewPixels(const Conv2d& op)
      : op_(op), depth_(ceil_div(op.channels, kLanes) * kLanes), pixels_(op.n * op.h * op.w), x_(pixels_ * depth_) {
    const T* map = static_cast<const T*>(op.x);
    for (int64_t p = 0; p < pixels_; ++p) {
      const T* pixel = map + offset(op.x_stride, p);
      float* x = x_.data + p * depth_;
      for (int64_t c = 0; c < op.channels; ++c) x[c] = to_float(pixel[c * op.x_stride.c]);
      for (int64_t c = op.channels; c < depth_; ++c) x[c] = 0;
    }
  }

  void run(const Executor& executor) {
    constexpr int64_t kTaskFloats = 32 * 1024;  // weights that are multiplied in the time it takes to call a thread
    outputs_ = max_of(1, kTaskFloats / (depth_ * kLanes)) * kLanes;
    const auto make = [](void* self, int64_t task) { static_cast<const FewPixels*>(self)->make(task); };
    executor.run(ceil_div(op_.outputs, outputs_), make, this);
  }

 private:
  int64_t offset(const Strides& s, int64_t pixel) const {
    return pixel / (op_.h * op_.w) * s.n + pixel / op_.w % op_.h * s.h + pixel % op_.w * s.w;
  }

  void make(int64_t task) const {
    const int64_t last = min_of(op_.outputs, (task + 1) * outputs_);
    for (int64_t o = task * outputs_; o < last; o += kLanes) {
      int64_t p = 0;
      for (; p + 4 <= pixels_; p += 4) block<4>(o, last, p);
      for (; p + 2 <= pixels_; p += 2) block<2>(o, last, p);
      for (; p < pixels_; ++p) block<1>(o, last, p);
    }
  }

  // Outputs [first, first + kLanes) that are below `last`, of P pixels.
  template <int P>
  void block(int64_t first, int64_t last, int64_t pixel) const {
    constexpr int kOutputs = kLanes / P;
    for (int64_t o = first; o < min_of(last, first + kLanes); o += kOutputs) {
      const T* row[kOutputs];
#pragma GCC unroll 16
      for (int i = 0; i < kOutputs; ++i)
        row[i] = static_cast<const T*>(op_.weight) + min_of(o + i, op_.outputs - 1) * op_.weight_stride;
      Vec sum[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = Vec::fill(0);
      const int64_t whole = op_.channels / kLanes * kLanes, rest = op_.channels - whole;
      const float* x = x_.data + pixel * depth_;
      for (int64_t c = 0; c < whole; c += kLanes)
        add<P>(sum, x + c, [&](int i) __attribute__((always_inline)) { return load(row[i] + c); });
      if (rest > 0)
        add<P>(sum, x + whole, [&](int i) __attribute__((always_inline)) { return load_first(row[i] + whole, rest); });
      write<P>(sum, o, min_of(kOutputs, last - o), pixel);
    }
  }

  // sum[p][o] += x[p] * weight(o)
  template <int P, class Weights>
  FFNET_INLINE void add(Vec (&sum)[kLanes], const float* x, const Weights& weight) const {
    constexpr int kOutputs = kLanes / P;
    Vec pixel[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) pixel[p] = Vec::load(x + p * depth_);
#pragma GCC unroll 16
    for (int i = 0; i < kOutputs; ++i) {
      const Vec w = weight(i);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[p * kOutputs + i] = fma(w, pixel[p], sum[p * kOutputs + i]);
    }
  }

  template <int P>
  FFNET_INLINE void write(Vec (&sum)[kLanes], int64_t first, int64_t count, int64_t pixel) const {
    constexpr int kOutputs = kLanes / P;
    transpose(sum);
#pragma GCC unroll 4
    for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) sum[i] = sum[i] + sum[i + width];
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = op_.bias && i % kOutputs < count ? op_.bias[first + i % kOutputs] : 0;
    (sum[0] + Vec::load(values)).store(values);
    activate_row(values, kLanes, 1, op_.activation);
    for (int p = 0; p < P; ++p) {
      T* out = static_cast<T*>(op_.out) + offset(op_.out_stride, pixel + p) + first * op_.out_stride.c;
      const T* residual = static_cast<const T*>(op_.residual);
      if (residual) residual += offset(op_.residual_stride, pixel + p) + first * op_.residual_stride.c;
      for (int64_t i = 0; i < count; ++i) {
        float value = values[p * kOutputs + i];
        if (op_.scale) value *= op_.scale[first + i];
        if (residual) value += to_float(residual[i * op_.residual_stride.c]);
        from_float(value, out[i * op_.out_stride.c]);
      }
    }
  }

  const Conv2d& op_;
  int64_t depth_, pixels_, outputs_ = 0;  // channels in whole vectors; outputs of a task
  Buffer x_;                              // [pixels][depth]
};

}  // namespace

void few_pixels_conv2d(const Conv2d& op, const Executor& executor) {
  with_storage(op.storage, [&](auto element) { FewPixels<decltype(element)>(op).run(executor); });
}

}  // namespace ffnet::FFNET_ISA
