// The FFNified attention on tensor cores: residual + scale · (conv(act(conv(query, key) + b1), value) + b2), for 16-bit
// planes and filters of up to 7x9. Each map is read and written once; the middle map lives in registers, rounded to the
// storage type as an operand of the second product.
#include "activation.h"
#include "stream.h"

namespace ffnet {
namespace {

struct Parameters {
  PanelShape shape;
  StreamRows rows;
  StreamSplit split;
  int64_t channels;
  Plane query, residual, out;
  FilterView key, value;
  const uint16_t *key_bias, *value_bias, *scale;
  ActivationParameters activation;
};

template <class T, int K, Windows WINDOWS>
FFNET_KERNEL(kStreamWarps* kWarp, 3)
attention_forward_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = WINDOWS != Windows::alone, ALIGNED = WINDOWS != Windows::any;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t task = int64_t{block_x()} * kStreamWarps + warp, channel = task % p.channels;
  const int split = static_cast<int>(task / p.channels);
  if (split >= p.split.splits) return;
  const bool has_residual = p.residual.data;
  unsigned char* memory = shared_memory() + warp * (has_residual ? 2 : 1) * kRingBytes<K>;

  const BandedFilter<K, HALO> key(p.key, channel, lane), value(p.value, channel, lane);
  const Neighbours neighbours(p.shape, lane);
  const float key_bias = p.key_bias ? to_float(T{p.key_bias[channel]}) : 0.0f;
  const float value_bias = p.value_bias ? to_float(T{p.value_bias[channel]}) : 0.0f;
  const float scale = p.scale ? to_float(T{p.scale[channel]}) : 1.0f;

  const int begin = split * p.split.panels,
            end = static_cast<int>(smaller(p.shape.panels, begin + int64_t{p.split.panels}));
  const int turns = (p.rows.steps + K - 1) / K;
  const Source sources[2] = {{p.query, channel, p.rows.first}, {p.residual, channel, p.rows.first - p.rows.lag_output}};
  RowStream<K, ALIGNED, 2> stream(p.shape, sources, turns, begin, end, memory, lane);
  const LaneWindows lane_windows(p.shape, lane);
  for (int panel = begin; panel < end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    const RowWriter<ALIGNED> writer(p.shape, p.out, windows, lane_windows.lend(), channel, lane);
    const InsideMask inside(p.query.h, p.query.w, windows, lane);
    RollingSums<T, K, HALO> middle(key_bias), result(value_bias);

    for (int turn = 0; turn < turns; ++turn) {
      stream.advance();
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const int step = turn * K + i;  // those after the last do nothing
        if (step < p.rows.input_end) {
          const RowPair own = stream.row(0, i);
          middle.add(i, key, own, HALO ? neighbours.of(own) : RowPair{});
        }
        if (step >= p.rows.middle_begin && step < p.rows.middle_end) {
          const float (&sum)[4] = middle.complete(i);
          float active[4];
          activate_fast(p.activation, sum, active);
          const RowPair own = inside.apply(p.rows.first + step - p.rows.lag_middle,
                                           {{pack<T>(active[0], active[1]), pack<T>(active[2], active[3])}});
          result.add(i, value, own, HALO ? neighbours.of(own) : RowPair{});
        }
        if (step >= p.rows.output_begin && step < p.rows.steps) {
          const float (&sum)[4] = result.complete(i);
          float out[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) out[e] = scale * sum[e];
          if (has_residual) {
            const RowPair r = stream.row(1, i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              out[2 * half] += low_float<T>(r.half[half]);
              out[2 * half + 1] += high_float<T>(r.half[half]);
            }
          }
          writer.write(step - p.rows.output_begin, {{pack<T>(out[0], out[1]), pack<T>(out[2], out[3])}});
        }
      }
    }
  }
  stream.close();
#endif
}

}  // namespace

bool attention_takes(const Attention& call) {
  const auto fits = [](const Filter& f) { return f.kh <= 7 && f.kw <= 9; };
  return call.dtype != Dtype::float32 && fits(call.key) && fits(call.value) && panels_take(call.n, call.h, call.w) &&
         planar(call.query, call.w) && planar(call.out, call.w) &&
         (!call.residual.data || planar(call.residual, call.w));
}

void attention_forward(const Attention& call, const Device& device) {
  Parameters p{};
  p.shape = stream_shape(call.n, call.h, call.w, call.channels, device);
  const int key_top = (call.key.kh - 1) / 2, value_top = (call.value.kh - 1) / 2;
  p.rows = stream_rows(p.shape, call.h, call.h, key_top, call.key.kh / 2, value_top, call.value.kh / 2);
  p.split = stream_split(p.shape, call.channels, device);
  p.channels = call.channels;
  p.query = plane(call.query, call.h, call.w);
  p.residual = plane(call.residual, call.h, call.w);
  p.out = plane(call.out, call.h, call.w);
  p.key = filter_view(call.key, key_top, (call.key.kw - 1) / 2);
  p.value = filter_view(call.value, value_top, (call.value.kw - 1) / 2);
  p.key_bias = static_cast<const uint16_t*>(call.key.bias);
  p.value_bias = static_cast<const uint16_t*>(call.value.bias);
  p.scale = static_cast<const uint16_t*>(call.scale);
  p.activation = activation_parameters(call.activation);
  const bool aligned = p.query.unit == 16 && p.out.unit == 16 && (!p.residual.data || p.residual.unit == 16);
  with_stream_kernel(
      call.dtype, std::max(call.key.kh, call.value.kh), p.shape, aligned, [&](auto element, auto k, auto windows) {
        launch("attention_forward_kernel", attention_forward_kernel<decltype(element), k(), windows()>,
               stream_grid<k()>(p.split, p.channels, p.residual.data ? 2 : 1), p, device.stream);
      });
}

}  // namespace ffnet
