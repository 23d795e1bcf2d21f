// The channel mixer of few channels in one kernel, for 16-bit storage on tensor cores.
//
// As in flash attention, rows of the products are pixels. A warp keeps its 32 pixels of x as fragments; for 16 hidden
// units at a time it computes hidden = act(x·W1ᵀ + b1), whose accumulators, packed, are the left operand of
// out += hidden·W2ᵀ. Weights pass through shared memory in chunks of hidden units, one chunk ahead of the products.
#include "channel_mixer.h"

#include <algorithm>

#include "activation.h"
#include "channel_mixer_tiles.h"
#include "dispatch.h"
#include "storage.h"

namespace ffnet {
namespace {

using namespace mixer;

constexpr int kMaxChannels = 128;

struct MixerParameters {
  PixelMap x, residual, out;
  Weight expand, expand_bias, project;
  const void *project_bias, *scale;
  ActivationParameters activation;
  int64_t pixels, image_pixels;
  int hidden;
};

// Of a channel of out.
struct alignas(8) FloatPair {
  float scale, bias;
};

template <class T, int WIDTH, bool CHANNELS_LAST>
FFNET_KERNEL(kThreads, WIDTH > 64 ? 2 : 3)
mixer_kernel(FFNET_PARAMETER MixerParameters p) {
#if FFNET_HAS_SM80
  using Tile = Layout<WIDTH, CHANNELS_LAST>;
  constexpr int kSteps = WIDTH / 16, kChunk = Tile::kChunk;
  int64_t* offsets = reinterpret_cast<int64_t*>(shared_memory());
  T* memory = reinterpret_cast<T*>(shared_memory());
  const int lane = thread_index() % kWarp, first_pixel = thread_index() / kWarp * kRowTiles * 16;

  static_assert(kPixels == kThreads);
  {
    const int64_t pixel = static_cast<int64_t>(block_x()) * kPixels + thread_index();
    const int64_t image = pixel / p.image_pixels, rest = pixel % p.image_pixels;
    const auto offset = [&](const PixelMap& map) {
      return pixel < p.pixels ? image * map.image + rest * map.pixel : -1;
    };
    offsets[thread_index()] = offset(p.x);
    offsets[kPixels + thread_index()] = offset(p.residual);
    offsets[2 * kPixels + thread_index()] = offset(p.out);
  }

  // Stage 0 lies before the tile of x, stage 1 over it.
  const auto stage = [&](int chunk) { return memory + (chunk % 2 ? Tile::kInput : Tile::kOffsets); };
  const auto fill = [&](int chunk) {
    T* to = stage(chunk);
    const int first = chunk * kChunk;
    stage_weight<T, kChunk, WIDTH>(to, Tile::kExpandPitch, p.expand, first, 0);
    stage_weight<T, WIDTH, kChunk>(to + Tile::kProject, Tile::kProjectPitch, p.project, 0, first);
    stage_weight<T, 1, kChunk>(to + Tile::kBias, 0, p.expand_bias, 0, first);
    commit_copies();
  };
  fill(0);
  sync_block();
  load_tile<T, WIDTH, CHANNELS_LAST>(memory + Tile::kInput, p.x, offsets);
  commit_copies();
  wait_for_copies<0>();
  sync_block();

  uint32_t x[kRowTiles][kSteps][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const T* tile = memory + Tile::kInput;
      const int pixel = first_pixel + m * 16, half = lane / 16 * 8, quarter = lane / 8 % 2 * 8, row = lane % 8;
      if (CHANNELS_LAST)
        load_matrices(x[m][k], tile + Tile::at(pixel + quarter + row, k * 16 + half));
      else
        load_matrices_transposed(x[m][k], tile + Tile::at(pixel + quarter, k * 16 + half + row));
    }
  sync_block();

  float out[kRowTiles][2 * kSteps][4] = {};
  const int chunks = (p.hidden + kChunk - 1) / kChunk;
  // Of 16x16 weights, as right operands: rows are the product's columns.
  const int weight_row = lane / 16 * 8 + lane % 8, weight_column = lane / 8 % 2 * 8;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) fill(chunk + 1);
    const T* weights = stage(chunk);
    const T* expand = weights + weight_row * Tile::kExpandPitch + weight_column;
    const T* project = weights + Tile::kProject + weight_row * Tile::kProjectPitch + weight_column;
    const T* bias = weights + Tile::kBias + lane % 4 * 2;
    const int units = p.hidden - chunk * kChunk < kChunk ? p.hidden - chunk * kChunk : kChunk;
#pragma unroll 1
    for (int group = 0; group < units; group += 16) {
      float hidden[kRowTiles][2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(bias + group + j * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          hidden[m][j][0] = hidden[m][j][2] = low_float<T>(pair);
          hidden[m][j][1] = hidden[m][j][3] = high_float<T>(pair);
        }
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        load_matrices(b, expand + group * Tile::kExpandPitch + k * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            multiply_16x8x16<T>(hidden[m][j], x[m][k][0], x[m][k][1], x[m][k][2], x[m][k][3], b[2 * j], b[2 * j + 1],
                                hidden[m][j]);
      }
      float values[kRowTiles * 8];
#pragma unroll
      for (int i = 0; i < kRowTiles * 8; ++i) values[i] = hidden[i / 8][i / 4 % 2][i % 4];
      activate_fast(p.activation, values, values);
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) a[i / 4][i % 4] = pack<T>(values[2 * i], values[2 * i + 1]);
      // Missing hidden units are not zero where a pixel is infinite, and NaN times a zero weight is NaN.
      if (units - group < 16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int exist = units - group - i * 8 - lane % 4 * 2;
          const uint32_t mask = (exist > 0 ? 0xffffu : 0) | (exist > 1 ? 0xffff0000u : 0);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) a[m][2 * i] &= mask, a[m][2 * i + 1] &= mask;
        }
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        load_matrices(b, project + k * 16 * Tile::kProjectPitch + group);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            multiply_16x8x16<T>(out[m][2 * k + j], a[m][0], a[m][1], a[m][2], a[m][3], b[2 * j], b[2 * j + 1],
                                out[m][2 * k + j]);
      }
    }
    wait_for_copies<0>();
    sync_block();
  }

  // The residual's tile becomes the tile of out, in place: one rounding, and whole vectors to and from memory. Scale
  // and bias follow it.
  T* tile = memory + Tile::kOffsets;
  auto* factors = reinterpret_cast<FloatPair*>(memory + Tile::kEnd - 4 * WIDTH);
  for (int i = thread_index(); i < WIDTH; i += kThreads) {
    const bool exists = i < p.out.channels;
    factors[i].scale = exists && p.scale ? to_float(static_cast<const T*>(p.scale)[i]) : 1.0f;
    factors[i].bias = exists && p.project_bias ? to_float(static_cast<const T*>(p.project_bias)[i]) : 0.0f;
  }
  const bool residual = p.residual.data != nullptr;
  if (residual) {
    load_tile<T, WIDTH, CHANNELS_LAST>(tile, p.residual, offsets + kPixels);
    commit_copies();
    wait_for_copies<0>();
  }
  sync_block();
