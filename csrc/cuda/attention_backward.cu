// Backward of the FFNified attention on tensor cores, for 16-bit planes and filters of up to 7x9, all of it in one
// pass: z = conv(query, key) + b1 again, the gradient of the hidden map act(z) = scale · conv'(gradient, value), and of
// that times act'(z) the gradient of the query. The gradients of both filters are summed on the way. The hidden map and
// its gradient live in registers, rounded to the storage type. Query and gradient are read once, the query's gradient
// is written once.
#include "attention_backward.h"

namespace ffnet {
namespace {

// High filters, the sums of three convolutions and those of two filters' gradients need more registers than a thread
// has: then the filters are read from shared memory.
template <int K>
constexpr bool kSharesFilters = K == 7;
template <int K>  // its windows are rows of windows
constexpr int kRingBytes = StreamRing<K, Windows::any, AnyRows>::kBytes;
template <int K>
constexpr int kWarpBytes = 2 * kRingBytes<K> + (kSharesFilters<K> ? 3 * kSharedFilterBytes<K> : 0);

template <class T, int K, Windows WINDOWS, class ROWS>
FFNET_KERNEL(kStreamWarps* kWarp, K == 3 ? 3 - (ROWS::kKnown ? FFNET_FEWER_BLOCKS : 0) : 2)
attention_backward_kernel(FFNET_PARAMETER AttentionBackwardParameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = has_neighbours(WINDOWS);
  const StreamTask task(p, kWarpBytes<K>);
  if (!task.exists(p)) return;
  const int lane = task.lane;
  const int64_t channel = task.channel;

  const Neighbours neighbours(p.shape, lane);
  const auto around = [&](RowPair row) { return HALO ? neighbours.of(row) : RowPair{}; };
  const float key_bias = p.key_bias ? to_float(T{p.key_bias[channel]}) : 0.0f;
  const float scale = p.scale ? to_float(T{p.scale[channel]}) : 1.0f;

  const Source sources[2] = {{p.query, channel, p.rows.first}, {p.gradient, channel, p.rows.first + p.gradient_ahead}};
  RowStream<K, WINDOWS, 2, ROWS> stream(p.shape, sources, ROWS::template turns<K>(p.rows), task);
  // Loaded after the first rows have been requested, so that both are in flight.
  const auto filter = [&](const FilterView& view, [[maybe_unused]] int index) {
    if constexpr (kSharesFilters<K>)
      return SharedFilter<K, HALO>(view, channel, lane,
                                   task.memory + 2 * kRingBytes<K> + index * kSharedFilterBytes<K>);
    else
      return BandedFilter<K, HALO>(view, channel, lane);
  };
  const auto key = filter(p.key, 0), value = filter(p.value_mirrored, 1), key_mirrored = filter(p.key_mirrored, 2);
  const LaneWindows lane_windows(p.shape, lane);
  const bool lends = !ROWS::kKnown && lane_windows.lend();
  const auto owned = [&](RowPair row) { return lends ? RowPair{} : row; };
  FilterSums<T, K, HALO> key_grad, value_grad;
  MapSums<T> bias_grads;
  for (int panel = task.begin; panel < task.end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    stream.begin_panel(windows);
    const RowWriter<WINDOWS> query_grad(p.shape, p.query_grad, windows, lends, channel, lane);
    const InsideMask inside(p.query.h, p.query.w, windows, lane);
    RollingSums<T, K, HALO> middle(key_bias), middle_grad(0.0f), result(0.0f);
    key_grad.open_panel(), value_grad.open_panel();

    ROWS::template for_each_turn<K, 2, 0>(p.rows, [&](const auto turn) FFNET_INLINE_LAMBDA {
      using Turn = std::decay_t<decltype(turn)>;
      stream.advance(turn);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        RowPair own_grad{}, own_gradient{};  // transposed rows, whose sums are the biases' gradients
        if (turn.input(i)) {
          const RowPair query = stream.row(0, i, 0), gradient = stream.row(1, i, 0);
          middle.add(i, key, query, around(query));
          middle_grad.add(i, value, gradient, around(gradient));
          key_grad.keep(i, owned(query)), value_grad.keep(i, owned(gradient));
          const int row = turn.input_row(i) + p.gradient_ahead;
          if (Turn::kInside || static_cast<unsigned>(row) < static_cast<unsigned>(p.shape.segment_rows))
            own_gradient = value_grad.kept(i);
        } else if (!Turn::kInside) {
          key_grad.keep_nothing(i), value_grad.keep_nothing(i);
        }
        if (turn.middle(i)) {
          const int row = turn.middle_row(i);
          const float (&sum)[4] = middle.complete(i), (&sum_grad)[4] = middle_grad.complete(i);
          float grad[4], active[4];
          if constexpr (ROWS::kKnown)
            derivative_gelu(p.activation, sum, grad, active);
          else
            derivative_fast(p.activation, sum, grad, active);
#pragma unroll
          for (int e = 0; e < 4; ++e) grad[e] *= scale * sum_grad[e];
          const RowPair fresh_grad =
              inside.template apply<Turn::kInside>(row, {{pack<T>(grad[0], grad[1]), pack<T>(grad[2], grad[3])}});
          const RowPair outer_grad = around(fresh_grad);
          result.add(i, key_mirrored, fresh_grad, outer_grad);
          if (turn.owns(i)) {
            const RowPair fresh = inside.template apply<Turn::kInside>(
                row, {{pack<T>(active[0], active[1]), pack<T>(active[2], active[3])}});
            own_grad = transposed(owned(fresh_grad));
            key_grad.add(i, turn, {own_grad, HALO ? transposed(outer_grad) : RowPair{}});
            value_grad.add(i, turn, {transposed(fresh), HALO ? transposed(around(fresh)) : RowPair{}});
          }
        }
        if (turn.input(i) || turn.middle(i)) bias_grads.add(own_grad, own_gradient);
        if (turn.output(i)) {
          const float (&sum)[4] = result.complete(i);
          query_grad.template write<Turn::kInside>(turn.output_row(i),
                                                   {{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])}});
        }
      }
    });
  }
  stream.close();
  sync_warp();  // the ring is free
  store_attention_gradients(p, task, key_grad, value_grad, bias_grads);
