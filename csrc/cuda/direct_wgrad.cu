// Gradients of a depthwise filter and its bias on CUDA cores, in two stages and with no atomics: sums of a fixed order.
//
//   filter_grad[o, ky, kx] = sum over n, i, j of grad[n, o, i, j] * x[n, o / multiplier, i * stride - pad + k, ...]
//
// A block takes a tile of taps, a set of channels and a share of the positions (one column of a strip each). A thread
// keeps the tile's sums of its channels in registers while it goes over positions: it reads the strip of the gradient
// once, and for each tap column a column of the input.
#include "direct.h"
#include "storage.h"

namespace ffnet {
namespace {

struct WgradCall {
  ByteMap x, grad;
  float* sums;  // [share of positions][output][tap], the bias behind the taps
  int outputs, multiplier, h, w, out_h, kh, kw, stride_w, pad_top, pad_left;
  int tiles_x, tiles;
  Tiling tiling;
};

// Columns of a tile of taps: as many sums as registers allow.
template <int PACK, int KH>
constexpr int kTileColumns = KH == 3     ? 3
                             : PACK == 2 ? 2
                                         : 4;
template <int KH>
constexpr int kTileRows = KH ? KH : kFilterRows;

// sum[y][x] += grad's strip * a column of the input, for the rows of the gradient that exist.
template <bool WHOLE, int V, int SH, int K, int COLUMNS, int ROWS>
FFNET_DEVICE void add_column(float (&sum)[K][COLUMNS][V], int x, const float (&grad)[kStripRows][V],
                             const float (&input)[ROWS][V], int rows) {
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
    if (!WHOLE && r >= rows) break;  // not a product with zero: the input may be infinite
#pragma unroll
    for (int y = 0; y < K; ++y)
#pragma unroll
      for (int v = 0; v < V; ++v) sum[y][x][v] = fmaf(grad[r][v], input[r * SH + y][v], sum[y][x][v]);
  }
}

// KH: rows of the filter, 0: any number. SH: vertical stride.
template <class T, int V, int KH, int SH>
FFNET_KERNEL(kDirectThreads, 2)
direct_wgrad_kernel(FFNET_PARAMETER WgradCall p) {
  constexpr int K = kTileRows<KH>, COLUMNS = kTileColumns<V, KH>, ROWS = (kStripRows - 1) * SH + K;
  const Tiling& tiling = p.tiling;
  // Blocks that read the same share of both maps are consecutive.
  const int channel_block = block_x() % tiling.channel_blocks, rest = block_x() / tiling.channel_blocks;
  const int tile = rest % p.tiles, share = rest / p.tiles;
  const int ky = tile / p.tiles_x * K, kx = tile % p.tiles_x * COLUMNS;
  const int lanes = 1 << tiling.log_channels, lane = lane_channel(tiling);
  const int first_output = channel_block * lanes * V, output = first_output + lane * V;

  float sum[K][COLUMNS][V], bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    bias[v] = 0.0f;
#pragma unroll
    for (int y = 0; y < K; ++y)
#pragma unroll
      for (int x = 0; x < COLUMNS; ++x) sum[y][x][v] = 0.0f;
  }

  Cursor at(tiling, share, lane_position(tiling));
#pragma unroll 1
  for (int iteration = 0; iteration < tiling.iterations; ++iteration, at.advance(tiling)) {
    if (at.image >= tiling.images || output >= p.outputs) break;
    const int row = at.strip * kStripRows, rows = static_cast<int>(smaller(kStripRows, p.out_h - row));
    float grad[kStripRows][V];
    fill_zero(grad);
    read_column<T>(grad, p.grad.at(at.image, output, row, at.column), p.grad.h, (1u << rows) - 1);
#pragma unroll
    for (int r = 0; r < kStripRows; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) bias[v] += grad[r][v];

    const int first_row = row * SH + ky - p.pad_top, first_column = at.column * p.stride_w + kx - p.pad_left;
    const char* from = p.x.at(at.image, output / p.multiplier, first_row, first_column);
    const uint32_t inside = rows_inside(first_row, ROWS, p.h);
    float input[ROWS][V];
    fill_zero(input);
#pragma unroll
    for (int x = 0; x < COLUMNS; ++x) {
      if (static_cast<unsigned>(first_column + x) >= static_cast<unsigned>(p.w)) continue;
      read_column<T>(input, from + x * p.x.w, p.x.h, inside);
      if (rows == kStripRows)
        add_column<true, V, SH>(sum, x, grad, input, rows);
      else
        add_column<false, V, SH>(sum, x, grad, input, rows);
    }
  }