#pragma unroll
  for (int k = 0; k < 2 * kSteps; ++k) {
    const int channel = k * 8 + lane % 4 * 2;
    const FloatPair even = factors[channel], odd = factors[channel + 1];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T* place = tile + Tile::at(first_pixel + m * 16 + i * 8 + lane / 4, channel);
        const float low = even.scale * (out[m][k][2 * i] + even.bias);
        const float high = odd.scale * (out[m][k][2 * i + 1] + odd.bias);
        if constexpr (CHANNELS_LAST) {
          auto* pair = reinterpret_cast<uint32_t*>(place);
          const uint32_t before = residual ? *pair : 0;
          *pair = pack<T>(low_float<T>(before) + low, high_float<T>(before) + high);
        } else {
          T* next = place + Tile::kTilePitch;
          *place = from_float<T>((residual ? to_float(*place) : 0.0f) + low);
          *next = from_float<T>((residual ? to_float(*next) : 0.0f) + high);
        }
      }
  }
  sync_block();
  store_tile<T, WIDTH, CHANNELS_LAST>(tile, p.out, offsets + 2 * kPixels);
#endif
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool evenly_spaced(const ChannelMixer& call, const Map& map) {
  return !map.data || call.h == 1 || call.w == 1 || map.h == call.w * map.w;
}

