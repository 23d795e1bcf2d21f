// Depthwise convolution of 16-bit planes on tensor cores for any filter up to 31x31, stride 1 or 2 and one or two
// outputs a channel, and the gradient of its input: the same kernel, since both are
//
//     out[y, x] = Σ in[row, column] · filter[ky, kx]   with ky = in_y·row + out_y·y + pad (columns alike),
//
// where (in, out) is (1, -stride) forward and (-stride, 1) for the gradient. The filter's rows are in shared memory
// as banded matrices; a warp holds 8 rows of 16 windows of 8 columns of the result, and each row of the input that it
// reads is multiplied with the matrices of all results it takes part in.
#include "activation.h"
#include "band.h"
#include "storage.h"

namespace ffnet {
namespace {

constexpr int kBandedWarps = 4;
constexpr int kResultRows = 8;

// One direction of the relation above, and what it means for a run of results.
struct Axis {
  int in, out, pad, taps;

  // Of results first..first + count - 1: the first and last place in the input that they read.
  FFNET_BOTH int lowest(int first) const {  // in > 0: ky >= 0; in < 0: ky <= taps - 1
    return in > 0 ? -out * first - pad : divide_up(out * first + pad - taps + 1, -in);
  }
  FFNET_BOTH int highest(int last) const {
    return in > 0 ? -out * last - pad + taps - 1 : divide_down(out * last + pad, -in);
  }
  FFNET_DEVICE int tap(int input, int result) const { return in * input + out * result + pad; }

 private:
  static FFNET_BOTH int divide_down(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
  static FFNET_BOTH int divide_up(int a, int b) { return -divide_down(-a, b); }
};

struct Parameters {
  Plane in, out, gradient;
  FilterView filter;
  const uint16_t* bias;
  Axis rows, columns;
  int64_t n;
  int windows;            // of a row of the result
  int window_step;        // columns of the input from a window to the next
  int window_origin;      // column of the input at which the first window's chunks begin; even
  int outputs_a_channel;  // of the input: filters of a result in the gradient, else 1
  int inputs_shared;      // results that read one channel of the input
  int64_t panels;
  int row_blocks;
  ActivationParameters activation;
};

#if FFNET_HAS_SM80

// Two neighbouring 16-bit values of a row, zero outside of it.
FFNET_DEVICE uint32_t read_pair(const uint16_t* row, int column, int width, bool paired) {
  if (paired)
    return static_cast<unsigned>(column) < static_cast<unsigned>(width)
               ? *reinterpret_cast<const uint32_t*>(row + column)
               : 0;
  const uint32_t low = static_cast<unsigned>(column) < static_cast<unsigned>(width) ? row[column] : 0;
  const uint32_t high = static_cast<unsigned>(column + 1) < static_cast<unsigned>(width) ? row[column + 1] : 0;
  return low | high << 16;
}

#endif

template <class T, int PAIRS>
FFNET_KERNEL(kBandedWarps* kWarp, 3)
banded_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, g = lane / 4, t = lane % 4;
  const int64_t channel = block_y();
  auto* bands = reinterpret_cast<uint2*>(shared_memory());  // [filter][ky][pair of chunks][lane]
  const int kh = p.rows.taps;

  for (int i = thread_index(); i < p.outputs_a_channel * kh * PAIRS * kWarp; i += block_threads()) {
    const int l = i % kWarp, pair = i / kWarp % PAIRS, ky = i / (kWarp * PAIRS) % kh, f = i / (kWarp * PAIRS * kh);
    const int column = p.window_origin + pair * 16 + l % 4 * 2;
    const auto entry = [&](int u) {
      return filter_tap(p.filter, channel * p.outputs_a_channel + f, ky, p.columns.tap(column + u, l / 4));
    };
    bands[i] = {entry(0) | entry(1) << 16, entry(8) | entry(9) << 16};
  }
  sync_block();

