// Moving maps between their strided layout in memory and rows of vectors of channels.
#pragma once

#include <stdexcept>

#include "kernels.h"
#include "storage.h"
#include "transpose.h"

namespace ffnet::FFNET_ISA {

constexpr int64_t kLanes = Vec::lanes;

FFNET_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FFNET_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FFNET_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Loads and stores of the first n lanes, usually all.
template <class T>
FFNET_INLINE Vec load_lanes(const T* from, int64_t n) {
  return n == kLanes ? load(from) : load_first(from, n);
}
template <class T>
FFNET_INLINE void store_lanes(Vec x, T* to, int64_t n) {
  n == kLanes ? store(x, to) : store_first(x, to, n);
}

// Calls f with an element of the storage type of maps and weights. Throws std::invalid_argument for an unknown one.
template <class F>
void with_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::float32: return f(0.f);
    case Storage::bfloat16: return f(BFloat16());
    case Storage::float16: return f(Float16());
  }
  throw std::invalid_argument("with_storage: no such storage type");
}

// Which channels a vector holds: lane l is channel (first + l) / multiplier of the map; lanes past `count` are zero.
struct Lanes {
  int64_t first, count, multiplier;
};

// Elements at offsets from a pointer, each as a float32 lane.
template <class T>
struct Elements {
  const T* from;
  FFNET_INLINE Vec whole(int64_t at) const { return load(from + at); }
  FFNET_INLINE Vec part(int64_t at, int64_t n) const { return load_first(from + at, n); }
  FFNET_INLINE float one(int64_t at) const { return to_float(from[at]); }
};

#if defined(__AVX512BF16__)
// Elements of two rows, in pairs that fill a lane unconverted. A null row counts as zeros.
struct ElementPairs {
  const BFloat16 *low, *high;
  static FFNET_INLINE __m256i bits(const BFloat16* row, int64_t at, __mmask16 wanted) {
    return row ? _mm256_maskz_loadu_epi16(wanted, row + at) : _mm256_setzero_si256();
  }
  FFNET_INLINE Vec whole(int64_t at) const { return interleave(bits(low, at, 0xffff), bits(high, at, 0xffff)); }
  FFNET_INLINE Vec part(int64_t at, int64_t n) const {
    const __mmask16 wanted = static_cast<__mmask16>((1u << n) - 1);
    return interleave(bits(low, at, wanted), bits(high, at, wanted));
  }
  FFNET_INLINE float one(int64_t at) const {
    const uint32_t lower = low ? low[at].bits : 0, upper = high ? high[at].bits : 0;
    return bit_cast<float>(lower | upper << 16);
  }
};
#endif

// `width` pixels -> [width][lanes]. Offset 0 is channel 0 of the first pixel.
template <class Source>
void gather_row(const Source& source, int64_t stride_c, int64_t stride_w, int64_t width, const Lanes& lanes,
                float* out) {
  if (stride_c == 1 && lanes.multiplier <= 2) {
    const int64_t count = ceil_div(lanes.count, lanes.multiplier), first = lanes.first / lanes.multiplier;
    if (count == kLanes) {
      for (int64_t i = 0; i < width; ++i) source.whole(first + i * stride_w).store(out + i * kLanes);
      return;
    }
    for (int64_t i = 0; i < width; ++i) {
      const Vec pixel = source.part(first + i * stride_w, count);
      (lanes.multiplier == 1 ? pixel : duplicate_lanes(pixel, std::make_index_sequence<Vec::lanes>()))
          .store(out + i * kLanes);
    }
    return;
  }
  if (stride_w == 1 && lanes.multiplier == 1) {
    const auto write = [&](int64_t i, Vec pixel) __attribute__((always_inline)) { pixel.store(out + i * kLanes); };
    for (int64_t i = 0; i < width; i += kLanes, out += kLanes * kLanes) {
      const int64_t first = lanes.first * stride_c + i, pixels = min_of(kLanes, width - i);
      if (lanes.count == kLanes && pixels == kLanes) {
        transpose_block([&](int64_t c) __attribute__((always_inline)) { return source.whole(first + c * stride_c); },
                        kLanes, write, kLanes);
      } else {
        transpose_block([&](int64_t c)
                            __attribute__((always_inline)) { return source.part(first + c * stride_c, pixels); },
                        lanes.count, write, pixels);
      }
    }
    return;
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t first = (lanes.first + l) / lanes.multiplier * stride_c;
    for (int64_t i = 0; i < width; ++i) out[i * kLanes + l] = l < lanes.count ? source.one(first + i * stride_w) : 0;
  }
}

