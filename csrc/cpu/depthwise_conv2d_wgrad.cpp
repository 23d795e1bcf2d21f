// Weight and bias gradients of a stride-1 depthwise convolution:
//   weight_grad[c, ky, kx] = sum over n, i, j of grad[n, c, i, j] * x[n, c, i - pad_top + ky, j - pad_left + kx]
//
// For one vector of channels and one filter row, up to seven sums stay in registers while strips of both maps pass
// through L1. Images are cut into chunks by the shape alone and the chunks' sums added in order: the result does not
// depend on the number of threads.
#include <cstdlib>
#include <new>

#include "rows.h"
#include "tiling.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int kTaps = 7;                    // sums in registers
constexpr int64_t kStripFloats = 4 * 1024;  // of each map: both stay in L1
constexpr int64_t kRunningPixels = 64;      // one running sum over a whole map would round badly
constexpr int64_t kLeastTasks = 32;         // images are cut until there are as many

// No standard container: its functions, compiled for this instruction set, could be linked into the baseline.
struct Buffer {
  float* data;
  explicit Buffer(int64_t floats)
      : data(static_cast<float*>(std::malloc(static_cast<size_t>(floats) * sizeof(float)))) {
    if (!data) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

struct Work {
  const DepthwiseWgrad& op;
  int64_t vectors, chunks, partial_floats;
  float* partial;  // [vectors][chunks][kh * kw + 1][lanes], the last row for the bias
};

// Adds B pixels of a row: sum[t] += grad[b] * x[begin + b + t].
template <int T, int B>
FFNET_INLINE void add_pixels(Vec (&sum)[kTaps], const float* grad, int64_t grad_pixel, const float* x, int64_t x_pixel,
                             int64_t begin, int64_t width) {
  Vec g[B];
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) g[b] = Vec::load(grad + b * grad_pixel);
#pragma GCC unroll 64
  for (int j = 0; j < B + T - 1; ++j) {
    if (static_cast<uint64_t>(begin + j) >= static_cast<uint64_t>(width)) continue;
    const Vec value = Vec::load(x + (begin + j) * x_pixel);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      if (j >= t && j - t < B) sum[t] = fma(value, g[j - t], sum[t]);
  }
}

// Adds a strip of rows to T sums of one filter row: x row = grad row + shift, first tap at column `left`.
template <int T, class Map>
void add_strip(const Map& grad, const Map& x, int64_t first, int64_t last, int64_t shift, int64_t left,
               int64_t grad_width, int64_t width, float* sums) {
  Vec sum[kTaps];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = Vec::fill(0);
  for (int64_t r = first; r < last; ++r) {
    const float* from = x[r + shift];
    if (!from) continue;
    const float* g = grad[r];
    int64_t j = 0;
    const auto step = [&](auto size) __attribute__((always_inline)) {
      constexpr int B = decltype(size)::value;
      add_pixels<T, B>(sum, g + j * grad.pixel(), grad.pixel(), from, x.pixel(), j + left, width);
      j += B;
    };
    while (grad_width - j >= kMaxBlock) step(std::integral_constant<int, kMaxBlock>());
    if (kMaxBlock > 8 && grad_width - j >= 8) step(std::integral_constant<int, 8>());
    if (grad_width - j >= 4) step(std::integral_constant<int, 4>());
    if (grad_width - j >= 2) step(std::integral_constant<int, 2>());
    if (grad_width - j >= 1) step(std::integral_constant<int, 1>());
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) (Vec::load(sums + t * kLanes) + sum[t]).store(sums + t * kLanes);
}

template <class T>
void add_image(const DepthwiseWgrad& op, int64_t n, const Lanes& lanes, float* sums, Arena arena) {
  float* x_scratch = arena.floats(op.h * op.w * kLanes);
  float* grad_scratch = arena.floats(op.out_h * op.out_w * kLanes);
  using Map = Rows<T, FloatTaps>;
  using AddStrip = void (*)(const Map&, const Map&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
  static constexpr AddStrip add_strips[kTaps] = {add_strip<1, Map>, add_strip<2, Map>, add_strip<3, Map>,
                                                 add_strip<4, Map>, add_strip<5, Map>, add_strip<6, Map>,
                                                 add_strip<7, Map>};
  const Map x(static_cast<const T*>(op.x) + n * op.x_stride.n, op.x_stride, op.h, op.w, lanes, 0, op.h, x_scratch);
  const Map grad(static_cast<const T*>(op.grad) + n * op.grad_stride.n, op.grad_stride, op.out_h, op.out_w, lanes, 0,
                 op.out_h, grad_scratch);
  const int64_t run = max_of(1, kRunningPixels / op.out_w), strip = max_of(run, kStripFloats / (op.w * kLanes));
  for (int64_t first = 0; first < op.out_h; first += strip) {
    const int64_t last = min_of(first + strip, op.out_h);
    for (int64_t ky = 0; ky < op.kh; ++ky) {
      for (int64_t kx = 0; kx < op.kw; kx += kTaps) {
        const AddStrip add = add_strips[min_of(kTaps, op.kw - kx) - 1];
        float* row_sums = sums + (ky * op.kw + kx) * kLanes;
        for (int64_t r = first; r < last; r += run)
          add(grad, x, r, min_of(r + run, last), ky - op.pad_top, kx - op.pad_left, op.out_w, op.w, row_sums);
      }
    }
    float* bias_sum = sums + op.kh * op.kw * kLanes;
    for (int64_t r = first; r < last; ++r) {
      Vec bias = Vec::fill(0);
      for (int64_t j = 0; j < op.out_w; ++j) bias = bias + Vec::load(grad[r] + j * grad.pixel());
      (Vec::load(bias_sum) + bias).store(bias_sum);
    }
  }
}

void run_task(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const DepthwiseWgrad& op = work.op;
  const int64_t c = task / work.chunks * kLanes, chunk = task % work.chunks;
  const Lanes lanes{c, min_of(kLanes, op.channels - c), 1};
  float* sums = work.partial + task * work.partial_floats;
  for (int64_t i = 0; i < work.partial_floats; ++i) sums[i] = 0;
  const Arena arena((op.h * op.w + op.out_h * op.out_w) * kLanes);
  for (int64_t n = chunk * op.n / work.chunks; n < (chunk + 1) * op.n / work.chunks; ++n) switch (op.storage) {
      case Storage::float32: add_image<float>(op, n, lanes, sums, arena); break;
      case Storage::bfloat16: add_image<BFloat16>(op, n, lanes, sums, arena); break;
      case Storage::float16: add_image<Float16>(op, n, lanes, sums, arena); break;
    }
}

// Adds the chunks of one vector of channels in order and writes the gradients.
void finish_task(void* context, int64_t vector) {
  const Work& work = *static_cast<const Work*>(context);
  const DepthwiseWgrad& op = work.op;
  const int64_t c = vector * kLanes, taps = op.kh * op.kw;
  const Lanes lanes{c, min_of(kLanes, op.channels - c), 1};
  float* sums = work.partial + vector * work.chunks * work.partial_floats;
  for (int64_t i = 0; i < work.partial_floats; i += kLanes) {
    Vec total = Vec::load(sums + i);
    for (int64_t chunk = 1; chunk < work.chunks; ++chunk)
      total = total + Vec::load(sums + chunk * work.partial_floats + i);
    total.store(sums + i);
  }
  scatter_row(sums, taps, lanes, op.weight_grad, taps, 1);
  if (op.bias_grad) Vec::load(sums + taps * kLanes).store_first(op.bias_grad + c, lanes.count);
}

}  // namespace

void depthwise_conv2d_wgrad(const DepthwiseWgrad& op, const Executor& executor) {
  const int64_t vectors = ceil_div(op.channels, kLanes);
  const int64_t chunks = max_of(1, min_of(op.n, ceil_div(kLeastTasks, vectors)));
  const int64_t partial_floats = (op.kh * op.kw + 1) * kLanes;
  const Buffer partial(vectors * chunks * partial_floats);
  Work work{op, vectors, chunks, partial_floats, partial.data};
  executor.run(vectors * chunks, run_task, &work);
  executor.run(vectors, finish_task, &work);
}

}  // namespace ffnet::FFNET_ISA