  const float bias = p.bias ? to_float(T{p.bias[channel]}) : 0.0f;
  const int64_t tasks = p.panels * p.row_blocks;
  for (int64_t task = int64_t{block_x()} * kBandedWarps + warp; task < tasks;
       task += int64_t{grid_x()} * kBandedWarps) {
    const int64_t panel = task / p.row_blocks;
    const int first = static_cast<int>(task - panel * p.row_blocks) * kResultRows;
    // The lane's windows: g and g + 8 of the panel.
    int64_t image[2];
    int window[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t index = panel * kPanel + half * kWindow + g;
      image[half] = index / p.windows;
      window[half] = static_cast<int>(index - image[half] * p.windows);
      exists[half] = image[half] < p.n;
    }
    float sums[kResultRows][4];
#pragma unroll
    for (int i = 0; i < kResultRows; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = bias;

    const int lowest = p.rows.lowest(first), highest = p.rows.highest(first + kResultRows - 1);
    const int from = lowest > 0 ? lowest : 0, to = highest < p.in.h - 1 ? highest : p.in.h - 1;
    for (int f = 0; f < p.outputs_a_channel; ++f) {
      const int64_t in_channel = channel * p.outputs_a_channel / p.inputs_shared + f;
      const uint2* filter = bands + f * kh * PAIRS * kWarp + lane;
      for (int row = from; row <= to; ++row) {
        uint32_t chunk[2 * PAIRS][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint16_t* source =
              p.in.data + (exists[half] ? image[half] * p.in.n : 0) + in_channel * p.in.c + int64_t{row} * p.in.w;
          const int column = p.window_origin + window[half] * p.window_step + 2 * t, width = exists[half] ? p.in.w : 0;
#pragma unroll
          for (int c = 0; c < 2 * PAIRS; ++c) chunk[c][half] = read_pair(source, column + 8 * c, width, p.in.unit >= 4);
        }
#pragma unroll
        for (int i = 0; i < kResultRows; ++i) {
          const int ky = p.rows.tap(row, first + i);
          if (ky < 0 || ky >= kh) continue;
#pragma unroll
          for (int pair = 0; pair < PAIRS; ++pair) {
            const uint2 b = filter[(ky * PAIRS + pair) * kWarp];
            const uint32_t (&a)[2] = chunk[2 * pair], (&a8)[2] = chunk[2 * pair + 1];
            multiply_16x8x16<T>(sums[i], a[0], a[1], a8[0], a8[1], b.x, b.y, sums[i]);
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kResultRows; ++i) {
      const int y = first + i;
      float value[4], unused[4];
      if (p.gradient.data)
        derivative_fast(p.activation, sums[i], value, unused);
      else
        activate_fast(p.activation, sums[i], value);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = window[half] * kWindow + 2 * t;
        if (!exists[half] || y >= p.out.h || x >= p.out.w) continue;
        const bool second = x + 1 < p.out.w;
        float low = value[2 * half], high = value[2 * half + 1];
        if (p.gradient.data) {
          const uint16_t* gradient =
              p.gradient.data + image[half] * p.gradient.n + channel * p.gradient.c + int64_t{y} * p.gradient.w + x;
          low *= to_float(T{gradient[0]});
          high *= second ? to_float(T{gradient[1]}) : 0.0f;
        }
        uint16_t* target = p.out.data + image[half] * p.out.n + channel * p.out.c + int64_t{y} * p.out.w + x;
        if (p.out.unit >= 4) {
          *reinterpret_cast<uint32_t*>(target) = pack<T>(low, high);
        } else {
          target[0] = from_float<T>(low).bits;
          if (second) target[1] = from_float<T>(high).bits;
        }
      }
    }
  }
#endif
}

// What remains once planes, axes and channels are set.
void run(Parameters p, Dtype dtype, int64_t channels, const Device& device) {
  p.windows = (p.out.w + kWindow - 1) / kWindow;
  p.panels = (p.n * p.windows + kPanel - 1) / kPanel;
  p.row_blocks = (p.out.h + kResultRows - 1) / kResultRows;
  p.window_step = p.columns.in > 0 ? -p.columns.out * kWindow : kWindow / -p.columns.in;
  p.window_origin = p.columns.lowest(0) & ~1;
  const int pairs = (p.columns.highest(kWindow - 1) - p.window_origin) / 16 + 1;
  Grid grid;
  const int64_t wanted = (8 * device.multiprocessors + channels - 1) / channels;
  grid.x = std::clamp<int64_t>(wanted, 1, (p.panels * p.row_blocks + kBandedWarps - 1) / kBandedWarps);
  grid.y = channels;
  grid.threads = kBandedWarps * kWarp;
  grid.shared_bytes = size_t{8} * p.outputs_a_channel * p.rows.taps * pairs * kWarp;
  with_16_bit_storage(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = pairs == 1 ? banded_kernel<T, 1> : pairs == 2 ? banded_kernel<T, 2> : banded_kernel<T, 3>;
    launch("banded_kernel", kernel, grid, p, device.stream);
  });
}

}  // namespace

bool banded_takes(const Convolution& call) {
  return call.dtype != Dtype::float32 && call.filter.kh <= 31 && call.filter.kw <= 31 &&
         call.channels * call.multiplier <= 0xffff && planar(call.x, call.w) && planar(call.out, call.out_w) &&
         (!call.gradient.data || planar(call.gradient, call.out_w));
}

void banded_forward(const Convolution& call, const Device& device) {
  Parameters p{};
  p.in = plane(call.x, call.h, call.w), p.out = plane(call.out, call.out_h, call.out_w);
  p.gradient = plane(call.gradient, call.out_h, call.out_w);
  p.filter = filter_view(call.filter, call.pad_top, call.pad_left);
  p.bias = static_cast<const uint16_t*>(call.filter.bias);
  p.rows = {1, -call.stride_h, call.pad_top, call.filter.kh};
  p.columns = {1, -call.stride_w, call.pad_left, call.filter.kw};
  p.n = call.n, p.outputs_a_channel = 1, p.inputs_shared = call.multiplier;
  p.activation = activation_parameters(call.activation);
  run(p, call.dtype, call.channels * call.multiplier, device);
}

void banded_dgrad(const Convolution& call, const Device& device) {
  Parameters p{};
  p.in = plane(call.out, call.out_h, call.out_w), p.out = plane(call.x, call.h, call.w);
  p.filter = filter_view(call.filter, call.pad_top, call.pad_left);
  p.rows = {-call.stride_h, 1, call.pad_top, call.filter.kh};
  p.columns = {-call.stride_w, 1, call.pad_left, call.filter.kw};
  p.n = call.n, p.outputs_a_channel = call.multiplier, p.inputs_shared = 1;
  p.activation = activation_parameters(Activation::none);
  run(p, call.dtype, call.channels, device);
}

}  // namespace ffnet