// [width][lanes] -> `width` pixels of a strided map, one channel a lane.
template <class T>
void scatter_row(const float* in, int64_t width, const Lanes& lanes, T* row, int64_t stride_c, int64_t stride_w) {
  if (stride_c == 1) {
    row += lanes.first;
    if (lanes.count == kLanes) {
      for (int64_t i = 0; i < width; ++i) store(Vec::load(in + i * kLanes), row + i * stride_w);
    } else {
      for (int64_t i = 0; i < width; ++i) store_first(Vec::load(in + i * kLanes), row + i * stride_w, lanes.count);
    }
    return;
  }
  row += lanes.first * stride_c;
  if (stride_w == 1) {
    const auto read = [&](int64_t i) __attribute__((always_inline)) { return Vec::load(in + i * kLanes); };
    for (int64_t i = 0; i < width; i += kLanes, in += kLanes * kLanes) {
      const int64_t pixels = min_of(kLanes, width - i);
      if (lanes.count == kLanes && pixels == kLanes) {
        transpose_block(
            read, kLanes, [&](int64_t c, Vec x) __attribute__((always_inline)) { store(x, row + i + c * stride_c); },
            kLanes);
      } else {
        transpose_block(
            read, pixels,
            [&](int64_t c, Vec x) __attribute__((always_inline)) { store_first(x, row + i + c * stride_c, pixels); },
            lanes.count);
      }
    }
    return;
  }
  for (int64_t l = 0; l < lanes.count; ++l)
    for (int64_t i = 0; i < width; ++i) from_float(in[i * kLanes + l], row[l * stride_c + i * stride_w]);
}

// The same for whole rows `stride.h` apart; rows that follow each other in memory move as one.
template <class T>
void gather_rows(const T* image, const Strides& stride, int64_t rows, int64_t width, const Lanes& lanes, float* out) {
  if (stride.h == width * stride.w) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r)
    gather_row(Elements<T>{image + r * stride.h}, stride.c, stride.w, width, lanes, out + r * width * kLanes);
}

template <class T>
void scatter_rows(const float* in, int64_t rows, int64_t width, const Lanes& lanes, T* image, const Strides& stride) {
  if (stride.h == width * stride.w) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r)
    scatter_row(in + r * width * kLanes, width, lanes, image + r * stride.h, stride.c, stride.w);
}

// True where a row can be used in place: float32, unit channel stride, one channel a lane, no lane missing.
template <class T>
FFNET_INLINE bool in_place(const Lanes& lanes, int64_t channel_stride) {
  return sizeof(T) == sizeof(float) && channel_stride == 1 && lanes.multiplier == 1 && lanes.count == kLanes;
}

// Whether the rows that a filter rereads stay in L1 in place. Vectors of pixels that are a large power of two apart
// fall into a few cache sets, which dense copies avoid. Copying long rows costs more than that, most with wide vectors.
inline bool spreads(int64_t pixel_stride, int64_t width) {
  constexpr int64_t kSets = 64, kWays = 8, kLineFloats = 16, kRows = 7, kLongRow = Vec::registers == 32 ? 17 : 65;
  if (pixel_stride % kLineFloats != 0 || pixel_stride == 0 || width >= kLongRow) return true;
  const int64_t lines = pixel_stride / kLineFloats,
                shared = min_of(lines & -lines, kSets);  // their common power of two
  return kRows * width <= kSets / shared * kWays;
}

// Like in_place, for a row that a filter reads or whose results are read again.
template <class T>
FFNET_INLINE bool stays_in_place(const Lanes& lanes, const Strides& stride, int64_t width) {
  return in_place<T>(lanes, stride.c) && spreads(stride.w, width);
}

inline int64_t bytes_of(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// How many neighbouring vectors of channels share a cache line of a channels-last map. One thread computes them, as two
// threads would keep taking the line from each other.
inline int64_t vectors_in_line(Storage storage) { return max_of(1, 64 / (kLanes * bytes_of(storage))); }

// Whether the maps of a call are too large for the cache. Then every store would wait for its line unless prefetched;
// otherwise prefetching costs a few percent. The threshold is where both were equal on a Zen 5 that shares its L3 with
// others.
inline bool outgrows_cache(int64_t elements, int64_t element_bytes) {
  constexpr int64_t kCacheBytes = 11 << 20;
  return elements * element_bytes > kCacheBytes;
}

// Prefetches pixels [first, last) of a row that will be needed one row later; a vector of channels of a channels-last
// map is one cache line of each pixel, a pattern that hardware prefetchers do not follow.
template <class T>
FFNET_INLINE void prefetch_row(const T* row, int64_t pixel, int64_t first, int64_t last) {
  if (!row) return;
  for (int64_t i = first; i < last; ++i) __builtin_prefetch(row + i * pixel);
}

}  // namespace ffnet::FFNET_ISA
