// A classifier's head: out = weight * (scale * mean over pixels of x + shift) + bias.
//
// Of few images the weight is the larger part: threads share its rows, and each is read once for kImages images.
#include "buffer.h"
#include "storage.h"
#include "tiling.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kImages = 8;    // that meet a row of the weight together
constexpr int64_t kOutputs = 32;  // of a task

template <class T>
struct Head {
  const PooledLinear& op;
  float* pooled;  // [n][whole vectors of channels]
  int64_t row() const { return ceil_div(op.channels, kLanes) * kLanes; }

  // Channels [c, c + kLanes) of an image.
  void pool(int64_t image, int64_t c) const {
    const int64_t count = min_of(kLanes, op.channels - c);
    const T* x = static_cast<const T*>(op.x) + image * op.x_stride.n + c * op.x_stride.c;
    Vec sum = Vec::fill(0);
    for (int64_t y = 0; y < op.h; ++y) {
      Vec line = Vec::fill(0);
      for (int64_t i = 0; i < op.w; ++i) {
        const T* pixel = x + y * op.x_stride.h + i * op.x_stride.w;
        if (op.x_stride.c == 1) {
          line = line + load_first(pixel, count);
        } else {
          float lanes[kLanes] = {};
          for (int64_t l = 0; l < count; ++l) lanes[l] = to_float(pixel[l * op.x_stride.c]);
          line = line + Vec::load(lanes);
        }
      }
      sum = sum + line;
    }
    Vec mean = sum * Vec::fill(1 / static_cast<float>(op.h * op.w));
    if (op.scale) mean = fma(mean, Vec::load_first(op.scale + c, count), Vec::load_first(op.shift + c, count));
    mean.store(pooled + image * row() + c);
  }

  // Outputs [first, last) of images [image, image + I).
  template <int I>
  void multiply(int64_t first, int64_t last, int64_t image) const {
    const float* in = pooled + image * row();
    for (int64_t o = first; o < last; ++o) {
      const T* weight = static_cast<const T*>(op.weight) + o * op.weight_stride;
      Vec sum[I];
      for (int i = 0; i < I; ++i) sum[i] = Vec::fill(0);
      for (int64_t c = 0; c < op.channels; c += kLanes) {
        const Vec w = load_first(weight + c, min_of(kLanes, op.channels - c));
        for (int i = 0; i < I; ++i) sum[i] = fma(w, Vec::load(in + i * row() + c), sum[i]);
      }
      for (int i = 0; i < I; ++i) {
        float lanes[kLanes], total = op.bias ? op.bias[o] : 0;
        sum[i].store(lanes);
        for (const float lane : lanes) total += lane;
        from_float(total, static_cast<T*>(op.out)[(image + i) * op.outputs + o]);
      }
    }
  }

  void run(const Executor& executor) {
    const auto pool_task = [](void* self, int64_t task) {
      const Head& head = *static_cast<const Head*>(self);
      const int64_t vectors = head.row() / kLanes;
      head.pool(task / vectors, task % vectors * kLanes);
    };
    const auto multiply_task = [](void* self, int64_t task) {
      const Head& head = *static_cast<const Head*>(self);
      const int64_t first = task * kOutputs, last = min_of(first + kOutputs, head.op.outputs);
      int64_t image = 0;
      for (; image + kImages <= head.op.n; image += kImages) head.template multiply<kImages>(first, last, image);
      for (; image < head.op.n; ++image) head.template multiply<1>(first, last, image);
    };
    executor.run(op.n * (row() / kLanes), pool_task, this);
    executor.run(ceil_div(op.outputs, kOutputs), multiply_task, this);
  }
};

}  // namespace

void pooled_linear(const PooledLinear& op, const Executor& executor) {
  const Buffer pooled(op.n * ceil_div(op.channels, kLanes) * kLanes);
  with_storage(op.storage, [&](auto element) { Head<decltype(element)>{op, pooled.data}.run(executor); });
}

}  // namespace ffnet::FFNET_ISA
