// Gradients of filters, summed while the maps stream by: filter_grad[ky, kx] = Σ fresh[y, x] · kept[y +
// ky - top, x + kx - left], in the terms of the filter that a kernel applies to the kept map.
//
// The columns of a fresh row and those around them, transposed, times a kept row are a matrix of 16 by 8 columns with
// the 16 windows of a panel as its depth. Its diagonals are a row of taps; it is summed over all that a warp reads, and
// only then are the diagonals added. The fresh row is the one that the first convolution has just completed, so the K
// rows that it meets are the newest ones of the map: kept transposed, in rotation as the sums of band.h are.
#pragma once

#include "band.h"

namespace ffnet {

#if FFNET_HAS_SM80

// A row of a panel, transposed: lane 4g + t has column g (own) and column g of those around a window (outer; columns
// -4..-1, 8..11), of windows 2t, 2t + 1 of both halves.
struct TransposedRow {
  RowPair own, outer;
};

FFNET_DEVICE RowPair transposed(RowPair row) {
  return {{transpose_matrix(row.half[0]), transpose_matrix(row.half[1])}};
}

template <class T, int K, bool HALO>
class FilterSums {
 public:
  static constexpr int kBytes = K * kPanel * kWindow * static_cast<int>(sizeof(float));  // that `store` needs

  FFNET_DEVICE void open_panel() {
#pragma unroll
    for (int k = 0; k < K; ++k) kept_[k] = {};
  }

  // The row of step i of a turn. Columns that a window only provides must be zeros, or they would be counted twice.
  FFNET_DEVICE void keep(int i, RowPair row) { kept_[i] = transposed(row); }
  FFNET_DEVICE void keep_transposed(int i, RowPair row) { kept_[i] = row; }
  FFNET_DEVICE void keep_nothing(int i) { kept_[i] = {}; }
  FFNET_DEVICE RowPair kept(int i) const { return kept_[i]; }

  template <class TURN>
  FFNET_DEVICE void add(int i, const TURN& turn, const TransposedRow& fresh) {
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      if (!turn.reads(i, ky)) continue;
      const RowPair kept = kept_[(i + 1 + ky) % K];
      multiply_16x8x16<T>(sums_[ky], fresh.own.half[0], HALO ? fresh.outer.half[0] : 0, fresh.own.half[1],
                          HALO ? fresh.outer.half[1] : 0, kept.half[0], kept.half[1], sums_[ky]);
    }
  }

  // Writes the taps of filter `f`, as the kernel applies it, to `partials` [kh, kw], through the warp's memory.
  FFNET_DEVICE void store(float* memory, const FilterView& f, float* partials, int lane) const {
    float* target = memory + lane / 4 * kWindow + lane % 4 * 2;
#pragma unroll
    for (int ky = 0; ky < K; ++ky)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        target[(ky * 2 + half) * kMatrix] = sums_[ky][2 * half];
        target[(ky * 2 + half) * kMatrix + 1] = sums_[ky][2 * half + 1];
      }
    sync_warp();
    const int taps = f.kh * f.kw;
#pragma unroll 1
    for (int tap = lane; tap < taps; tap += kWarp) {
      const int ky = tap / f.kw, first = f.pad_left - (tap - ky * f.kw);  // the fresh column of kept column 0
      const float* matrices = memory + (K - f.kh + ky) * 2 * kMatrix;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kWindow; ++n) {
        const int column = n + first;
        const int place = column < 0 ? column + 12 : column < kWindow ? column : column + 4;
        if (HALO || place == column) sum += matrices[place * kWindow + n];
      }
      partials[f.mirrored ? taps - 1 - tap : tap] = sum;
    }
    sync_warp();
  }

 private:
  static constexpr int kMatrix = kWindow * kWindow;  // floats of half a matrix: own columns or outer ones

  float sums_[K][4] = {};
  RowPair kept_[K];
};

// The sums of all elements of one or two maps.
template <class T>
class MapSums {
 public:
  FFNET_DEVICE void add(RowPair first, RowPair second) {  // transposed rows
    const uint32_t one = from_float<T>(1.0f).bits, ones = one | one << 16;
    multiply_16x8x16<T>(sums_, first.half[0], second.half[0], first.half[1], second.half[1], ones, ones, sums_);
  }

  FFNET_DEVICE float first() const { return total(sums_[0]); }
  FFNET_DEVICE float second() const { return total(sums_[2]); }

 private:
  FFNET_DEVICE static float total(float sum) {  // of column g of all windows: all lanes 4g + t have the same
    for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  float sums_[4] = {};
};

#endif  // FFNET_HAS_SM80

}  // namespace ffnet