  // One row of shared memory for each tap (and bias) of a lane: [position][lane's channel].
  constexpr int TAPS = K * COLUMNS * V;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int threads = block_threads(), slot = lane_position(tiling) * lanes + lane;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    shared[(TAPS + v) * threads + slot] = bias[v];
#pragma unroll
    for (int y = 0; y < K; ++y)
#pragma unroll
      for (int x = 0; x < COLUMNS; ++x) shared[((y * COLUMNS + x) * V + v) * threads + slot] = sum[y][x][v];
  }
  sync_block();
  for (int log_half = tiling.log_positions - 1; log_half >= 0; --log_half) {
    const int log_length = log_half + tiling.log_channels, length = 1 << log_length;
    for (int i = thread_index(); i < (TAPS + V) << log_length; i += threads) {
      float* entry = shared + (i >> log_length) * threads + (i & (length - 1));
      *entry += entry[length];
    }
    sync_block();
  }
  const int filter_taps = p.kh * p.kw;
  for (int i = thread_index(); i < (TAPS + V) << tiling.log_channels; i += threads) {
    const int entry = i >> tiling.log_channels, l = i & (lanes - 1);
    const int v = entry % V, y = entry / V / COLUMNS, x = entry / V % COLUMNS, o = first_output + l * V + v;
    const bool is_bias = entry >= TAPS;
    if (o >= p.outputs || (is_bias ? tile > 0 : ky + y >= p.kh || kx + x >= p.kw)) continue;
    const int tap = is_bias ? filter_taps : (ky + y) * p.kw + kx + x;
    p.sums[(static_cast<int64_t>(share) * p.outputs + o) * (filter_taps + 1) + tap] = shared[entry * threads + l];
  }
}

int template_height(const Convolution& call) {
  return call.stride_h == 1 && (call.filter.kh == 3 || call.filter.kh == 7) ? call.filter.kh : 0;
}

int64_t tiles_across(const Convolution& call, int pack) {
  const int columns = pack == 2 ? kTileColumns<2, 0> : kTileColumns<1, 0>;
  return ceil_divide(call.filter.kw, template_height(call) == 3 ? kTileColumns<1, 3> : columns);
}

int64_t tiles_down(const Convolution& call) {
  const int kh = template_height(call);
  return kh ? 1 : ceil_divide(call.filter.kh, kTileRows<0>);
}

bool channels_in_pairs(const Convolution& call) {
  const int64_t outputs = call.channels * call.multiplier;
  return call.dtype != Dtype::float32 && call.multiplier == 1 && pairs_of_channels(call.x, outputs) &&
         pairs_of_channels(call.out, outputs);
}

Tiling wgrad_tiling(const Convolution& call, int pack, const Device& device) {
  return make_tiling({call.n, call.channels * call.multiplier, call.out_h, call.out_w, 1, pack,
                      pack * (call.dtype == Dtype::float32 ? 4 : 2), channels_innermost(call.x, call.out),
                      tiles_across(call, pack) * tiles_down(call), 6, 2, 128},
                     device);
}

template <class T, int V, int KH, int SH>
void start(const Convolution& call, WgradCall& p, const Device& device) {
  p.tiling = wgrad_tiling(call, V, device);
  Grid grid;
  grid.x = p.tiling.position_blocks * p.tiles * p.tiling.channel_blocks;
  grid.threads = p.tiling.threads();
  grid.shared_bytes = static_cast<size_t>(kTileRows<KH> * kTileColumns<V, KH> + 1) * V * grid.threads * sizeof(float);
  launch("direct_wgrad_kernel", direct_wgrad_kernel<T, V, KH, SH>, grid, p, device.stream);
}

template <class T, int V>
void start_for_filter(const Convolution& call, float* partials, const Device& device) {
  WgradCall p{};
  p.x = in_bytes(call.x, call.dtype), p.grad = in_bytes(call.out, call.dtype), p.sums = partials;
  p.outputs = static_cast<int>(call.channels * call.multiplier), p.multiplier = call.multiplier;
  p.h = call.h, p.w = call.w, p.out_h = call.out_h, p.kh = call.filter.kh, p.kw = call.filter.kw;
  p.stride_w = call.stride_w, p.pad_top = call.pad_top, p.pad_left = call.pad_left;
  p.tiles_x = static_cast<int>(tiles_across(call, V));
  p.tiles = static_cast<int>(p.tiles_x * tiles_down(call));
  const int kh = template_height(call);
  if (call.stride_h == 2)
    start<T, V, 0, 2>(call, p, device);
  else if (kh == 3)
    start<T, V, 3, 1>(call, p, device);
  else if (kh == 7)
    start<T, V, 7, 1>(call, p, device);
  else
    start<T, V, 0, 1>(call, p, device);
}

}  // namespace

int64_t direct_wgrad_splits(const Convolution& call, const Device& device) {
  return wgrad_tiling(call, channels_in_pairs(call) ? 2 : 1, device).position_blocks;
}

void direct_wgrad(const Convolution& call, float* partials, const Device& device) {
  if (call.dtype == Dtype::float32) return start_for_filter<float, 1>(call, partials, device);
  with_16_bit_storage(call.dtype, [&](auto element) {
    using T = decltype(element);
    channels_in_pairs(call) ? start_for_filter<T, 2>(call, partials, device)
                            : start_for_filter<T, 1>(call, partials, device);
  });
}

}  // namespace ffnet
