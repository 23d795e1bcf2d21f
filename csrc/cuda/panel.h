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

constexpr int kWindow = 8;  // columns of a window
constexpr int kPanel = 16;  // windows of a panel
constexpr int kStripWindows =
    6;  // windows of a strip of a map wider than 8 windows, not counting one at each side for the halo

// The windows of [n, h, w] planes. A plane is cut into strips where it is wide, and into segments of rows where there
// would be too few panels otherwise; each of these parts is an image of its own below.
struct PanelShape {
  int w;        // of the plane that is written, or the wider one
  int windows;  // side by side, of a strip
  int lead;     // windows at each side of a strip that only lend their columns
  int strips, segments, segment_rows;
  int images;  // n · segments · strips
  int panels;

  FFNET_BOTH int images_a_half() const { return kWindow / windows; }
};

inline PanelShape panel_shape(int64_t n, int rows, int columns, int segments) {
  PanelShape p{};
  const int windows = (columns + kWindow - 1) / kWindow;
  p.w = columns;
  p.lead = windows > kWindow ? 1 : 0;
  p.strips = p.lead ? (windows + kStripWindows - 1) / kStripWindows : 1;
  p.windows = p.lead ? kWindow : windows;
  p.segment_rows = (rows + segments - 1) / segments;
  p.segments = (rows + p.segment_rows - 1) / p.segment_rows;
  p.images = static_cast<int>(n * p.segments * p.strips);
  const int images_a_panel = 2 * p.images_a_half();
  p.panels = static_cast<int>((int64_t{p.images} + images_a_panel - 1) / images_a_panel);
  return p;
}

// Whether 32 bits count the images of such planes.
inline bool panels_take(int64_t n, int rows, int columns) {
  return n * (columns / (kStripWindows * kWindow) + 1) * (rows / kWindow + 1) < int64_t{1} << 30;
}

// Where a window lies: its plane, first row and first column.
struct Window {
  int n, row, column;
  bool exists;  // else its data are zeros
};

// One of the 8 windows of a panel's half: what is the same for both halves and all panels.
class WindowSlot {
 public:
  FFNET_DEVICE WindowSlot(const PanelShape& p, int slot) {
    image_ = slot / p.windows;
    j_ = slot - image_ * p.windows;
    lends_ = j_ < p.lead || j_ >= p.windows - p.lead;
  }

  FFNET_DEVICE Window at(const PanelShape& p, int panel, int half) const {
    int n = (2 * panel + half) * p.images_a_half() + image_, row = 0, column = j_ * kWindow;
    const bool exists = image_ < p.images_a_half() && n < p.images;
    if (p.segments * p.strips > 1) {
      const unsigned part = static_cast<unsigned>(n) / static_cast<unsigned>(p.strips);
      column += (static_cast<int>(n - part * p.strips) * kStripWindows - p.lead) * kWindow;
      n = static_cast<int>(part / static_cast<unsigned>(p.segments));
      row = static_cast<int>(part - n * p.segments) * p.segment_rows;
    }
    return {n, row, column, exists && column >= 0 && column < p.w};
  }

  FFNET_DEVICE bool lends() const { return lends_; }

 private:
  int image_, j_;
  bool lends_;
};

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
  int unit;  // see plane_unit
};

inline Plane plane(const Map& map, int h, int w) {
  return {static_cast<uint16_t*>(map.data), map.n, map.c, h, w, plane_unit(map, w)};
}

inline bool planar(const Map& map, int w) { return map.w == 1 && map.h == w; }

// What a kernel that is compiled for them knows of the windows.
enum class Windows {
  alone,    // aligned planes one window wide: there are no neighbours
  aligned,  // all planes of unit 16
  linear7,  // all planes 7, 14 or 28 wide, of unit 4 but for the first: they arrive as they lie in memory (linear.h)
  linear14,
  linear28,
  any,
};

// Of planes that arrive as they lie in memory; else 0.
FFNET_BOTH constexpr int linear_width(Windows windows) {
  return windows == Windows::linear7 ? 7 : windows == Windows::linear14 ? 14 : windows == Windows::linear28 ? 28 : 0;
}

// Whether windows have others beside them.
FFNET_BOTH constexpr bool has_neighbours(Windows windows) {
  return windows != Windows::alone && windows != Windows::linear7;
}

// Rows in flight through shared memory, one window's 8 columns (16 bytes) after another.
constexpr int kRowBytes = kPanel * kWindow * 2;

// A lane's part of a row of a panel: columns 2t, 2t + 1 of window g, of both halves (lane = 4g + t).
struct RowPair {
  uint32_t half[2];
};

#if FFNET_HAS_SM80

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

// The rows of a plane that a lane copies to shared memory: of window lane / 2 every other one, so that a warp reads two
// rows at a time. ROWS make a stage.
template <int ROWS, Windows WINDOWS>
class RowCopies {
 public:
  // From `first_row` of the window's segment on.
  FFNET_DEVICE void start(const Plane& plane, const Window& window, int64_t channel, int first_row, int lane) {
    const bool exists = window.exists && window.column < plane.w;
    row_ = exists ? window.row + first_row + lane % 2 : kNever;
    columns_ = plane.w - window.column;
    source_ = plane.data;
    if (exists) source_ += window.n * plane.n + channel * plane.c + int64_t{row_} * plane.w + window.column;
  }

