// How the fused channel mixer lays out maps and weights in shared memory and copies them there and back.
#pragma once

#include <type_traits>

#include "device.h"

namespace ffnet::mixer {

constexpr int kThreads = 128;
constexpr int kRowTiles = 2;  // of 16 pixels, in a warp
constexpr int kPixels = kThreads / kWarp * kRowTiles * 16;

// A map as pixels in a row: pixel p of image n is at n·image + p·pixel. Vectors of `vector` elements are aligned.
struct PixelMap {
  void* data;
  int64_t image, channel, pixel;
  int channels, vector;
};

struct Weight {
  const void* data;
  int stride, rows, columns;
  bool aligned;  // in vectors of 8
};

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

struct alignas(8) Bytes8 {
  uint32_t words[2];
};

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// What lies where in shared memory, in elements of 16 bits. WIDTH bounds channels and outputs. Rows are 16 bytes longer
// than they must be, so that the rows of a matrix begin in different banks.
template <int WIDTH, bool CHANNELS_LAST>
struct Layout {
  static constexpr int kChunk = WIDTH > 96 ? 16 : 32;  // hidden units; two blocks must fit into 100 KiB

  static constexpr int kTileRows = CHANNELS_LAST ? kPixels : WIDTH;
  static constexpr int kTileColumns = CHANNELS_LAST ? WIDTH : kPixels;
  static constexpr int kTilePitch = kTileColumns + 8;

  static constexpr int kExpandPitch = WIDTH + 8, kProjectPitch = kChunk + 8;
  static constexpr int kProject = kChunk * kExpandPitch;
  static constexpr int kBias = kProject + WIDTH * kProjectPitch;
  static constexpr int kStage = kBias + kChunk;

  // Where each pixel lies in x, residual and out; then two stages of weights. The tile of x lies in the second stage
  // and beyond: it is in registers when the stage is first filled. The tile of out may cover both.
  static constexpr int kOffsets = 3 * kPixels * static_cast<int>(sizeof(int64_t) / 2);
  static constexpr int kInput = kOffsets + kStage;
  static constexpr int kEnd = kInput + max_of(kStage, kTileRows* kTilePitch);
  static FFNET_DEVICE int at(int pixel, int channel) {
    return CHANNELS_LAST ? pixel * kTilePitch + channel : channel * kTilePitch + pixel;
  }
};

#if FFNET_HAS_SM80

// Calls visit(place in the tile, offset in the map, whether it exists) for every vector of ELEMENTS.
template <int ELEMENTS, int WIDTH, bool CHANNELS_LAST, class Visit>
FFNET_DEVICE void for_each_vector(const PixelMap& map, const int64_t* offsets, const Visit& visit) {
  using Tile = Layout<WIDTH, CHANNELS_LAST>;
  constexpr int kAcross = Tile::kTileColumns / ELEMENTS;
  static_assert(Tile::kTileRows * kAcross % kThreads == 0);
#pragma unroll 4
  for (int first = 0; first < Tile::kTileRows * kAcross; first += kThreads) {
    const int i = first + thread_index(), row = i / kAcross, column = i % kAcross * ELEMENTS;
    const int pixel = CHANNELS_LAST ? row : column, channel = CHANNELS_LAST ? column : row;
    const int64_t offset = offsets[pixel];
    visit(row * Tile::kTilePitch + column, offset + channel * map.channel, offset >= 0 && channel < map.channels);
  }
}

// Zeros where there is no such pixel or channel.
template <class T, int WIDTH, bool CHANNELS_LAST>
FFNET_DEVICE void load_tile(T* tile, const PixelMap& map, const int64_t* offsets) {
  const T* data = static_cast<const T*>(map.data);
  const auto load = [&](auto bytes) {
    for_each_vector<bytes.value / 2, WIDTH, CHANNELS_LAST>(map, offsets, [&](int place, int64_t offset, bool exists) {
      copy_async<bytes.value>(tile + place, exists ? data + offset : data, exists);
    });
  };
  if (map.vector == 8)
    load(std::integral_constant<int, 16>());
  else if (map.vector == 4)
    load(std::integral_constant<int, 8>());
  else
    for_each_vector<1, WIDTH, CHANNELS_LAST>(
        map, offsets, [&](int place, int64_t offset, bool exists) { tile[place] = exists ? data[offset] : T{0}; });
}

template <class T, int WIDTH, bool CHANNELS_LAST>
FFNET_DEVICE void store_tile(const T* tile, const PixelMap& map, const int64_t* offsets) {
  T* data = static_cast<T*>(map.data);
  const auto store = [&](auto vector) {
    using Vector = decltype(vector);
    constexpr int kElements = sizeof(Vector) / 2;
    for_each_vector<kElements, WIDTH, CHANNELS_LAST>(map, offsets, [&](int place, int64_t offset, bool exists) {
      if (exists) *reinterpret_cast<Vector*>(data + offset) = *reinterpret_cast<const Vector*>(tile + place);
    });
  };
  if (map.vector == 8)
    store(Bytes16());
  else if (map.vector == 4)
    store(Bytes8());
  else
    store(T());
}

// Begins the copy of weights [first_row, + ROWS) x [first_column, + COLUMNS); zeros beyond the matrix.
template <class T, int ROWS, int COLUMNS>
FFNET_DEVICE void stage_weight(T* shared, int pitch, const Weight& weight, int first_row, int first_column) {
  const T* data = static_cast<const T*>(weight.data);
  const auto for_each = [&](auto elements, const auto& visit) {
    constexpr int kAcross = COLUMNS / elements.value, kVectors = ROWS * kAcross;
#pragma unroll(elements.value == 1 ? 1 : 8)
    for (int first = 0; first < kVectors; first += kThreads) {
      const int i = first + thread_index(), row = first_row + i / kAcross, column = i % kAcross * elements.value;
      if (kVectors % kThreads && i >= kVectors) break;
      const bool exists = row < weight.rows && first_column + column < weight.columns;
      visit(shared + i / kAcross * pitch + column,
            data + static_cast<int64_t>(row) * weight.stride + first_column + column, exists);
    }
  };
  if (weight.aligned)
    for_each(std::integral_constant<int, 8>(),
             [](T* to, const T* from, bool exists) { copy_async<16>(to, from, exists); });
  else
    for_each(std::integral_constant<int, 1>(), [](T* to, const T* from, bool exists) { *to = exists ? *from : T{0}; });
}
#endif

}  // namespace ffnet::mixer
