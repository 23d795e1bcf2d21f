// What the direct kernels share: how threads divide a map between them, and how they read it.
//
// A position is a vertical strip of a map: kStripRows rows of some columns. The lanes of a block are `channels` x
// `positions`; where channels are innermost in memory, neighbouring lanes have neighbouring channels (two of them where
// 16-bit values can be read in pairs), else neighbouring positions. Each block goes through `iterations` runs of
// positions that follow each other, so that strips share their halo in L1.
#pragma once

#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace ffnet {

constexpr int kDirectThreads = 256;  // at most
constexpr int kStripRows = 8;
constexpr int kFilterRows = 4;  // of a filter whose height is not a template's: so many rows at once

struct Tiling {
  bool channels_innermost;
  int log_channels, log_positions;          // lanes of a block
  int columns, strips, images;              // positions: of a strip's row, of a plane, of the batch
  int step_column, step_strip, step_image;  // a block's positions as a sum of these
  int iterations;
  int channel_blocks;
  int64_t position_blocks;

  int threads() const { return 1 << (log_channels + log_positions); }
};

FFNET_DEVICE int lane_channel(const Tiling& t) {
  return t.channels_innermost ? thread_index() & ((1 << t.log_channels) - 1) : thread_index() >> t.log_positions;
}

FFNET_DEVICE int lane_position(const Tiling& t) {
  return t.channels_innermost ? thread_index() >> t.log_channels : thread_index() & ((1 << t.log_positions) - 1);
}

// A position that moves on by the positions of a block.
struct Cursor {
  int column, strip, image;

  FFNET_DEVICE Cursor(const Tiling& t, int64_t block, int lane) {
    const unsigned index = static_cast<unsigned>(((block * t.iterations) << t.log_positions) + lane);
    const unsigned row = index / static_cast<unsigned>(t.columns);
    column = static_cast<int>(index - row * t.columns);
    image = static_cast<int>(row / static_cast<unsigned>(t.strips));
    strip = static_cast<int>(row - image * t.strips);
  }

  FFNET_DEVICE void advance(const Tiling& t) {
    column += t.step_column, strip += t.step_strip, image += t.step_image;
    if (column >= t.columns) column -= t.columns, ++strip;
    if (strip >= t.strips) strip -= t.strips, ++image;
  }
};

// A map with strides in bytes.
struct ByteMap {
  char* data;
  int64_t n, c, h, w;

  FFNET_DEVICE char* at(int image, int channel, int row, int column) const {
    return data + image * n + channel * c + row * h + column * w;
  }
};

// Bit i: whether row first + i is one of `size` rows, for i < count.
FFNET_DEVICE uint32_t rows_inside(int first, int count, int size) {
  const int from = first < 0 ? -first : 0, to = size - first < count ? size - first : count;
  return to > from ? (1u << to) - (1u << from) : 0;
}

template <class T, int V>
FFNET_DEVICE void read_channels(float (&value)[V], const char* from) {
  if constexpr (V == 2) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    value[0] = low_float<T>(word), value[1] = high_float<T>(word);
  } else {
    value[0] = to_float(*reinterpret_cast<const T*>(from));
  }
}

template <class T, int V>
FFNET_DEVICE void write_channels(char* to, const float (&value)[V]) {
  if constexpr (V == 2)
    *reinterpret_cast<uint32_t*>(to) = pack<T>(value[0], value[1]);
  else
    *reinterpret_cast<T*>(to) = from_float<T>(value[0]);
}

template <int ROWS, int V>
FFNET_DEVICE void fill_zero(float (&value)[ROWS][V]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) value[i][v] = 0.0f;
}

// Reads the rows of a column that have a bit in `inside`; the others keep their zeros, which were set once for all
// columns.
template <class T, int ROWS, int V>
FFNET_DEVICE void read_column(float (&value)[ROWS][V], const char* from, int64_t row_bytes, uint32_t inside) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i, from += row_bytes)
    if (inside >> i & 1) read_channels<T>(value[i], from);
}

// ---- host ----

// Whether lanes run over channels, and whether a 16-bit map can be read in pairs of channels.
inline bool channels_innermost(const Map& a, const Map& b) { return a.c + b.c < a.w + b.w; }

inline bool pairs_of_channels(const Map& map, int64_t channels) {
  const bool even = channels % 2 == 0 && map.n % 2 == 0 && map.h % 2 == 0 && map.w % 2 == 0;
  return even && map.c == 1 && reinterpret_cast<uintptr_t>(map.data) % 4 == 0;
}

inline ByteMap in_bytes(const Map& map, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
  return {static_cast<char*>(map.data), map.n * bytes, map.c * bytes, map.h * bytes, map.w * bytes};
}

inline int ceil_log2(int64_t value) {
  int log = 0;
  while (int64_t{1} << log < value) ++log;
  return log;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is divided: [images, outputs, out_h, out_w], in positions of `width` columns and lanes of `pack` channels, which
// are `bytes` long; there are `tasks` blocks for each share. A block gets more iterations, from the least to the most,
// while there are more than `waves` blocks a multiprocessor.
struct TilingRequest {
  int64_t images, outputs;
  int out_h, out_w, width, pack, bytes;
  bool channels_innermost;
  int64_t tasks, waves, least_iterations, most_iterations;
};

inline Tiling make_tiling(const TilingRequest& r, const Device& device) {
  Tiling t{};
  t.channels_innermost = r.channels_innermost;
  t.columns = static_cast<int>(ceil_divide(r.out_w, r.width)), t.strips = (r.out_h + kStripRows - 1) / kStripRows;
  t.images = static_cast<int>(r.images);
  const int64_t plane = static_cast<int64_t>(t.columns) * t.strips, positions = plane * r.images;
  if (positions > 0x7fffffff)
    throw std::runtime_error("ffnet_kernels (cuda): takes maps of up to 2^31 positions on CUDA cores");
  const int64_t lanes = ceil_divide(r.outputs, r.pack);
  const bool few = positions * lanes * r.tasks < int64_t{2} * kDirectThreads * device.multiprocessors;
  const int log_threads = few ? 7 : 8;
  if (r.channels_innermost) {
    // A warp's width of channels, or less where that leaves fewer lanes idle: whole sectors of 32 bytes in any case.
    t.log_channels = std::min(5, ceil_log2(lanes));
    const auto idle = [&](int log) { return ceil_divide(lanes, int64_t{1} << log) << log; };
    for (int log = t.log_channels - 1; log >= 0 && r.bytes << log >= 32; --log)
      if (idle(log) < idle(t.log_channels)) t.log_channels = log;
  } else {
    t.log_channels = std::min({log_threads - std::min(log_threads, ceil_log2(plane)), ceil_log2(lanes), 5});
  }
  t.log_positions = log_threads - t.log_channels;
  const int step = 1 << t.log_positions;
  t.step_column = step % t.columns, t.step_strip = step / t.columns % t.strips;
  t.step_image = static_cast<int>(step / plane);
  t.channel_blocks = static_cast<int>(ceil_divide(lanes, int64_t{1} << t.log_channels));
  const int64_t blocks = ceil_divide(positions, step) * t.channel_blocks * r.tasks;
  t.iterations =
      static_cast<int>(std::clamp(blocks / (r.waves * device.multiprocessors), r.least_iterations, r.most_iterations));
  t.position_blocks = ceil_divide(positions, static_cast<int64_t>(t.iterations) * step);
  return t;
}

}  // namespace ffnet
