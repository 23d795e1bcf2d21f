// Backward of a depthwise convolution of stride 1 and its activation on tensor cores, for 16-bit planes and filters of
// up to 7x9, in one pass: z = conv(x) + b is computed again, and the gradients of x and of the filter are those of
// gradient · act'(z), which lives in registers, rounded to the storage type. The map and the gradient are read once,
// the map's gradient is written once.
#include "activation.h"
#include "filter_sums.h"
#include "stream.h"

namespace ffnet {
namespace {

// What is known of the derivative; without activation z is not computed.
enum class Slope { any, gelu, none };

struct Parameters : StreamParameters {
  Plane x, gradient, x_grad;
  FilterView filter, mirrored;
  const uint16_t* bias;
  ActivationParameters activation;
  float* partials;
};

template <int K, Windows WINDOWS, class ROWS>
constexpr int kWarpBytes = 2 * StreamRing<K, WINDOWS, ROWS>::kBytes;

// Blocks on a multiprocessor: three if the registers are enough.
template <int K, Windows WINDOWS, Slope SLOPE, class ROWS>
constexpr int kResident = K == 3                 ? 3 - (WINDOWS == Windows::linear28 ? FFNET_FEWER_BLOCKS : 0)
                          : !ROWS::kKnown        ? 2
                          : SLOPE == Slope::none ? (ROWS::kPlane ? 3 : 2)
                          : ROWS::kPlane && !has_neighbours(WINDOWS) ? 3
                                                                     : 2;

template <class T, int K, Windows WINDOWS, Slope SLOPE, class ROWS>
FFNET_KERNEL(kStreamWarps* kWarp, (kResident<K, WINDOWS, SLOPE, ROWS>))
depthwise_backward_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = has_neighbours(WINDOWS);
  const StreamTask task(p, kWarpBytes<K, WINDOWS, ROWS>);
  if (!task.exists(p)) return;
  const int lane = task.lane;
  const int64_t channel = task.channel;

  const Neighbours neighbours(p.shape, lane);
  const auto around = [&](RowPair row) { return HALO ? neighbours.of(row) : RowPair{}; };
  const float bias = p.bias ? to_float(T{p.bias[channel]}) : 0.0f;

  const Source sources[2] = {{p.x, channel, p.rows.first}, {p.gradient, channel, p.rows.first - p.rows.lag_middle}};
  RowStream<K, WINDOWS, 2, ROWS> stream(p.shape, sources, ROWS::template turns<K>(p.rows), task);
  // Loaded after the first rows have been requested, so that both are in flight.
  const BandedFilter<K, HALO> filter(p.filter, channel, lane), mirrored(p.mirrored, channel, lane);
  const LaneWindows lane_windows(p.shape, lane);
  const bool lends = !ROWS::kKnown && lane_windows.lend();
  const auto owned = [&](RowPair row) { return lends ? RowPair{} : row; };
  FilterSums<T, K, HALO> filter_grad;
  MapSums<T> bias_grad;
  for (int panel = task.begin; panel < task.end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    stream.begin_panel(windows);
    const RowWriter<WINDOWS> x_grad(p.shape, p.x_grad, windows, lends, channel, lane);
    RollingSums<T, K, HALO> middle(bias), result(0.0f);
    filter_grad.open_panel();

    ROWS::template for_each_turn<K, 2, K / 2>(p.rows, [&](const auto turn) FFNET_INLINE_LAMBDA {
      using Turn = std::decay_t<decltype(turn)>;
      stream.advance(turn);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (turn.input(i)) {
          const RowPair x = stream.row(0, i, turn.input_row(i));
          if constexpr (SLOPE != Slope::none) middle.add(i, filter, x, around(x));
          filter_grad.keep(i, owned(x));
        } else if (!Turn::kInside) {
          filter_grad.keep_nothing(i);
        }
        if (turn.middle(i)) {
          RowPair fresh = stream.row(1, i, turn.middle_row(i));
          if constexpr (SLOPE != Slope::none) {
            const float (&sum)[4] = middle.complete(i);
            float grad[4], value[4];
            if constexpr (SLOPE == Slope::gelu)
              derivative_gelu(p.activation, sum, grad, value);
            else
              derivative_fast(p.activation, sum, grad, value);
#pragma unroll
            for (int half = 0; half < 2; ++half)
              fresh.half[half] = pack<T>(grad[2 * half] * low_float<T>(fresh.half[half]),
                                         grad[2 * half + 1] * high_float<T>(fresh.half[half]));
          }
          const RowPair outer = around(fresh);
          result.add(i, mirrored, fresh, outer);
          if (turn.owns(i)) {
            const RowPair columns = transposed(owned(fresh));
            filter_grad.add(i, turn, {columns, HALO ? transposed(outer) : RowPair{}});
            bias_grad.add(columns, {});
          }
        }
        if (turn.output(i)) {
          const float (&sum)[4] = result.complete(i);
          x_grad.template write<Turn::kInside>(turn.output_row(i),
                                               {{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])}});
        }
      }
    });
  }
  stream.close();
  sync_warp();  // the ring is free
  const int taps = p.filter.kh * p.filter.kw;
  float* partials = p.partials + (task.split * p.channels + channel) * (taps + 1);
  filter_grad.store(reinterpret_cast<float*>(task.memory), p.filter, partials, lane);
  const float sum = bias_grad.first();
  if (lane == 0) partials[taps] = sum;
