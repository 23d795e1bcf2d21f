// batch_norm: act(norm(x)) of channels-last maps with batch statistics, and its gradients.
//
// A task takes a chunk of pixels, block by block, and within a block one vector of channels after the other. Chunks
// depend on the shape only and are joined in order. For the backward pass only x is kept.
#include "activation.h"
#include "buffer.h"
#include "norm.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int64_t kBlock = 64;  // pixels: of some hundred channels, a block stays in L1
constexpr int64_t kMostChunks = 128;

// For each chunk, two vectors per vector of channels; then their totals.
class Work {
 public:
  Work(const BatchNorm& norm, const BatchNormBackward* backward)
      : norm(norm),
        backward(backward),
        vectors(ceil_div(norm.channels, kLanes)),
        chunks(min_of(kMostChunks, ceil_div(norm.pixels, kBlock))),
        parts_((chunks + 1) * 2 * vectors * kLanes) {}

  const BatchNorm& norm;
  const BatchNormBackward* backward;
  const int64_t vectors, chunks;

  Lanes lanes(int64_t vector) const {
    const int64_t first = vector * kLanes;
    return {first, min_of(kLanes, norm.channels - first), 1};
  }
  int64_t first_pixel(int64_t chunk) const { return chunk * norm.pixels / chunks; }
  float* part(int64_t chunk, int64_t vector) const { return parts_.data + (chunk * vectors + vector) * 2 * kLanes; }
  // Forward: scale of the result; backward: slope and shift of the gradient.
  float* total(int64_t vector) const { return part(chunks, vector); }

  // f(first pixel, pixels, vector, whether the block is the chunk's first)
  template <class F>
  FFNET_INLINE void each_column(int64_t chunk, const F& f) const {
    const int64_t begin = first_pixel(chunk), end = first_pixel(chunk + 1);
    for (int64_t p = begin; p < end; p += kBlock)
      for (int64_t v = 0; v < vectors; ++v) f(p, min_of(kBlock, end - p), v, p == begin);
  }

 private:
  Buffer parts_;
};

// The vectors of a column of pixels.
template <class T>
struct Column {
  const T* from;
  int64_t channels, lanes;
  FFNET_INLINE Vec operator()(int64_t i) const { return load_lanes(from + i * channels, lanes); }
};

template <class T>
void measure(void* context, int64_t chunk) {
  const Work& work = *static_cast<const Work*>(context);
  const BatchNorm& op = work.norm;
  const int64_t chunk_pixels = work.first_pixel(chunk);
  work.each_column(chunk, [&](int64_t first, int64_t pixels, int64_t v, bool start) {
    const Lanes lanes = work.lanes(v);
    const Column<T> x{static_cast<const T*>(op.x) + first * op.channels + lanes.first, op.channels, lanes.count};
    float* part = work.part(chunk, v);
    Moments moments = moments_of(pixels, x);
    if (!start) {
      Moments before{Vec::load(part), Vec::load(part + kLanes), static_cast<float>(first - chunk_pixels)};
      before.join(moments);
      moments = before;
    }
    moments.mean.store(part), moments.deviations.store(part + kLanes);
  });
}

void finish_statistics(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const Norm& norm = work.norm.norm;
  const Lanes lanes = work.lanes(vector);
  JointMoments moments;
  for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
    const float* part = work.part(chunk, vector);
    const int64_t pixels = work.first_pixel(chunk + 1) - work.first_pixel(chunk);
    moments.join(part, nullptr, part + kLanes, static_cast<double>(pixels));
  }
  moments.mean().store_first(norm.mean + lanes.first, lanes.count);
  moments.variance().store_first(norm.variance + lanes.first, lanes.count);
  norm_scale(norm, lanes).scale.store(work.total(vector));
}

template <class T>
void apply(void* context, int64_t chunk) {
  const Work& work = *static_cast<const Work*>(context);
  const BatchNorm& op = work.norm;
  alignas(64) float line[kBlock * kLanes];
  work.each_column(chunk, [&](int64_t first, int64_t pixels, int64_t v, bool) {
    const Lanes lanes = work.lanes(v);
    const int64_t at = first * op.channels + lanes.first;
    const Column<T> x{static_cast<const T*>(op.x) + at, op.channels, lanes.count};
    const Vec mean = lanes_of(op.norm.mean, lanes), scale = Vec::load(work.total(v)),
              beta = lanes_of(op.norm.beta, lanes);
    // Not x * scale + (beta - mean * scale), which would cancel where means are large.
    const auto normalised = [&](int64_t i) { return fma(x(i) - mean, scale, beta); };
    T* out = static_cast<T*>(op.out) + at;
    if (op.activation == Activation::none) {
      for (int64_t i = 0; i < pixels; ++i) store_lanes(normalised(i), out + i * op.channels, lanes.count);
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) normalised(i).store(line + i * kLanes);
    activate_row(line, kLanes, pixels, op.activation);
    for (int64_t i = 0; i < pixels; ++i) store_lanes(Vec::load(line + i * kLanes), out + i * op.channels, lanes.count);
  });
}

