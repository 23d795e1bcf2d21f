// Depthwise convolution with stride 1 on tensor cores, for 16-bit planes and filters of up to 7x9: panels of windows
// stream down their planes (stream.h). Each map is read and written once.
#include "activation.h"
#include "stream.h"

namespace ffnet {
namespace {

// What becomes of a sum z: act(z), or gradient · act'(z).
enum class Epilogue { activate, activation_backward };

struct Parameters {
  PanelShape shape;
  StreamRows rows;
  StreamSplit split;
  int64_t channels;  // of the result
  int multiplier;
  Plane x, gradient, out;
  FilterView filter;
  const uint16_t* bias;
  ActivationParameters activation;
};

template <class T, int K, Windows WINDOWS, Epilogue EPILOGUE>
FFNET_KERNEL(kStreamWarps* kWarp, 4)
depthwise_stream_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = WINDOWS != Windows::alone, ALIGNED = WINDOWS != Windows::any;
  constexpr bool kBackward = EPILOGUE == Epilogue::activation_backward;
  constexpr int kMaps = kBackward ? 2 : 1;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t task = int64_t{block_x()} * kStreamWarps + warp, channel = task % p.channels;
  const int split = static_cast<int>(task / p.channels);
  if (split >= p.split.splits) return;
  unsigned char* memory = shared_memory() + warp * kMaps * kRingBytes<K>;

  const BandedFilter<K, HALO> filter(p.filter, channel, lane);
  const Neighbours neighbours(p.shape, lane);
  const float bias = p.bias ? to_float(T{p.bias[channel]}) : 0.0f;

  const int begin = split * p.split.panels,
            end = static_cast<int>(smaller(p.shape.panels, begin + int64_t{p.split.panels}));
  const int turns = (p.rows.steps + K - 1) / K;
  const Source sources[2] = {{p.x, channel / p.multiplier, p.rows.first},
                             {p.gradient, channel, p.rows.first - p.rows.lag_output}};
  RowStream<K, ALIGNED, kMaps> stream(p.shape, sources, turns, begin, end, memory, lane);
  const LaneWindows lane_windows(p.shape, lane);
  for (int panel = begin; panel < end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    const RowWriter<ALIGNED> writer(p.shape, p.out, windows, lane_windows.lend(), channel, lane);
    RollingSums<T, K, HALO> sums(bias);

    for (int turn = 0; turn < turns; ++turn) {
      stream.advance();
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const int step = turn * K + i;  // those after the last do nothing
        if (step < p.rows.input_end) {
          const RowPair own = stream.row(0, i);
          sums.add(i, filter, own, HALO ? neighbours.of(own) : RowPair{});
        }
        if (step >= p.rows.output_begin && step < p.rows.steps) {
          const float (&sum)[4] = sums.complete(i);
          float out[4];
          if constexpr (kBackward) {
            float unused[4];
            derivative_fast(p.activation, sum, out, unused);
            const RowPair gradient = stream.row(1, i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              out[2 * half] *= low_float<T>(gradient.half[half]);
              out[2 * half + 1] *= high_float<T>(gradient.half[half]);
            }
          } else {
            activate_fast(p.activation, sum, out);
          }
          writer.write(step - p.rows.output_begin, {{pack<T>(out[0], out[1]), pack<T>(out[2], out[3])}});
        }
      }
    }
  }
  stream.close();
#endif
}

struct PlanarMap {
  Map map;
  int h, w;
};

template <Epilogue EPILOGUE>
void run(const Convolution& call, const PlanarMap& x, const PlanarMap& out, const FilterView& filter,
         Activation activation, const Device& device) {
  Parameters p{};
  p.multiplier = call.multiplier;
  p.channels = call.channels * call.multiplier;
  p.shape = stream_shape(call.n, out.h, std::max(out.w, x.w), p.channels, device);
  p.rows = stream_rows(p.shape, x.h, 0, filter.pad_top, filter.kh - 1 - filter.pad_top, 0, 0);
  p.split = stream_split(p.shape, p.channels, device);
  p.x = plane(x.map, x.h, x.w), p.out = plane(out.map, out.h, out.w), p.gradient = plane(call.gradient, out.h, out.w);
  p.filter = filter;
  p.bias = filter.mirrored ? nullptr : static_cast<const uint16_t*>(call.filter.bias);
  p.activation = activation_parameters(activation);
  constexpr bool kBackward = EPILOGUE == Epilogue::activation_backward;
  const bool aligned = p.x.unit == 16 && p.out.unit == 16 && (!kBackward || p.gradient.unit == 16);
  with_stream_kernel(call.dtype, filter.kh, p.shape, aligned, [&](auto element, auto k, auto windows) {
    // The backward kernel is compiled with neighbours only: fewer kernels.
    constexpr Windows kWindows = kBackward && windows() == Windows::alone ? Windows::aligned : windows();
    launch("depthwise_stream_kernel", depthwise_stream_kernel<decltype(element), k(), kWindows, EPILOGUE>,
           stream_grid<k()>(p.split, p.channels, kBackward ? 2 : 1), p, device.stream);
  });
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
  if (call.gradient.data)
    run<Epilogue::activation_backward>(call, x, out, filter, call.activation, device);
  else
    run<Epilogue::activate>(call, x, out, filter, call.activation, device);
}

void stream_dgrad(const Convolution& call, const Device& device) {
  const int top = call.filter.kh - 1 - call.pad_top, left = call.filter.kw - 1 - call.pad_left;
  run<Epilogue::activate>(call, {call.out, call.out_h, call.out_w}, {call.x, call.h, call.w},
                          filter_view(call.filter, top, left, true), Activation::none, device);
}

}  // namespace ffnet
