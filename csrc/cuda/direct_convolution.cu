// Depthwise convolution on CUDA cores: any layout, dtype, filter and architecture. The gradient of the input is the
// same convolution, of the result's gradient with the mirrored filter.
//
// A thread computes a strip of two columns. For each column of the map that they depend on, it reads the strip's rows
// once, into registers, and multiplies them with a column of the filter for each of the two. Filters are in shared
// memory as [kx][lane's channel][channel][ky]; wide and high ones pass through it in stages.
#include "activation.h"
#include "direct.h"
#include "storage.h"

namespace ffnet {
namespace {

constexpr int kColumns = 2;        // of a position
constexpr int kStageColumns = 16;  // of a filter in shared memory

struct DirectCall {
  ByteMap x, out, gradient;  // gradient: see Convolution
  Filter filter;
  int outputs, multiplier, sources;  // output o sums up `sources` channels of x and filters
  int h, w, out_h, out_w, stride_w, pad_top, pad_left;
  ActivationParameters activation;
  Tiling tiling;
};

// Floats between the filter columns of two channels: 16-byte reads of neighbouring lanes share no bank.
template <int ROWS>
constexpr int kFilterPitch = ROWS <= 4 ? 4 : 12;

struct alignas(16) Float4 {
  float value[4];
};

template <int N>
FFNET_DEVICE void read_filter_column(float (&column)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Float4 part = *reinterpret_cast<const Float4*>(from + i);
#pragma unroll
    for (int j = i; j < N && j < i + 4; ++j) column[j] = part.value[j - i];
  }
}

template <class T>
FFNET_DEVICE float activate(const ActivationParameters& activation, float x) {
  if constexpr (sizeof(T) == 4)
    return activate_exact(activation.kind, x);
  else
    return activate_fast(activation, x);
}

template <class T>
FFNET_DEVICE float derivative(const ActivationParameters& activation, float x) {
  if constexpr (sizeof(T) == 4) return derivative_exact(activation.kind, x);
  float value;
  return derivative_fast(activation, x, value);
}

// Copies rows x columns of the filters of the block's outputs, from (ky, kx) on, to shared memory.
template <class T, int V, int PITCH>
FFNET_DEVICE void stage_filter(float* weights, const DirectCall& p, int first_output, int source, int ky, int kx,
                               int rows, int columns) {
  const int log_outputs = p.tiling.log_channels + V - 1, lanes = 1 << p.tiling.log_channels;
  const int c = thread_index() & ((1 << log_outputs) - 1), output = first_output + c;
  if (output >= p.outputs) return;
  const int64_t index = static_cast<int64_t>(output) * p.sources + source;
  const T* filter = static_cast<const T*>(p.filter.data) + index * p.filter.output;
  float* to = weights + (c % V * lanes + c / V) * PITCH;
  for (int tap = thread_index() >> log_outputs; tap < rows * columns; tap += block_threads() >> log_outputs) {
    const int y = static_cast<unsigned>(tap) / static_cast<unsigned>(columns), x = tap - y * columns;
    to[x * lanes * V * PITCH + y] = to_float(filter[(ky + y) * p.filter.y + (kx + x) * p.filter.x]);
  }
}

// KH: rows of the filter, 0: any number. SH: vertical stride.
template <class T, int V, int KH, int SH>
FFNET_KERNEL(kDirectThreads, 2)
direct_kernel(FFNET_PARAMETER DirectCall p) {
  constexpr int K = KH ? KH : kFilterRows, PITCH = kFilterPitch<K>, ROWS = (kStripRows - 1) * SH + K;
  float* weights = reinterpret_cast<float*>(shared_memory());
  const Tiling& tiling = p.tiling;
  // Consecutive blocks share pages of memory: channels of a position, or positions of a channel.
  const int channel_block = tiling.channels_innermost ? block_x() % tiling.channel_blocks
                                                      : static_cast<int>(block_x() / tiling.position_blocks);
  const int64_t position_block =
      tiling.channels_innermost ? block_x() / tiling.channel_blocks : block_x() % tiling.position_blocks;
  const int lanes = 1 << tiling.log_channels, lane = lane_channel(tiling);
  const int first_output = channel_block * lanes * V, output = first_output + lane * V;
  const bool one_stage = p.sources == 1 && p.filter.kh <= K && p.filter.kw <= kStageColumns;

  const T* bias_from = static_cast<const T*>(p.filter.bias);
  float bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = bias_from && output + v < p.outputs ? to_float(bias_from[output + v]) : 0.0f;

  Cursor at(tiling, position_block, lane_position(tiling));
#pragma unroll 1
  for (int iteration = 0; iteration < tiling.iterations; ++iteration, at.advance(tiling)) {
    const bool active = at.image < tiling.images && output < p.outputs;
    const int row = at.strip * kStripRows, column = at.column * kColumns;
    float sum[kStripRows][kColumns][V];
#pragma unroll
    for (int r = 0; r < kStripRows; ++r)
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[r][q][v] = bias[v];

#pragma unroll 1
    for (int source = 0; source < p.sources; ++source) {
#pragma unroll 1
      for (int ky = 0; ky < p.filter.kh; ky += K) {
        const int filter_rows = KH ? KH : static_cast<int>(smaller(K, p.filter.kh - ky));
        const int first_row = row * SH + ky - p.pad_top;
        const uint32_t inside = rows_inside(first_row, (kStripRows - 1) * SH + filter_rows, p.h);
#pragma unroll 1
        for (int kx = 0; kx < p.filter.kw; kx += kStageColumns) {
          const int filter_columns = static_cast<int>(smaller(kStageColumns, p.filter.kw - kx));
          if (!one_stage || iteration == 0) {
            sync_block();
            stage_filter<T, V, PITCH>(weights, p, first_output, source, ky, kx, filter_rows, filter_columns);
            sync_block();
          }
          if (!active || !inside) continue;
          const int first_column = column * p.stride_w + kx - p.pad_left;
          const char* from = p.x.at(at.image, output / p.multiplier * p.sources + source, first_row, first_column);
          const float* weight_from = weights + lane * PITCH;
          const int weight_step = lanes * V * PITCH;
          const int seen = filter_columns + (kColumns - 1) * p.stride_w;
          float x[ROWS][V];
          fill_zero(x);
#pragma unroll 1
          for (int j = 0; j < seen; ++j, from += p.x.w, weight_from += weight_step) {
            if (static_cast<unsigned>(first_column + j) >= static_cast<unsigned>(p.w)) continue;
            read_column<T>(x, from, p.x.h, inside);
#pragma unroll
            for (int q = 0; q < kColumns; ++q) {
              const int tap = j - q * p.stride_w;
              if (static_cast<unsigned>(tap) >= static_cast<unsigned>(filter_columns)) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                float weight[K];
                read_filter_column(weight, weight_from - q * p.stride_w * weight_step + v * lanes * PITCH);
#pragma unroll
                for (int y = 0; y < K; ++y) {
                  if (!KH && y >= filter_rows) break;
#pragma unroll
                  for (int r = 0; r < kStripRows; ++r) sum[r][q][v] = fmaf(x[r * SH + y][v], weight[y], sum[r][q][v]);
                }
              }
            }
          }
        }
      }
    }

    if (!active) continue;
    char* out = p.out.at(at.image, output, row, column);
    const char* gradient = p.gradient.at(at.image, output, row, column);
    // Two rows an iteration, then the others move up: so the code of the activations exists four times, not sixteen.
    const int rows = static_cast<int>(smaller(kStripRows, p.out_h - row));
    const int columns = static_cast<int>(smaller(kColumns, p.out_w - column));
#pragma unroll 1
    for (int r = 0; r < rows; r += 2, out += 2 * p.out.h, gradient += 2 * p.gradient.h) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int q = 0; q < kColumns; ++q) {
          if (r + s >= rows || q >= columns) continue;
          float value[V];
          if (p.gradient.data) {
            read_channels<T>(value, gradient + s * p.gradient.h + q * p.gradient.w);
#pragma unroll
            for (int v = 0; v < V; ++v) value[v] *= derivative<T>(p.activation, sum[s][q][v]);
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v) value[v] = activate<T>(p.activation, sum[s][q][v]);
          }
          write_channels<T>(out + s * p.out.h + q * p.out.w, value);
        }
      }
