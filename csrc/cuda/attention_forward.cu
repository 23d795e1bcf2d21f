// The FFNified attention on tensor cores: residual + scale · (conv(act(conv(query, key) + b1), value) + b2), for 16-bit
// planes and filters of up to 7x9. Each map is read and written once; the middle map lives in registers, rounded to the
// storage type as an operand of the second product.
#include "activation.h"
#include "stream.h"

namespace ffnet {
namespace {

struct Parameters : StreamParameters {
  Plane query, residual, out;
  FilterView key, value;
  const uint16_t *key_bias, *value_bias, *scale;
  ActivationParameters activation;
};

template <class T, int K, Windows WINDOWS, class ROWS>
// With three blocks, high planes with high filters would spill a few registers.
FFNET_KERNEL(kStreamWarps* kWarp, K == 7 && ROWS::kKnown && !ROWS::kPlane ? 2 : 3)
    attention_forward_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = has_neighbours(WINDOWS);
  const StreamTask task(p, 2 * StreamRing<K, WINDOWS, ROWS>::kBytes);
  if (!task.exists(p)) return;
  const int lane = task.lane;
  const int64_t channel = task.channel;

  const Neighbours neighbours(p.shape, lane);
  const float key_bias = p.key_bias ? to_float(T{p.key_bias[channel]}) : 0.0f;
  const float value_bias = p.value_bias ? to_float(T{p.value_bias[channel]}) : 0.0f;
  const float scale = p.scale ? to_float(T{p.scale[channel]}) : 1.0f;

  const Source sources[2] = {{p.query, channel, p.rows.first}, {p.residual, channel, p.rows.first - p.rows.lag_output}};
  RowStream<K, WINDOWS, 2, ROWS> stream(p.shape, sources, ROWS::template turns<K>(p.rows), task);
  // Loaded after the first rows have been requested, so that both are in flight.
  const BandedFilter<K, HALO> key(p.key, channel, lane), value(p.value, channel, lane);
  const LaneWindows lane_windows(p.shape, lane);
  for (int panel = task.begin; panel < task.end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    stream.begin_panel(windows);
    const RowWriter<WINDOWS> writer(p.shape, p.out, windows, lane_windows.lend(), channel, lane);
    const InsideMask inside(p.query.h, p.query.w, windows, lane);
    RollingSums<T, K, HALO> middle(key_bias), result(value_bias);

    ROWS::template for_each_turn<K, 2, K / 2 * 2>(p.rows, [&](const auto turn) FFNET_INLINE_LAMBDA {
      using Turn = std::decay_t<decltype(turn)>;
      stream.advance(turn);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (turn.input(i)) {
          const RowPair own = stream.row(0, i, turn.input_row(i));
          middle.add(i, key, own, HALO ? neighbours.of(own) : RowPair{});
        }
        if (turn.middle(i)) {
          const float (&sum)[4] = middle.complete(i);
          float active[4];
          if constexpr (ROWS::kKnown)
            activate_smooth(p.activation, sum, active);
          else
            activate_fast(p.activation, sum, active);
          const RowPair own = inside.template apply<Turn::kInside>(
              turn.middle_row(i), {{pack<T>(active[0], active[1]), pack<T>(active[2], active[3])}});
          result.add(i, value, own, HALO ? neighbours.of(own) : RowPair{});
        }
        if (turn.output(i)) {
          const float (&sum)[4] = result.complete(i);
          const RowPair residual = stream.row(1, i, turn.output_row(i));
          float out[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            out[2 * half] = scale * sum[2 * half] + low_float<T>(residual.half[half]);
            out[2 * half + 1] = scale * sum[2 * half + 1] + high_float<T>(residual.half[half]);
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

}  // namespace

bool attention_takes(const Attention& call) {
  const auto fits = [](const Filter& f) { return f.kh <= 7 && f.kw <= 9; };
  return call.dtype != Dtype::float32 && fits(call.key) && fits(call.value) && panels_take(call.n, call.h, call.w) &&
         planar(call.query, call.w) && planar(call.out, call.w) &&
         (!call.residual.data || planar(call.residual, call.w));
}

void attention_forward(const Attention& call, const Device& device) {
  Parameters p{};
  p.shape = stream_shape(call.n, call.h, call.w, call.channels, call.key.kh + call.value.kh - 2, device);
  const int key_top = (call.key.kh - 1) / 2, value_top = (call.value.kh - 1) / 2;
  p.rows = stream_rows(p.shape, call.h, call.h, key_top, call.key.kh / 2, value_top, call.value.kh / 2);
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
  if (!call.residual.data) p.residual = {p.query.data, 0, 0, 0, 0, 16};  // no rows: zeros are added
  const int filter_rows = std::max(call.key.kh, call.value.kh), lag = lag_of_known_rows(filter_rows);
  const KernelChoice choice{call.dtype, filter_rows,
                            is_smooth(call.activation) && call.key.kh / 2 == lag && call.value.kh / 2 == lag,
                            std::min({p.query.unit, p.out.unit, p.residual.unit})};
  with_stream_kernel(choice, p.shape, [&](auto element, auto k, auto windows, auto rows) {
    start_stream<k()>("attention_forward_kernel",
                      attention_forward_kernel<decltype(element), k(), windows(), decltype(rows)>, p,
                      2 * StreamRing<k(), windows(), decltype(rows)>::kBytes, device);
  });
}

}  // namespace ffnet
