// The rows of a depthwise filter as banded matrices, and the convolution of a panel's rows with them.
#pragma once

#include "panel.h"

namespace ffnet {

// A depthwise filter as kernels take it; `mirrored` swaps it in both directions, as the gradient of the input needs.
struct FilterView {
  const uint16_t* data;
  int64_t output, y, x;
  int kh, kw, pad_top, pad_left;  // of the filter as applied
  bool mirrored;
};

inline FilterView filter_view(const Filter& f, int pad_top, int pad_left, bool mirrored = false) {
  return {static_cast<const uint16_t*>(f.data), f.output, f.y, f.x, f.kh, f.kw, pad_top, pad_left, mirrored};
}

// A lane's part of a row of a filter as a banded matrix.
struct alignas(8) Band {
  uint32_t own, outer;  // for the columns of the window, and for those around it
};

// Of a filter's bands in shared memory, a warp's part.
template <int K>
constexpr int kSharedFilterBytes = K * kWarp * static_cast<int>(sizeof(Band));

#if FFNET_HAS_SM80

FFNET_DEVICE uint32_t filter_tap(const FilterView& f, int64_t output, int ky, int kx) {
  if (ky < 0 || ky >= f.kh || kx < 0 || kx >= f.kw) return 0;
  const int y = f.mirrored ? f.kh - 1 - ky : ky, x = f.mirrored ? f.kw - 1 - kx : kx;
  return f.data[output * f.output + y * f.y + x * f.x];
}

// A filter of up to K rows and 9 columns, at most 4 of them to each side of the centre, as K banded matrices: entry
// (u, n) of row ky holds tap u - n + pad_left, u being the column in the window's input: 0..7, then -4..-1 and 8..11.
// Without HALO the maps are one window wide and only the first 8 are there. Rows beyond the filter's come first.
template <int K, bool HALO>
class BandedFilter {
 public:
  FFNET_DEVICE BandedFilter(const FilterView& f, int64_t output, int lane) {
    const int n = lane / 4, t = lane % 4;
    const int own = 2 * t - n + f.pad_left, outer = (t < 2 ? 2 * t - 4 : 2 * t + 4) - n + f.pad_left;
    const Column columns[4] = {{f, own}, {f, own + 1}, {f, outer}, {f, outer + 1}};
    const int empty = K - f.kh;  // rows
    const uint16_t* row = f.data + output * f.output + (f.mirrored ? f.kh - 1 : 0) * f.y;
    const int64_t step = f.mirrored ? -f.y : f.y;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const bool exists = k >= empty;
      rows_[k][0] = columns[0].tap(row, exists) | columns[1].tap(row, exists) << 16;
      if constexpr (HALO) rows_[k][1] = columns[2].tap(row, exists) | columns[3].tap(row, exists) << 16;
      row += exists ? step : 0;
    }
  }

  FFNET_DEVICE Band row(int ky) const { return {rows_[ky][0], rows_[ky][HALO ? 1 : 0]}; }

 private:
  // A column of the filter: the same for all rows.
  struct Column {
    int64_t offset;
    bool exists;

    FFNET_DEVICE Column(const FilterView& f, int kx)
        : offset((f.mirrored ? f.kw - 1 - kx : kx) * f.x), exists(kx >= 0 && kx < f.kw) {}
    FFNET_DEVICE uint32_t tap(const uint16_t* row, bool row_exists) const {
      return exists && row_exists ? row[offset] : 0;
    }
  };

  uint32_t rows_[K][HALO ? 2 : 1];
};

// The same in shared memory, for kernels that have no registers left: a lane reads what it wrote.
template <int K, bool HALO>
class SharedFilter {
 public:
  FFNET_DEVICE SharedFilter(const FilterView& f, int64_t output, int lane, unsigned char* memory)
      : bands_(reinterpret_cast<Band*>(memory) + lane) {
    const BandedFilter<K, HALO> filter(f, output, lane);
#pragma unroll
    for (int k = 0; k < K; ++k) bands_[k * kWarp] = filter.row(k);
  }
  FFNET_DEVICE Band row(int ky) const {
    const uint2 row = load_again(bands_ + ky * kWarp);
    return {row.x, row.y};
  }

 private:
  Band* bands_;
};

// The K results that a row of the input takes part in, in rotation: at step i (modulo K) tap row ky belongs to sum
// (i - ky) mod K, so the sum of tap row K - 1 is complete after the step. All indices are constants once unrolled.
template <class T, int K, bool HALO>
class RollingSums {
 public:
  // `bias` of every result.
  FFNET_DEVICE explicit RollingSums(float bias) : start_{bias, bias, bias, bias} {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[k][e] = bias;
  }

  // `filter` is one of the two above.
  template <class FILTER>
  FFNET_DEVICE void add(int i, const FILTER& filter, RowPair own, RowPair halo) {
#pragma unroll
    for (int ky = K - 1; ky >= 0; --ky) {
      float (&sum)[4] = sums_[(i - ky + K) % K];
      const float (&start)[4] = ky == 0 ? start_ : sum;
      const Band band = filter.row(ky);
      if constexpr (HALO)
        multiply_16x8x16<T>(sum, own.half[0], own.half[1], halo.half[0], halo.half[1], band.own, band.outer, start);
      else
        multiply_16x8x8<T>(sum, own.half[0], own.half[1], band.own, start);
    }
  }

  FFNET_DEVICE const float (&complete(int i) const)[4] { return sums_[(i + 1) % K]; }

 private:
  float sums_[K][4], start_[4];
};

#endif  // FFNET_HAS_SM80

}  // namespace ffnet
