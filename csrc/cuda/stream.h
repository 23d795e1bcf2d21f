// The schedule of kernels that stream panels through one or two convolutions: at step k the row first + k of the input
// arrives, row - q1 of the first convolution is complete, and row - q1 - q2 of the second; q is how many rows of the
// input below its own a result needs.
#pragma once

#include <type_traits>

#include "band.h"

namespace ffnet {

constexpr int kStreamWarps = 4;  // of a block; they share nothing

struct StreamRows {
  int first;                       // row of the input at step 0, relative to the segment
  int input_end;                   // steps from here on bring padding only
  int middle_begin, middle_end;    // steps that complete a row of the first convolution that the second reads
  int output_begin;                // the step that completes row 0 of the result
  int lag_middle, lag_output;      // rows between the input's and the completed ones
  int steps;
};

// For one convolution p2 = q2 = 0.
inline StreamRows stream_rows(const PanelShape& p, int input_rows, int p1, int q1, int p2, int q2) {
  const bool whole = p.segments == 1;  // a whole plane has only padding above its first row and below its last
  StreamRows s{};
  s.lag_middle = q1, s.lag_output = q1 + q2;
  s.first = whole ? 0 : -(p1 + p2);
  s.input_end = (whole ? input_rows : p.segment_rows + q1 + q2) - s.first;
  s.middle_begin = (whole ? 0 : -p2) + q1 - s.first;
  s.middle_end = (whole ? p.h : p.segment_rows + q2) + q1 - s.first;
  s.output_begin = q1 + q2 - s.first;
  s.steps = s.output_begin + p.segment_rows;
  return s;
}

// How many blocks stream, and how many panels a warp does in turn with the same filter.
struct StreamSplit {
  int64_t splits;  // of a channel's panels
  int64_t panels;  // of a split
};

// Warps that keep a GPU busy: more would only fetch filters more often.
inline int64_t busy_warps(const Device& device) { return int64_t{16} * device.multiprocessors; }

inline StreamSplit stream_split(const PanelShape& p, int64_t channels, const Device& device) {
  const int64_t wanted = std::clamp<int64_t>(busy_warps(device) / channels, 1, std::max<int64_t>(p.panels, 1));
  const int64_t panels = (p.panels + wanted - 1) / wanted;
  return {(p.panels + panels - 1) / panels, panels};
}

// Few images and channels leave warps idle: then the rows of a plane are divided too, at the price of their overlap.
inline PanelShape stream_shape(int64_t n, int rows, int columns, int64_t channels, const Device& device) {
  PanelShape best = panel_shape(n, rows, columns, 1);
  for (int segments = 2; best.panels * channels < busy_warps(device) && rows / segments >= 8; segments *= 2)
    best = panel_shape(n, rows, columns, segments);
  return best;
}

inline Grid stream_grid(const StreamSplit& split, int64_t channels, int rings) {
  Grid grid;
  grid.x = (split.splits * channels + kStreamWarps - 1) / kStreamWarps;
  grid.threads = kStreamWarps * kWarp;
  grid.shared_bytes = static_cast<size_t>(kStreamWarps) * rings * kRingBytes;
  return grid;
}

template <class T>
struct TypeTag {
  using Type = T;
};

// What the lanes know of the windows when a kernel is compiled.
enum class Windows {
  alone,    // aligned planes one window wide: there are no neighbours
  aligned,  // all planes of unit 16
  any,
};

// Calls `body(type, rows of the filter, windows)` with the leanest kernel that fits, as types.
template <class Body>
void with_stream_kernel(Dtype dtype, int kernel_rows, const PanelShape& shape, bool aligned, const Body& body) {
  const auto with_rows = [&](auto type, auto windows) {
    if (kernel_rows <= 3)
      body(type, std::integral_constant<int, 3>{}, windows);
    else
      body(type, std::integral_constant<int, 7>{}, windows);
  };
  const auto with_halo = [&](auto type) {
    if (!aligned)
      with_rows(type, std::integral_constant<Windows, Windows::any>{});
    else if (shape.windows > 1)
      with_rows(type, std::integral_constant<Windows, Windows::aligned>{});
    else
      with_rows(type, std::integral_constant<Windows, Windows::alone>{});
  };
  dtype == Dtype::float16 ? with_halo(TypeTag<Half>{}) : with_halo(TypeTag<BFloat16>{});
}

}  // namespace ffnet