#pragma unroll
      for (int i = 0; i + 2 < kStripRows; ++i)
#pragma unroll
        for (int q = 0; q < kColumns; ++q)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[i][q][v] = sum[i + 2][q][v];
    }
  }
}

struct Plan {
  DirectCall call;
  int64_t images;
  int stride_h;
  bool channels_innermost;
};

template <class T, int V, int KH, int SH>
void start(Plan& plan, const Device& device) {
  DirectCall& p = plan.call;
  p.tiling = make_tiling({plan.images, p.outputs, p.out_h, p.out_w, kColumns, V, static_cast<int>(V * sizeof(T)),
                          plan.channels_innermost, 1, 16, 1, 8},
                         device);
  Grid grid;
  grid.x = p.tiling.position_blocks * p.tiling.channel_blocks;
  grid.threads = p.tiling.threads();
  constexpr size_t kTapBytes = kFilterPitch<(KH ? KH : kFilterRows)> * sizeof(float);  // of a column of a filter
  grid.shared_bytes = kTapBytes * std::min(p.filter.kw, kStageColumns) * (V << p.tiling.log_channels);
  launch("direct_kernel", direct_kernel<T, V, KH, SH>, grid, p, device.stream);
}

template <class T, int V>
void start_for_filter(Plan& plan, const Device& device) {
  const int kh = plan.call.filter.kh;
  if (plan.stride_h == 2) {
    if (kh == 3) return start<T, V, 3, 2>(plan, device);
    if (kh == 7) return start<T, V, 7, 2>(plan, device);
    return start<T, V, 0, 2>(plan, device);
  }
  if (kh == 3) return start<T, V, 3, 1>(plan, device);
  if (kh == 7) return start<T, V, 7, 1>(plan, device);
  start<T, V, 0, 1>(plan, device);
}