#endif
}

Parameters parameters(const Convolution& call, const Map& x_grad, float* partials, const Device& device) {
  const int bottom = call.filter.kh - 1 - call.pad_top, right = call.filter.kw - 1 - call.pad_left;
  Parameters p{};
  p.shape = stream_shape(call.n, call.h, call.w, call.channels, 2 * (call.filter.kh - 1), device);
  p.rows = stream_rows(p.shape, call.h, call.h, call.pad_top, bottom, bottom, call.pad_top);
  p.channels = call.channels;
  p.x = plane(call.x, call.h, call.w), p.gradient = plane(call.gradient, call.h, call.w);
  p.x_grad = plane(x_grad, call.h, call.w);
  p.filter = filter_view(call.filter, call.pad_top, call.pad_left);
  p.mirrored = filter_view(call.filter, bottom, right, true);
  p.bias = static_cast<const uint16_t*>(call.filter.bias);
  p.activation = activation_parameters(call.activation);
  p.partials = partials;
  return p;
}

// body(kernel, a constant that is the rows of its filters, the shared memory of a warp)
template <class Body>
void with_kernel(const Convolution& call, const Parameters& p, const Body& body) {
  const int lag = lag_of_known_rows(call.filter.kh);
  const bool known = (call.activation == Activation::gelu || call.activation == Activation::none) &&
                     call.pad_top == lag && call.filter.kh == 2 * lag + 1 && p.shape.lead == 0;
  const KernelChoice choice{call.dtype, call.filter.kh, known, std::min({p.x.unit, p.gradient.unit, p.x_grad.unit})};
  with_stream_kernel(choice, p.shape, [&](auto element, auto k, auto windows, auto rows) {
    using Rows = decltype(rows);
    if constexpr (!Rows::kKnown) {
      // Fewer kernels to compile.
      constexpr Windows kWindows = windows() == Windows::alone ? Windows::aligned : windows();
      body(depthwise_backward_kernel<decltype(element), k(), kWindows, Slope::any, Rows>, k,
           kWarpBytes<k(), kWindows, Rows>);
    } else if (call.activation == Activation::none) {
      body(depthwise_backward_kernel<decltype(element), k(), windows(), Slope::none, Rows>, k,
           kWarpBytes<k(), windows(), Rows>);
    } else {
      body(depthwise_backward_kernel<decltype(element), k(), windows(), Slope::gelu, Rows>, k,
           kWarpBytes<k(), windows(), Rows>);
    }
  });
}

}  // namespace

bool stream_backward_takes(const Convolution& call) {
  return call.multiplier == 1 && call.out_h == call.h && call.out_w == call.w && stream_takes(call);
}

int64_t stream_backward_splits(const Convolution& call, const Map& x_grad, const Device& device) {
  Parameters p = parameters(call, x_grad, nullptr, device);
  with_kernel(call, p, [&](auto* kernel, auto k, int warp_bytes) { plan_stream<k()>(kernel, p, warp_bytes, device); });
  return p.split.splits;
}

void stream_backward(const Convolution& call, const Map& x_grad, float* partials, const Device& device) {
  const Parameters p = parameters(call, x_grad, partials, device);
  with_kernel(call, p, [&](auto* kernel, auto k, int warp_bytes) {
    start_stream<k()>("depthwise_backward_kernel", kernel, p, warp_bytes, device);
  });
}

}  // namespace ffnet