int64_t pixel_stride(const ChannelMixer& call, const Map& map) { return call.w > 1 ? map.w : call.h > 1 ? map.h : 1; }

bool channels_last(const ChannelMixer& call) {
  return (call.channels == 1 || call.x.c == 1) && (call.outputs == 1 || call.out.c == 1) &&
         (call.outputs == 1 || call.residual.c == 1 || !call.residual.data);
}

bool nchw(const ChannelMixer& call) {
  return pixel_stride(call, call.x) == 1 && pixel_stride(call, call.out) == 1 &&
         (!call.residual.data || pixel_stride(call, call.residual) == 1);
}

PixelMap pixel_map(const ChannelMixer& call, const Map& map, int channels, bool channels_last) {
  const int64_t pixels = static_cast<int64_t>(call.h) * call.w;
  PixelMap result{map.data, map.n, map.c, pixel_stride(call, map), channels, 1};
  const int64_t row = channels_last ? channels : pixels, column = channels_last ? result.pixel : result.channel;
  for (const int vector : {4, 8})
    if (row % vector == 0 && column % vector == 0 && (call.n == 1 || map.n % vector == 0) &&
        aligned(map.data, 2 * vector))
      result.vector = vector;
  return result;
}

// Of a missing weight every element is zero: it has no rows.
Weight weight(const ChannelMixer& call, const void* data, int64_t stride, int rows, int columns) {
  if (!data) return {call.expand.data, 0, 0, 0, false};
  return {data, static_cast<int>(stride), rows, columns, columns % 8 == 0 && stride % 8 == 0 && aligned(data, 16)};
}

template <class T, int WIDTH>
void start_mixer(const MixerParameters& p, bool channels_last, const Device& device) {
  Grid grid;
  grid.x = (p.pixels + kPixels - 1) / kPixels;
  grid.threads = kThreads;
  grid.shared_bytes = 2 * (channels_last ? Layout<WIDTH, true>::kEnd : Layout<WIDTH, false>::kEnd);
  launch("mixer_kernel", channels_last ? mixer_kernel<T, WIDTH, true> : mixer_kernel<T, WIDTH, false>, grid, p,
         device.stream);
}

template <class T>
void start_mixer(const MixerParameters& p, bool channels_last, const Device& device) {
  const int width = std::max(p.x.channels, p.out.channels);
  const auto start = width <= 64   ? start_mixer<T, 64>
                     : width <= 80 ? start_mixer<T, 80>
                     : width <= 96 ? start_mixer<T, 96>
                                   : start_mixer<T, kMaxChannels>;
  start(p, channels_last, device);
}

}  // namespace

bool channel_mixer_fits(const ChannelMixer& call, const Device& device) {
  return has_tensor_cores(device) && call.dtype != Dtype::float32 && call.channels <= kMaxChannels &&
         call.outputs <= kMaxChannels && evenly_spaced(call, call.x) && evenly_spaced(call, call.out) &&
         evenly_spaced(call, call.residual) && std::max(call.expand.stride, call.project.stride) <= INT32_MAX &&
         (channels_last(call) || nchw(call));
}

void channel_mixer_forward(const ChannelMixer& call, const Device& device) {
  const bool last = channels_last(call);
  MixerParameters p;
  p.image_pixels = static_cast<int64_t>(call.h) * call.w;
  p.pixels = call.n * p.image_pixels;
  if (p.pixels == 0) return;
  p.x = pixel_map(call, call.x, call.channels, last);
  p.residual = pixel_map(call, call.residual, call.outputs, last);
  p.out = pixel_map(call, call.out, call.outputs, last);
  p.expand = weight(call, call.expand.data, call.expand.stride, call.hidden, call.channels);
  p.expand_bias = weight(call, call.expand_bias, 0, 1, call.hidden);
  p.project = weight(call, call.project.data, call.project.stride, call.outputs, call.hidden);
  p.project_bias = call.project_bias, p.scale = call.scale;
  p.activation = activation_parameters(call.activation);
  p.hidden = call.hidden;
  with_16_bit_storage(call.dtype, [&](auto element) { start_mixer<decltype(element)>(p, last, device); });
}

}  // namespace ffnet
