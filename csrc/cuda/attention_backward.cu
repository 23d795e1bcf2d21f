// Backward of the FFNified attention on tensor cores, for 16-bit planes and filters of up to 7x9. Three convolutions in
// one pass: z = conv(query, key) + b1 again, the gradient of the hidden map = scale · conv'(gradient, value), and of
// that times act'(z) the gradient of the query. Written besides it: act(z) and its gradient, which the filters'
// gradients (wgrad.cu) are taken of.
#include "activation.h"
#include "stream.h"

namespace ffnet {
namespace {

struct Parameters {
  PanelShape shape;
  StreamRows rows;
  int gradient_first;  // row of the gradient at step 0
  StreamSplit split;
  int64_t channels;
  Plane query, gradient, query_grad, hidden, hidden_grad;
  FilterView key, value_mirrored, key_mirrored;
  const uint16_t *key_bias, *scale;
  ActivationParameters activation;
};

template <class T, int K, Windows WINDOWS>
FFNET_KERNEL(kStreamWarps* kWarp, 2)
attention_backward_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t task = int64_t{block_x()} * kStreamWarps + warp, channel = task % p.channels;
  const int split = static_cast<int>(task / p.channels);
  if (split >= p.split.splits) return;
  unsigned char* memory = shared_memory() + warp * 2 * kRingBytes<K>;

  const BandedFilter<K, true> key(p.key, channel, lane), value(p.value_mirrored, channel, lane);
  const BandedFilter<K, true> key_mirrored(p.key_mirrored, channel, lane);
  const Neighbours neighbours(p.shape, lane);
  const float key_bias = p.key_bias ? to_float(T{p.key_bias[channel]}) : 0.0f;
  const float scale = p.scale ? to_float(T{p.scale[channel]}) : 1.0f;

  const int begin = split * p.split.panels,
            end = static_cast<int>(smaller(p.shape.panels, begin + int64_t{p.split.panels}));
  const Source sources[2] = {{p.query, channel, p.rows.first}, {p.gradient, channel, p.gradient_first}};
  RowStream<K, WINDOWS, 2> stream(p.shape, sources, AnyRows::turns<K>(p.rows), begin, end, memory, lane);
  const LaneWindows lane_windows(p.shape, lane);
  for (int panel = begin; panel < end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    const bool lends = lane_windows.lend();
    const RowWriter<WINDOWS> query_grad(p.shape, p.query_grad, windows, lends, channel, lane);
    const RowWriter<WINDOWS> hidden(p.shape, p.hidden, windows, lends, channel, lane);
    const RowWriter<WINDOWS> hidden_grad(p.shape, p.hidden_grad, windows, lends, channel, lane);
    const InsideMask inside(p.query.h, p.query.w, windows, lane);
    RollingSums<T, K, true> middle(key_bias), middle_grad(0.0f), result(0.0f);

    AnyRows::for_each_turn<K, 2>(p.rows, [&](const auto turn) FFNET_INLINE_LAMBDA {
      stream.advance(turn);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (turn.input(i)) {
          const RowPair query = stream.row(0, i), gradient = stream.row(1, i);
          middle.add(i, key, query, neighbours.of(query));
          middle_grad.add(i, value, gradient, neighbours.of(gradient));
        }
        if (turn.middle(i)) {
          const int row = turn.middle_row(i);
          const float (&sum)[4] = middle.complete(i), (&sum_grad)[4] = middle_grad.complete(i);
          float grad[4], active[4];
          derivative_fast(p.activation, sum, grad, active);
#pragma unroll
          for (int e = 0; e < 4; ++e) grad[e] *= scale * sum_grad[e];
          hidden.write(row, {{pack<T>(active[0], active[1]), pack<T>(active[2], active[3])}});
          const RowPair own = inside.apply(row, {{pack<T>(grad[0], grad[1]), pack<T>(grad[2], grad[3])}});
          hidden_grad.write(row, own);
          result.add(i, key_mirrored, own, neighbours.of(own));
        }
        if (turn.output(i)) {
          const float (&sum)[4] = result.complete(i);
          query_grad.write(turn.output_row(i), {{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])}});
        }
      }
    });
  }
  stream.close();
#endif
}

}  // namespace

void attention_backward(const Attention& call, const AttentionGradients& gradients, const Device& device) {
  // Rows above and below its own that a result of each convolution reads.
  const int key_top = (call.key.kh - 1) / 2, key_bottom = call.key.kh / 2;
  const int value_top = call.value.kh / 2, value_bottom = (call.value.kh - 1) / 2;  // mirrored
  const int ahead = value_bottom - key_bottom;  // rows by which the gradient is ahead of the query
  Parameters p{};
  p.shape = stream_shape(call.n, call.h, call.w, call.channels, call.key.kh + call.value.kh - 2, device);
  p.rows = stream_rows(p.shape, call.h, call.h, std::max(key_top, value_top + ahead), key_bottom, key_bottom, key_top);
  if (p.shape.segments == 1 && ahead != 0) {  // the later of the two maps begins at its first row, too
    const int earlier = std::max(ahead, 0);
    p.rows.first -= earlier;
    p.rows.input_end += earlier + std::max(-ahead, 0);
    p.rows.middle_begin += earlier, p.rows.middle_end += earlier, p.rows.output_begin += earlier,
        p.rows.steps += earlier;
  }
  p.gradient_first = p.rows.first + ahead;
  p.channels = call.channels;
  p.query = plane(call.query, call.h, call.w), p.gradient = plane(call.out, call.h, call.w);
  p.query_grad = plane(gradients.query_grad, call.h, call.w);
  p.hidden = plane(gradients.hidden, call.h, call.w), p.hidden_grad = plane(gradients.hidden_grad, call.h, call.w);
  p.key = filter_view(call.key, key_top, (call.key.kw - 1) / 2);
  p.value_mirrored = filter_view(call.value, value_top, call.value.kw / 2, true);
  p.key_mirrored = filter_view(call.key, key_bottom, call.key.kw / 2, true);
  p.key_bias = static_cast<const uint16_t*>(call.key.bias);
  p.scale = static_cast<const uint16_t*>(call.scale);
  p.activation = activation_parameters(call.activation);
  KernelChoice choice{call.dtype, std::max(call.key.kh, call.value.kh), false, 16};
  for (const Plane& plane : {p.query, p.gradient, p.query_grad, p.hidden, p.hidden_grad})
    choice.unit = std::min(choice.unit, plane.unit);
  with_stream_kernel(choice, p.shape, [&](auto element, auto k, auto windows, auto rows) {
    if constexpr (!decltype(rows)::kKnown) {
      // Fewer kernels to compile.
      constexpr Windows kWindows = windows() == Windows::alone ? Windows::aligned : windows();
      start_stream<k()>("attention_backward_kernel", attention_backward_kernel<decltype(element), k(), kWindows>, p, 2,
                        device);
    }
  });
}

}  // namespace ffnet