template <class T>
void start_for_layout(Plan& plan, bool pairs, const Device& device) {
  pairs ? start_for_filter<T, 2>(plan, device) : start_for_filter<T, 1>(plan, device);
}

// `from` and `to` are c.x and c.out, in the order of the pass; of c, what both passes have in common is read.
void start_for_dtype(const Convolution& c, const Map& from, const Map& to, int stride_h, DirectCall call,
                     const Device& device) {
  call.x = in_bytes(from, c.dtype), call.out = in_bytes(to, c.dtype);
  Plan plan{call, c.n, stride_h, channels_innermost(from, to)};
  const bool pairs = c.multiplier == 1 && pairs_of_channels(from, c.channels) && pairs_of_channels(to, c.channels) &&
                     (!call.gradient.data || pairs_of_channels(c.gradient, c.channels));
  if (c.dtype == Dtype::float32) return start_for_filter<float, 1>(plan, device);
  with_16_bit_storage(c.dtype, [&](auto element) { start_for_layout<decltype(element)>(plan, pairs, device); });
}

}  // namespace

void direct_forward(const Convolution& call, const Device& device) {
  DirectCall p{};
  p.filter = call.filter;
  p.gradient = in_bytes(call.gradient, call.dtype);
  p.outputs = static_cast<int>(call.channels * call.multiplier), p.multiplier = call.multiplier, p.sources = 1;
  p.h = call.h, p.w = call.w, p.out_h = call.out_h, p.out_w = call.out_w;
  p.stride_w = call.stride_w, p.pad_top = call.pad_top, p.pad_left = call.pad_left;
  p.activation = activation_parameters(call.activation);
  start_for_dtype(call, call.x, call.out, call.stride_h, p, device);
}

namespace {

// Rows (or columns) first, first + stride, ... of the input: which taps they are multiplied with, and where.
struct Phase {
  int size;       // how many there are
  int tap, taps;  // the first of every stride-th tap
  int pad;        // of the convolution with those taps, mirrored
};

Phase make_phase(int first, int size, int kernel, int stride, int pad) {
  const int tap = ((first + pad) % stride + stride) % stride;
  const int taps = kernel > tap ? (kernel - tap + stride - 1) / stride : 0;
  return {size > first ? (size - first + stride - 1) / stride : 0, tap, taps, taps - 1 - (first + pad - tap) / stride};
}

}  // namespace

// With strides, each phase of rows and columns of the input has its own taps: a convolution for each.
void direct_dgrad(const Convolution& call, const Device& device) {
  const int64_t bytes = call.dtype == Dtype::float32 ? 4 : 2;
  for (int i = 0; i < call.stride_h; ++i) {
    for (int j = 0; j < call.stride_w; ++j) {
      const Phase y = make_phase(i, call.h, call.filter.kh, call.stride_h, call.pad_top);
      const Phase x = make_phase(j, call.w, call.filter.kw, call.stride_w, call.pad_left);
      if (y.size == 0 || x.size == 0) continue;
      Map grad = call.x;
      grad.data = static_cast<char*>(grad.data) + (i * grad.h + j * grad.w) * bytes;
      grad.h *= call.stride_h, grad.w *= call.stride_w;
      Filter filter = call.filter;
      const int64_t last_y = y.tap + static_cast<int64_t>(y.taps - 1) * call.stride_h;
      const int64_t last_x = x.tap + static_cast<int64_t>(x.taps - 1) * call.stride_w;
      filter.data = static_cast<const char*>(filter.data) + (last_y * filter.y + last_x * filter.x) * bytes;
      filter.y *= -call.stride_h, filter.x *= -call.stride_w;
      filter.kh = y.taps, filter.kw = x.taps, filter.bias = nullptr;
      DirectCall p{};
      p.filter = filter;
      p.outputs = static_cast<int>(call.channels), p.multiplier = 1, p.sources = call.multiplier;
      p.h = call.out_h, p.w = call.out_w, p.out_h = y.size, p.out_w = x.size;
      p.stride_w = 1, p.pad_top = y.pad, p.pad_left = x.pad;
      p.activation = activation_parameters(Activation::none);
      start_for_dtype(call, call.out, grad, 1, p, device);
    }
  }
}

}  // namespace ffnet
