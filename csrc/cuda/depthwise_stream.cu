// Depthwise convolution with stride 1 on tensor cores, for 16-bit planes and filters of up to 7x9: panels of windows
// stream down their planes (stream.h). Each map is read and written once.
#include "activation.h"
#include "stream.h"

namespace ffnet {
namespace {

// What is computed from a sum z: act(z), or gradient · act'(z). If the schedule is known at compile time, so is the
// kind of activation: smooth, or none or ReLU.
enum class Epilogue { activate, activation_backward, smooth, clamped };

struct Parameters : StreamParameters {
  int multiplier;
  Plane x, gradient, out;
  FilterView filter;
  const uint16_t* bias;
  ActivationParameters activation;
};

template <class T, int K, Windows WINDOWS, Epilogue EPILOGUE, class ROWS>
// With four blocks, narrow copies of high planes would spill a few registers.
FFNET_KERNEL(kStreamWarps* kWarp, WINDOWS == Windows::linear28 ? 3 : 4)
    depthwise_stream_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = has_neighbours(WINDOWS), kBackward = EPILOGUE == Epilogue::activation_backward;
  constexpr int kMaps = kBackward ? 2 : 1;
  const StreamTask task(p, kMaps * StreamRing<K, WINDOWS, ROWS>::kBytes);
  if (!task.exists(p)) return;
  const int lane = task.lane;
  const int64_t channel = task.channel;

  const Neighbours neighbours(p.shape, lane);
  const float bias = p.bias ? to_float(T{p.bias[channel]}) : 0.0f;

  const Source sources[2] = {{p.x, channel / p.multiplier, p.rows.first},
                             {p.gradient, channel, p.rows.first - p.rows.lag_output}};
  RowStream<K, WINDOWS, kMaps, ROWS> stream(p.shape, sources, ROWS::template turns<K>(p.rows), task);
  // Loaded after the first rows have been requested, so that both are in flight.
  const BandedFilter<K, HALO> filter(p.filter, channel, lane);
  const LaneWindows lane_windows(p.shape, lane);
  for (int panel = task.begin; panel < task.end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    stream.begin_panel(windows);
    const RowWriter<WINDOWS> writer(p.shape, p.out, windows, lane_windows.lend(), channel, lane);
    RollingSums<T, K, HALO> sums(bias);

    ROWS::template for_each_turn<K, 1, K / 2>(p.rows, [&](const auto turn) FFNET_INLINE_LAMBDA {
      using Turn = std::decay_t<decltype(turn)>;
      stream.advance(turn);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (turn.input(i)) {
          const RowPair own = stream.row(0, i, turn.input_row(i));
          sums.add(i, filter, own, HALO ? neighbours.of(own) : RowPair{});
        }
        if (turn.output(i)) {
          const float (&sum)[4] = sums.complete(i);
          float out[4];
          if constexpr (kBackward) {
            float value[4];
            derivative_fast(p.activation, sum, out, value);
            const RowPair gradient = stream.row(1, i, turn.output_row(i));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              out[2 * half] *= low_float<T>(gradient.half[half]);
              out[2 * half + 1] *= high_float<T>(gradient.half[half]);
            }
          } else if constexpr (EPILOGUE == Epilogue::smooth) {
            activate_smooth(p.activation, sum, out);
          } else if constexpr (EPILOGUE == Epilogue::clamped) {
            activate_clamped(p.activation, sum, out);
          } else {
            activate_fast(p.activation, sum, out);
          }
          writer.template write<Turn::kInside>(turn.output_row(i),
                                               {{pack<T>(out[0], out[1]), pack<T>(out[2], out[3])}});
        }
      }
    });
  }
  stream.close();
#endif
}

struct PlanarMap {
  Map map;
  int h, w;
};