#endif
}

AttentionBackwardParameters parameters(const Attention& call, const AttentionGradients& gradients,
                                       const Device& device) {
  // Rows above and below its own that a result of each convolution reads.
  const int key_top = (call.key.kh - 1) / 2, key_bottom = call.key.kh / 2;
  const int value_top = call.value.kh / 2, value_bottom = (call.value.kh - 1) / 2;  // mirrored
  const int ahead = value_bottom - key_bottom;
  AttentionBackwardParameters p{};
  p.shape = stream_shape(call.n, call.h, call.w, call.channels, call.key.kh + call.value.kh - 2, device);
  p.rows = stream_rows(p.shape, call.h, call.h, std::max(key_top, value_top + ahead), key_bottom, key_bottom, key_top);
  if (p.shape.segments == 1 && ahead != 0) {  // the later of the two maps begins at its first row, too
    const int earlier = std::max(ahead, 0);
    p.rows.first -= earlier;
    p.rows.input_end += earlier + std::max(-ahead, 0);
    p.rows.middle_begin += earlier, p.rows.middle_end += earlier, p.rows.output_begin += earlier,
        p.rows.steps += earlier;
  }
  p.gradient_ahead = ahead;
  p.channels = call.channels;
  p.query = plane(call.query, call.h, call.w), p.gradient = plane(call.out, call.h, call.w);
  p.query_grad = plane(gradients.query_grad, call.h, call.w);
  p.key = filter_view(call.key, key_top, (call.key.kw - 1) / 2);
  p.value_mirrored = filter_view(call.value, value_top, call.value.kw / 2, true);
  p.key_mirrored = filter_view(call.key, key_bottom, call.key.kw / 2, true);
  p.key_bias = static_cast<const uint16_t*>(call.key.bias);
  p.scale = static_cast<const uint16_t*>(call.scale);
  p.activation = activation_parameters(call.activation);
  p.key_partials = gradients.key_partials, p.value_partials = gradients.value_partials;
  return p;
}

// Chooses the splits, and where `start` is true starts the kernel.
void run(const Attention& call, AttentionBackwardParameters& p, bool start, const Device& device) {
  const int filter_rows = std::max(call.key.kh, call.value.kh), known_rows = 2 * lag_of_known_rows(filter_rows) + 1;
  const bool known = call.activation == Activation::gelu && call.key.kh == known_rows && call.value.kh == known_rows &&
                     p.shape.lead == 0;
  const KernelChoice choice{call.dtype, filter_rows, known,
                            std::min({p.query.unit, p.gradient.unit, p.query_grad.unit})};
  if (attention_backward_of_planes(choice, p, start, device)) return;
  with_stream_kernel(choice, p.shape, [&](auto element, auto k, auto windows, auto rows) {
    // Fewer kernels to compile, and none that spills: low planes under high filters have one of their own.
    constexpr bool kNarrow = windows() == Windows::any || linear_width(windows()) > 0;
    constexpr Windows kWindows = kNarrow ? Windows::any : Windows::aligned;
    using Unknown = std::conditional_t<k() == 7, AskedRows, AnyRows>;
    using Rows = std::conditional_t<k() == 7 || kNarrow, Unknown, decltype(rows)>;
    const auto kernel = attention_backward_kernel<decltype(element), k(), kWindows, Rows>;
    const Grid grid = plan_stream<k()>(kernel, p, kWarpBytes<k()>, device);
    if (start) launch("attention_backward_kernel", kernel, grid, p, device.stream);
  });
}

}  // namespace

int64_t attention_backward_splits(const Attention& call, const AttentionGradients& gradients, const Device& device) {
  AttentionBackwardParameters p = parameters(call, gradients, device);
  run(call, p, false, device);
  return p.split.splits;
}

void attention_backward(const Attention& call, const AttentionGradients& gradients, const Device& device) {
  AttentionBackwardParameters p = parameters(call, gradients, device);
  run(call, p, true, device);
}

}  // namespace ffnet