  // Starts the copies of a stage, for the caller to commit. What `KNOWN` knows of its rows is not checked (schedule.h).
  template <class KNOWN>
  FFNET_DEVICE void fetch(const Plane& plane, unsigned char* stage, int lane) {
    unsigned char* target = stage + lane % 2 * kRowBytes + lane / 2 * (kWindow * 2);
    const uint16_t* source = source_;  // advances: else an address would be kept for each row
#pragma unroll
    for (int i = 0; i < (ROWS + 1) / 2; ++i) {
      if (!(ROWS % 2 && i == ROWS / 2 && lane % 2) && !KNOWN::none(i)) {  // the last row may have no second one
        const bool inside =
            KNOWN::all(i) ? row_ > kNever / 2 : static_cast<unsigned>(row_ + 2 * i) < static_cast<unsigned>(plane.h);
        copy(plane, target + 2 * i * kRowBytes, source, inside);
      }
      source += (i < ROWS / 2 ? 2 : 1) * int64_t{plane.w};
    }
    row_ += ROWS;
    source_ = source;
  }

 private:
  static constexpr int kNever = -(1 << 30);

  FFNET_DEVICE void copy(const Plane& plane, unsigned char* target, const uint16_t* source, bool inside) const {
    if constexpr (WINDOWS == Windows::alone || WINDOWS == Windows::aligned) {
      copy_async<16>(target, source, inside);
    } else if (plane.unit >= 4) {
#pragma unroll 1
      for (int e = 0; e < kWindow; e += 2) copy_async<4>(target + 2 * e, source + e, inside && e < columns_);
    } else {
#pragma unroll 1
      for (int e = 0; e < kWindow; ++e)
        reinterpret_cast<uint16_t*>(target)[e] = inside && e < columns_ ? source[e] : uint16_t{0};
    }
  }

  const uint16_t* source_;
  int row_, columns_;
};

// Where a lane writes the rows of a panel: columns 2t, 2t + 1 of window g, of both halves.
template <Windows WINDOWS>
class RowWriter {
 public:
  FFNET_DEVICE RowWriter(const PanelShape& p, const Plane& plane, const Window (&windows)[2], bool lends,
                         int64_t channel, int lane)
      : row_bytes_(linear_width(WINDOWS) > 0 ? 2 * linear_width(WINDOWS) : 2 * plane.w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Window& w = windows[half];
      const int column = w.column + lane % 4 * 2, columns = w.exists && !lends ? plane.w - column : 0;
      const int rows = plane.h - w.row < p.segment_rows ? plane.h - w.row : p.segment_rows;
      target_[half] = reinterpret_cast<unsigned char*>(plane.data);
      if (columns > 0) target_[half] += 2 * (w.n * plane.n + channel * plane.c + int64_t{w.row} * plane.w + column);
      rows_[half] = columns > 0 ? rows : 0;
      columns_[half] = plane.unit >= 4 ? 4 : columns;
    }
  }

  // Writes row `row` of the segment, where there is such a row; INSIDE says that there is, where the window exists.
  template <bool INSIDE = false>
  FFNET_DEVICE void write(int row, RowPair values) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int kKnown = 2 * linear_width(WINDOWS);
      unsigned char* target = target_[half] + (kKnown > 0 ? int64_t{row * kKnown} : int64_t{row} * row_bytes_);
      if constexpr (WINDOWS == Windows::linear7) {  // one condition per store, or they would become branches
        if (columns_[half] > 0) reinterpret_cast<uint16_t*>(target)[0] = static_cast<uint16_t>(values.half[half]);
        if (columns_[half] > 1) reinterpret_cast<uint16_t*>(target)[1] = static_cast<uint16_t>(values.half[half] >> 16);
        continue;
      }
      if (INSIDE ? rows_[half] <= 0 : static_cast<unsigned>(row) >= static_cast<unsigned>(rows_[half])) continue;
      if (WINDOWS != Windows::any || columns_[half] == 4) {
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
  FFNET_DEVICE InsideMask(int h, int w, const Window (&windows)[2], int lane) : height_(h) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int left = w - windows[half].column - lane % 4 * 2;
      columns_[half] = !windows[half].exists || left <= 0 ? 0 : left == 1 ? 0xffffu : 0xffffffffu;
      row_[half] = windows[half].row;
    }
  }

  // `row` of the segment; INSIDE says that the plane has it.
  template <bool INSIDE = false>
  FFNET_DEVICE RowPair apply(int row, RowPair values) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      values.half[half] &=
          INSIDE || static_cast<unsigned>(row_[half] + row) < static_cast<unsigned>(height_) ? columns_[half] : 0;
    return values;
  }

 private:
  uint32_t columns_[2];
  int row_[2], height_;
};

#endif  // FFNET_HAS_SM80

}  // namespace ffnet
