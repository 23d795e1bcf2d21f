// How a warp sees maps on tensor cores: as a panel of 16 windows, each 8 columns wide, that it streams down row by row.
//
// A row of a depthwise convolution is a product with a banded matrix, the same for every window of every image: so the
// 16 rows of a matrix fragment are windows, the 8 columns of the result are the window's columns. Windows 8i..8i+7 of a
// panel (a half) belong to images that lie side by side, so a window's neighbours are the lanes' neighbours, and the
// columns left and right of it come by one shuffle.
#pragma once

#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace ffnet {

constexpr int kWindow = 8;        // columns of a window
constexpr int kPanel = 16;        // windows of a panel
constexpr int kStripWindows = 6;  // windows of a strip of a map wider than 8 windows, without one at each side for its halo

// The windows of [n, h, w] planes. A plane is cut into strips where it is wide, and into segments of rows where there
// would be too few panels otherwise; each is a column of windows of its own ("image" below).
struct PanelShape {
  int h, w;          // of the plane that is written, or the wider one
  int windows;       // side by side, of a strip
  int strips;        // of a plane
  int lead;          // windows at each side of a strip that only lend their columns
  int segments, segment_rows;
  int64_t images;    // n · segments · strips
  int64_t panels;

  FFNET_BOTH int images_a_half() const { return kWindow / windows; }
};

inline PanelShape panel_shape(int64_t n, int rows, int columns, int segments) {
  PanelShape p{};
  p.h = rows, p.w = columns;
  const int windows = (columns + kWindow - 1) / kWindow;
  p.lead = windows > kWindow ? 1 : 0;
  p.strips = p.lead ? (windows + kStripWindows - 1) / kStripWindows : 1;
  p.windows = p.lead ? kWindow : windows;
  p.segment_rows = (rows + segments - 1) / segments;
  p.segments = (rows + p.segment_rows - 1) / p.segment_rows;
  p.images = n * p.segments * p.strips;
  const int64_t images_a_panel = 2 * (kWindow / p.windows);
  p.panels = (p.images + images_a_panel - 1) / images_a_panel;
  return p;
}

// Where a window lies: its plane, first row and first column.
struct Window {
  int64_t n;
  int row, column;
  bool exists;    // else its data are zeros
  bool writes;    // exists, and is not a lead window
};

// The window in slot 0..7 of a half of a panel.
FFNET_DEVICE Window window_at(const PanelShape& p, int64_t panel, int half, int slot) {
  const int image_in_half = slot / p.windows, j = slot - image_in_half * p.windows;
  const int64_t image = (panel * 2 + half) * p.images_a_half() + image_in_half;
  Window w;
  const int64_t plane_segment = image / p.strips;
  const int strip = static_cast<int>(image - plane_segment * p.strips);
  w.n = plane_segment / p.segments;
  w.row = static_cast<int>(plane_segment - w.n * p.segments) * p.segment_rows;
  w.column = (strip * kStripWindows - p.lead + j) * kWindow;
  w.exists = image_in_half < p.images_a_half() && image < p.images && w.column >= 0 && w.column < p.w;
  w.writes = w.exists && j >= p.lead && j < p.windows - p.lead;
  return w;
}

// The widest access, in bytes, that every row of a plane allows: 16, 8, 4 or 2.
inline int plane_unit(const Map& map, int w) {
  const auto fits = [&](int elements) {
    return w % elements == 0 && map.n % elements == 0 && map.c % elements == 0 &&
           reinterpret_cast<uintptr_t>(map.data) % (elements * 2) == 0;
  };
  return fits(8) ? 16 : fits(4) ? 8 : fits(2) ? 4 : 2;
}

// 16-bit planes as tensor-core kernels read and write them: rows dense, adjacent.
struct Plane {
  uint16_t* data;
  int64_t n, c;  // strides
  int h, w;
  int unit;      // see plane_unit
};

inline Plane plane(const Map& map, int h, int w) {
  return {static_cast<uint16_t*>(map.data), map.n, map.c, h, w, plane_unit(map, w)};
}

// Rows on their way through shared memory: stages of rows, one window's 8 columns (16 bytes) after the other.
constexpr int kRingRows = 4, kRingStages = 4;
constexpr int kRowBytes = kPanel * kWindow * 2;
constexpr int kRingBytes = kRingStages * kRingRows * kRowBytes;

#if FFNET_HAS_SM80

// A lane's part of a row of a panel: columns 2t, 2t + 1 of window g, of both halves (lane = 4g + t).
struct RowPair {
  uint32_t half[2];
};

// The same columns of the window's surroundings: of columns -4..-1 for t < 2, of columns 8..11 else.
class Neighbours {
 public:
  FFNET_DEVICE Neighbours(const PanelShape& p, int lane) {
    const bool left = lane % 4 < 2;
    const int j = lane / 4 % p.windows;
    source_ = lane + (left ? -2 : 2);
    exists_ = left ? j > 0 : j < p.windows - 1;
  }
  FFNET_DEVICE RowPair of(RowPair own) const {
    const uint32_t first = shuffle(own.half[0], source_), second = shuffle(own.half[1], source_);
    return {{exists_ ? first : 0, exists_ ? second : 0}};
  }

 private:
  int source_;
  bool exists_;
};