// A column of the gradient of norm(x), and of x minus its mean.
template <class T>
struct Gradients {
  alignas(64) float grad[kBlock * kLanes], centred[kBlock * kLanes], slope[kBlock * kLanes];

  void make(const Work& work, int64_t first, int64_t pixels, const Lanes& lanes) {
    const BatchNorm& op = work.norm;
    const int64_t at = first * op.channels + lanes.first;
    const Column<T> x{static_cast<const T*>(op.x) + at, op.channels, lanes.count},
        incoming{static_cast<const T*>(work.backward->grad) + at, op.channels, lanes.count};
    const Vec mean = lanes_of(op.norm.mean, lanes);
    for (int64_t i = 0; i < pixels; ++i) {
      (x(i) - mean).store(centred + i * kLanes);
      incoming(i).store(grad + i * kLanes);
    }
    if (op.activation == Activation::none) return;
    const Vec scale = norm_scale(op.norm, lanes).scale, beta = lanes_of(op.norm.beta, lanes);
    for (int64_t i = 0; i < pixels * kLanes; i += kLanes) fma(Vec::load(centred + i), scale, beta).store(slope + i);
    slope_row(slope, nullptr, pixels, op.activation);
    apply_slope_row(grad, slope, grad, pixels, op.activation);
  }
};

template <class T>
void sum_gradients(void* context, int64_t chunk) {
  const Work& work = *static_cast<const Work*>(context);
  Gradients<T> gradients;
  work.each_column(chunk, [&](int64_t first, int64_t pixels, int64_t v, bool start) {
    gradients.make(work, first, pixels, work.lanes(v));
    const auto grad = [&](int64_t i) { return Vec::load(gradients.grad + i * kLanes); };
    const auto product = [&](int64_t i) { return grad(i) * Vec::load(gradients.centred + i * kLanes); };
    const auto same = [](Vec x) { return x; };
    float* part = work.part(chunk, v);
    const Vec zero = Vec::fill(0);
    (sum_vectors(pixels, grad, same) + (start ? zero : Vec::load(part))).store(part);
    (sum_vectors(pixels, product, same) + (start ? zero : Vec::load(part + kLanes))).store(part + kLanes);
  });
}

void finish_gradients(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const Lanes lanes = work.lanes(vector);
  Vec grads = Vec::fill(0), products = Vec::fill(0);
  for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
    grads = grads + Vec::load(work.part(chunk, vector));
    products = products + Vec::load(work.part(chunk, vector) + kLanes);
  }
  const Norm& norm = work.norm.norm;
  store_gradients(norm, lanes, grads, products, work.backward->gradients);
  const NormSlope at = norm_slope(norm, work.backward->gradients, static_cast<float>(work.norm.pixels), lanes);
  at.slope.store(work.total(vector)), at.shift.store(work.total(vector) + kLanes);
}

template <class T>
void apply_gradients(void* context, int64_t chunk) {
  const Work& work = *static_cast<const Work*>(context);
  const BatchNorm& op = work.norm;
  Gradients<T> gradients;
  work.each_column(chunk, [&](int64_t first, int64_t pixels, int64_t v, bool) {
    const Lanes lanes = work.lanes(v);
    gradients.make(work, first, pixels, lanes);
    const Vec scale = norm_scale(op.norm, lanes).scale, slope = Vec::load(work.total(v)),
              shift = Vec::load(work.total(v) + kLanes);
    T* out = static_cast<T*>(work.backward->x_grad) + first * op.channels + lanes.first;
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec grad = Vec::load(gradients.grad + i * kLanes), centred = Vec::load(gradients.centred + i * kLanes);
      store_lanes(fma(grad, scale, fma(centred, slope, shift)), out + i * op.channels, lanes.count);
    }
  });
}

}  // namespace

void batch_norm(const BatchNorm& op, const Executor& executor) {
  Work work(op, nullptr);
  with_storage(op.storage, [&](auto element) {
    using T = decltype(element);
    executor.run(work.chunks, measure<T>, &work);
    executor.run(work.vectors, finish_statistics, &work);
    executor.run(work.chunks, apply<T>, &work);
  });
}

void batch_norm_backward(const BatchNormBackward& op, const Executor& executor) {
  Work work(op.forward, &op);
  with_storage(op.forward.storage, [&](auto element) {
    using T = decltype(element);
    executor.run(work.chunks, sum_gradients<T>, &work);
    executor.run(work.vectors, finish_gradients, &work);
    if (op.x_grad) executor.run(work.chunks, apply_gradients<T>, &work);
  });
}

}  // namespace ffnet::FFNET_ISA