template <Epilogue EPILOGUE>
void start(const Parameters& p, const KernelChoice& choice, const Device& device) {
  constexpr bool kBackward = EPILOGUE == Epilogue::activation_backward;
  with_stream_kernel(choice, p.shape, [&](auto element, auto k, auto windows, auto rows) {
    // The backward kernel, for what depthwise_backward.cu does not take, is compiled with neighbours and for any planes
    // only: fewer kernels.
    using Rows = std::conditional_t<kBackward, AnyRows, decltype(rows)>;
    constexpr Windows kKnown = kBackward && windows() == Windows::alone ? Windows::aligned : windows();
    constexpr Windows kWindows = !Rows::kKnown && linear_width(kKnown) > 0 ? Windows::any : kKnown;
    constexpr Epilogue kEpilogue = Rows::kKnown || kBackward ? EPILOGUE : Epilogue::activate;
    start_stream<k()>("depthwise_stream_kernel",
                      depthwise_stream_kernel<decltype(element), k(), kWindows, kEpilogue, Rows>, p,
                      (kBackward ? 2 : 1) * StreamRing<k(), kWindows, Rows>::kBytes, device);
  });
}

void run(const Convolution& call, const PlanarMap& x, const PlanarMap& out, const FilterView& filter,
         Activation activation, const Map& gradient, const Device& device) {
  Parameters p{};
  p.multiplier = call.multiplier;
  p.channels = call.channels * call.multiplier;
  p.shape = stream_shape(call.n, out.h, std::max(out.w, x.w), p.channels, filter.kh - 1, device);
  const int bottom = filter.kh - 1 - filter.pad_top;
  p.rows = stream_rows(p.shape, x.h, x.h, filter.pad_top, bottom, 0, 0);
  p.x = plane(x.map, x.h, x.w), p.out = plane(out.map, out.h, out.w);
  p.filter = filter;
  p.bias = filter.mirrored ? nullptr : static_cast<const uint16_t*>(call.filter.bias);
  p.activation = activation_parameters(activation);
  KernelChoice choice{call.dtype, filter.kh, bottom == lag_of_known_rows(filter.kh) && x.h == out.h && x.w == out.w,
                      std::min(p.x.unit, p.out.unit)};
  if (gradient.data) {
    p.gradient = plane(gradient, out.h, out.w);
    choice.unit = std::min(choice.unit, p.gradient.unit);
    choice.known_rows = false;
    start<Epilogue::activation_backward>(p, choice, device);
  } else if (is_smooth(activation)) {
    start<Epilogue::smooth>(p, choice, device);
  } else {
    start<Epilogue::clamped>(p, choice, device);
  }
}

}  // namespace

bool stream_takes(const Convolution& call) {
  const int bottom = call.filter.kh - 1 - call.pad_top, right = call.filter.kw - 1 - call.pad_left;
  // The last rows of the result must read the map: sums are started by rows of it.
  return call.out_h <= call.h + call.pad_top && call.dtype != Dtype::float32 && call.stride_h == 1 &&
         call.stride_w == 1 && call.filter.kh <= 7 && call.pad_top >= 0 && bottom >= 0 && call.pad_left >= 0 &&
         call.pad_left <= 4 && right >= 0 && right <= 4 &&
         panels_take(call.n, std::max(call.h, call.out_h), std::max(call.w, call.out_w)) && planar(call.x, call.w) &&
         planar(call.out, call.out_w) && (!call.gradient.data || planar(call.gradient, call.out_w));
}

void stream_forward(const Convolution& call, const Device& device) {
  const PlanarMap x{call.x, call.h, call.w}, out{call.out, call.out_h, call.out_w};
  const FilterView filter = filter_view(call.filter, call.pad_top, call.pad_left);
  run(call, x, out, filter, call.activation, call.gradient, device);
}

void stream_dgrad(const Convolution& call, const Device& device) {
  const int top = call.filter.kh - 1 - call.pad_top, left = call.filter.kw - 1 - call.pad_left;
  run(call, {call.out, call.out_h, call.out_w}, {call.x, call.h, call.w}, filter_view(call.filter, top, left, true),
      Activation::none, {}, device);
}

}  // namespace ffnet