// A warp's ring of rows, some of them ahead of their use. Stage s holds the rows 4s..4s+3 after `first_row`. A lane copies
// two windows of a stage, in the order of memory, so that a warp reads long runs. ALIGNED is for planes of unit 16.
template <bool ALIGNED>
class RowRing {
 public:
  FFNET_DEVICE RowRing(const PanelShape& p, const Plane& plane, unsigned char* memory, int64_t panel, int64_t channel,
                       int first_row, int lane)
      : plane_(plane), memory_(memory) {
    const int images = 2 * p.images_a_half(), filled = images * kRingRows * p.windows;
    const int idle = kWindow - p.images_a_half() * p.windows;  // slots of a half that no image fills: kept zero
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = i * kWarp + lane;
      int row, half, slot;
      if (chunk < filled) {
        const int image = chunk / (kRingRows * p.windows);
        row = chunk / p.windows % kRingRows, half = image / p.images_a_half();
        slot = image % p.images_a_half() * p.windows + chunk % p.windows;
      } else {
        const int rest = chunk - filled;
        row = rest / (2 * idle), half = rest / idle % 2, slot = kWindow - idle + rest % idle;
      }
      const Window w = window_at(p, panel, half, slot);
      const bool exists = w.exists && w.column < plane.w;
      row_[i] = exists ? w.row + first_row + row : kNever;
      columns_[i] = plane.w - w.column;
      source_[i] = plane.data + (exists ? w.n * plane.n + channel * plane.c + int64_t{row_[i]} * plane.w + w.column : 0);
      place_[i] = row * kRowBytes + half * (kRowBytes / 2) + slot * 16;
    }
  }

  // Starts the copies of the next stage, for the caller to commit.
  FFNET_DEVICE void fetch() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = static_cast<unsigned>(row_[i]) < static_cast<unsigned>(plane_.h);
      unsigned char* target = memory_ + place_[i];
      if constexpr (ALIGNED) {
        copy_async<16>(target, source_[i], inside);
      } else if (plane_.unit >= 4) {
#pragma unroll 1
        for (int e = 0; e < kWindow; e += 2) copy_async<4>(target + 2 * e, source_[i] + e, inside && e < columns_[i]);
      } else {
#pragma unroll 1
        for (int e = 0; e < kWindow; ++e)
          reinterpret_cast<uint16_t*>(target)[e] = inside && e < columns_[i] ? source_[i][e] : uint16_t{0};
      }
      row_[i] += kRingRows;
      source_[i] += kRingRows * plane_.w;
      const int next = place_[i] + kRingRows * kRowBytes;
      place_[i] = next < kRingBytes ? next : next - kRingBytes;
    }
  }

  // The lane's part of the row `step` rows after the first; its stage must have landed.
  FFNET_DEVICE RowPair row(int step, int lane) const {
    const auto* words = reinterpret_cast<const uint32_t*>(memory_ + step % (kRingStages * kRingRows) * kRowBytes);
    return {{words[lane], words[kWarp + lane]}};
  }

 private:
  static constexpr int kNever = -(1 << 30);

  const Plane& plane_;
  unsigned char* memory_;
  const uint16_t* source_[2];
  int row_[2], columns_[2], place_[2];
};

// Where a lane writes the rows of a panel: columns 2t, 2t + 1 of window g, of both halves.
template <bool ALIGNED>
class RowWriter {
 public:
  FFNET_DEVICE RowWriter(const PanelShape& p, const Plane& plane, int64_t panel, int64_t channel, int lane)
      : row_bytes_(2 * plane.w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Window w = window_at(p, panel, half, lane / 4);
      const int column = w.column + lane % 4 * 2, columns = w.writes ? plane.w - column : 0;
      const int rows = plane.h - w.row < p.segment_rows ? plane.h - w.row : p.segment_rows;
      const int64_t offset = w.n * plane.n + channel * plane.c + int64_t{w.row} * plane.w + column;
      target_[half] = reinterpret_cast<unsigned char*>(plane.data + (columns > 0 ? offset : 0));
      rows_[half] = columns > 0 ? rows : 0;
      columns_[half] = plane.unit >= 4 ? 4 : columns;
    }
  }

  // Writes row `row` of the segment, where there is such a row.
  FFNET_DEVICE void write(int row, RowPair values) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (static_cast<unsigned>(row) >= static_cast<unsigned>(rows_[half])) continue;
      unsigned char* target = target_[half] + int64_t{row} * row_bytes_;
      if (ALIGNED || columns_[half] == 4) {
        *reinterpret_cast<uint32_t*>(target) = values.half[half];
      } else {
        reinterpret_cast<uint16_t*>(target)[0] = static_cast<uint16_t>(values.half[half]);
        if (columns_[half] > 1) reinterpret_cast<uint16_t*>(target)[1] = static_cast<uint16_t>(values.half[half] >> 16);
      }
    }
  }

 private:
  unsigned char* target_[2];
  int rows_[2], columns_[2], row_bytes_;
};

// Which elements of a lane's pairs lie inside a plane: what lies outside is padding for a convolution that follows.
class InsideMask {
 public:
  FFNET_DEVICE InsideMask(const PanelShape& p, int h, int w, int64_t panel, int lane)
      : height_(h), segmented_(p.segments > 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Window window = window_at(p, panel, half, lane / 4);
      const int left = w - window.column - lane % 4 * 2;
      columns_[half] = !window.exists || left <= 0 ? 0 : left == 1 ? 0xffffu : 0xffffffffu;
      row_[half] = window.row;
    }
  }

  // `row` of the segment; that of a whole plane must lie inside.
  FFNET_DEVICE RowPair apply(int row, RowPair values) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      values.half[half] &= columns_[half];
      if (segmented_ && static_cast<unsigned>(row_[half] + row) >= static_cast<unsigned>(height_)) values.half[half] = 0;
    }
    return values;
  }

 private:
  uint32_t columns_[2];
  int row_[2], height_;
  bool segmented_;
};

#endif  // FFNET_HAS_SM80

}  // namespace ffnet
