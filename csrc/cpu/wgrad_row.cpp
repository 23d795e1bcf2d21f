// The weight gradients of every depthwise operator.
//
// The sums of one to three filter rows stay in registers for a run of pixels. Taps on padding are skipped.
#include "wgrad_row.h"

namespace ffnet::FFNET_ISA {
namespace {

constexpr int kTaps = 7;                // of a filter row, at a time
constexpr int64_t kRunningPixels = 64;  // one running sum over a whole map would accumulate rounding errors

// Filter rows summed together, for enough independent sums, and pixels of the gradient in registers.
template <int T>
constexpr int kFilterRows = T <= 3                 ? 3
                            : Vec::registers == 32 ? 2
                                                   : 1;
template <int T>
constexpr int kPixelBlock = Vec::registers == 32 ? 16
                            : T <= 3             ? 4
                                                 : 8;

// Adds B pixels of a gradient row to R x T sums; the first meets `x` rows at pixel `begin`.
template <int R, int T, int S, int B>
FFNET_INLINE void add_pixels(Vec (&sum)[R][T], const float* grad, const float* const* x, int64_t begin, int64_t width) {
  Vec g[B];
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) g[b] = Vec::load(grad + b * kLanes);
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r) {
    if (!x[r]) continue;
    const float* row = x[r] + begin * kLanes;
#pragma GCC unroll 64
    for (int j = 0; j < S * (B - 1) + T; ++j) {
      if (static_cast<uint64_t>(begin + j) >= static_cast<uint64_t>(width)) continue;
      const Vec value = Vec::load(row + j * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        if (j >= t && (j - t) % S == 0 && (j - t) / S < B) sum[r][t] = fma(value, g[(j - t) / S], sum[r][t]);
    }
  }
}

// Adds a run to R x T sums, whose rows are `pitch` floats apart.
template <int R, int T, int S>
void add_run(const WgradRun& run, float* sums, int64_t pitch) {
  constexpr int kBlock = kPixelBlock<T>;
  Vec sum[R][T];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = Vec::fill(0);
  for (int64_t i = 0; i < run.rows; ++i) {
    const float* const* x = run.x + i * run.stride_h;
    int64_t j = run.first;
    const auto step = [&](auto size) __attribute__((always_inline)) {
      constexpr int B = decltype(size)::value;
      add_pixels<R, T, S, B>(sum, run.grad[i] + j * kLanes, x, j * S + run.left, run.width);
      j += B;
    };
    while (run.last - j >= kBlock) step(std::integral_constant<int, kBlock>());
    if (kBlock > 8 && run.last - j >= 8) step(std::integral_constant<int, 8>());
    if (kBlock > 4 && run.last - j >= 4) step(std::integral_constant<int, 4>());
    if (run.last - j >= 2) step(std::integral_constant<int, 2>());
    if (run.last - j >= 1) step(std::integral_constant<int, 1>());
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      float* to = sums + r * pitch + t * kLanes;
      (Vec::load(to) + sum[r][t]).store(to);
    }
}

using AddRun = void (*)(const WgradRun&, float*, int64_t);

template <int T, int S>
AddRun add_run_of(int64_t filter_rows) {
  if constexpr (kFilterRows<T> >= 3)
    if (filter_rows == 3) return add_run<3, T, S>;
  if constexpr (kFilterRows<T> >= 2)
    if (filter_rows == 2) return add_run<2, T, S>;
  return add_run<1, T, S>;
}

template <int S>
void add_filter_sums_of(WgradRun run, int64_t kh, int64_t kw, float* sums) {
  const int64_t rows = run.rows, first = run.first, last = run.last, left = run.left;
  const float *const *grad = run.grad, *const *x = run.x;
  const int64_t run_rows = max_of(1, kRunningPixels / (last - first));
  const auto add_taps_of = [&](auto taps, int64_t kx) __attribute__((always_inline)) {
    constexpr int T = decltype(taps)::value;
    for (int64_t ky = 0; ky < kh; ky += kFilterRows<T>) {
      const AddRun add = add_run_of<T, S>(min_of(kFilterRows<T>, kh - ky));
      float* to = sums + (ky * kw + kx) * kLanes;
      run.left = left + kx;
      for (int64_t r = 0; r < rows; r += run_rows) {
        run.rows = min_of(run_rows, rows - r), run.grad = grad + r, run.x = x + r * run.stride_h + ky;
        for (run.first = first; run.first < last; run.first = run.last) {
          run.last = min_of(run.first + kRunningPixels, last);
          add(run, to, kw * kLanes);
        }
      }
    }
  };
  int64_t kx = 0;
  for (; kx + kTaps <= kw; kx += kTaps) add_taps_of(std::integral_constant<int, kTaps>(), kx);
  switch (kw - kx) {
    case 1: return add_taps_of(std::integral_constant<int, 1>(), kx);
    case 2: return add_taps_of(std::integral_constant<int, 2>(), kx);
    case 3: return add_taps_of(std::integral_constant<int, 3>(), kx);
    case 4: return add_taps_of(std::integral_constant<int, 4>(), kx);
    case 5: return add_taps_of(std::integral_constant<int, 5>(), kx);
    case 6: return add_taps_of(std::integral_constant<int, 6>(), kx);
  }
}

}  // namespace

void add_filter_sums(const WgradRun& run, int64_t kh, int64_t kw, float* sums) {
  (run.stride_w == 1 ? add_filter_sums_of<1> : add_filter_sums_of<2>)(run, kh, kw, sums);
}

}  // namespace ffnet::FFNET_ISA
