// The schedule of kernels that stream panels through one or two convolutions: at step k the row first + k of the input
// arrives, row - q1 of the first convolution is complete, and row - q1 - q2 of the second; q is how many rows of the
// input below its own a result needs.
#pragma once

#include <type_traits>

#include "band.h"
#include "storage.h"

namespace ffnet {

constexpr int kStreamWarps = 4;  // of a block; they share nothing

struct StreamRows {
  int first;                     // row of the input at step 0, relative to the segment
  int input_end;                 // steps from here on bring padding only
  int middle_begin, middle_end;  // steps that complete a row of the first convolution that the second reads
  int output_begin;              // the step that completes row 0 of the result
  int lag_middle, lag_output;    // rows between the input's and the completed ones
  int steps;
};

// For one convolution p2 = q2 = 0.
inline StreamRows stream_rows(const PanelShape& p, int input_rows, int middle_rows, int p1, int q1, int p2, int q2) {
  const bool whole = p.segments == 1;  // a whole plane has only padding above its first row and below its last
  StreamRows s{};
  s.lag_middle = q1, s.lag_output = q1 + q2;
  s.first = whole ? 0 : -(p1 + p2);
  s.input_end = (whole ? input_rows : p.segment_rows + q1 + q2) - s.first;
  s.middle_begin = (whole ? 0 : -p2) + q1 - s.first;
  s.middle_end = (whole ? middle_rows : p.segment_rows + q2) + q1 - s.first;
  s.output_begin = q1 + q2 - s.first;
  s.steps = s.output_begin + p.segment_rows;
  return s;
}

// How many panels a warp does in turn with the same filter.
struct StreamSplit {
  int splits;  // of a channel's panels
  int panels;  // of a split
};

// Warps that keep a GPU busy: more would only fetch filters more often.
inline int64_t busy_warps(const Device& device) { return int64_t{16} * device.multiprocessors; }

inline StreamSplit stream_split(const PanelShape& p, int64_t channels, const Device& device) {
  const int wanted = static_cast<int>(std::clamp<int64_t>(busy_warps(device) / channels, 1, p.panels));
  const int panels = (p.panels + wanted - 1) / wanted;
  return {(p.panels + panels - 1) / panels, panels};
}

// Few images and channels leave warps idle: then the rows of a plane are divided too, at the price of their overlap.
inline PanelShape stream_shape(int64_t n, int rows, int columns, int64_t channels, const Device& device) {
  PanelShape best = panel_shape(n, rows, columns, 1);
  for (int segments = 2; best.panels * channels < busy_warps(device) && rows / segments >= 8; segments *= 2)
    best = panel_shape(n, rows, columns, segments);
  return best;
}

// A stage is as many rows as the loop over steps is unrolled: it waits and fetches once a turn.
template <int K>
constexpr int kStages = K == 7 ? 3 : 5;
template <int K>
constexpr int kRingBytes = kStages<K> * K * kRowBytes;

template <int K>
Grid stream_grid(const StreamSplit& split, int64_t channels, int maps) {
  Grid grid;
  grid.x = (split.splits * channels + kStreamWarps - 1) / kStreamWarps;
  grid.threads = kStreamWarps * kWarp;
  grid.shared_bytes = static_cast<size_t>(kStreamWarps) * maps * kRingBytes<K>;
  return grid;
}

#if FFNET_HAS_SM80

// What a stream reads: a map's plane of a channel, and which of its rows comes first.
struct Source {
  const Plane& plane;
  int64_t channel;
  int first_row;
};

// The rows of MAPS maps, a turn of K rows of each at a time, for one panel after the other; the next turns are on their
// way meanwhile, across the end of a panel too. The last map may have no data.
template <int K, bool ALIGNED, int MAPS>
class RowStream {
 public:
  // `sources` must outlive the stream.
  FFNET_DEVICE RowStream(const PanelShape& shape, const Source* sources, int turns, int first_panel, int end_panel,
                         unsigned char* memory, int lane)
      : shape_(shape),
        sources_(sources),
        slot_(shape, lane / 2 / kWindow, lane / 2 % kWindow),
        memory_(memory),
        lane_(lane),
        turns_(turns),
        panel_(first_panel),
        end_(end_panel) {
    open_panel();
    for (int stage = 0; stage < kStages<K> - 1; ++stage) fetch();
  }

  // Waits for the next turn's rows.
  FFNET_DEVICE void advance() {
    wait_for_copies<kStages<K> - 2>();
    sync_warp();
    read_ = memory_ + next_offset(write_offset_);
    fetch();
  }

  // The lane's part of row `i` of the turn.
  FFNET_DEVICE RowPair row(int map, int i) const {
    const auto* words = reinterpret_cast<const uint32_t*>(read_ + map * kRingBytes<K> + i * kRowBytes);
    return {{words[lane_], words[kWarp + lane_]}};
  }

  FFNET_DEVICE void close() { wait_for_copies<0>(); }

 private:
  FFNET_DEVICE static int next_offset(int offset) {
    const int next = offset + K * kRowBytes;
    return next < kRingBytes<K> ? next : 0;
  }

  FFNET_DEVICE bool has(int map) const { return map + 1 < MAPS || MAPS == 1 || sources_[map].plane.data; }

  FFNET_DEVICE void open_panel() {
    Window window = slot_.at(shape_, panel_);
    window.exists &= panel_ < end_;
#pragma unroll
    for (int m = 0; m < MAPS; ++m)
      if (has(m)) copies_[m].start(sources_[m].plane, window, sources_[m].channel, sources_[m].first_row, lane_);
  }

  FFNET_DEVICE void fetch() {
    if (turn_ == turns_) {
      turn_ = 0, ++panel_;
      open_panel();
    }
    ++turn_;
#pragma unroll
    for (int m = 0; m < MAPS; ++m)
      if (has(m)) copies_[m].fetch(sources_[m].plane, memory_ + m * kRingBytes<K> + write_offset_, lane_);
    commit_copies();
    write_offset_ = next_offset(write_offset_);
  }

  const PanelShape& shape_;
  const Source* sources_;
  WindowSlot slot_;
  RowCopies<K, ALIGNED> copies_[MAPS];
  unsigned char *memory_, *read_ = nullptr;
  int lane_, turns_, turn_ = 0, panel_, end_, write_offset_ = 0;
};

// The two windows of a panel whose elements a lane holds.
class LaneWindows {
 public:
  FFNET_DEVICE LaneWindows(const PanelShape& p, int lane) : first_(p, 0, lane / 4), second_(p, 1, lane / 4) {}
  FFNET_DEVICE void at(const PanelShape& p, int panel, Window (&windows)[2]) const {
    windows[0] = first_.at(p, panel), windows[1] = second_.at(p, panel);
  }
  FFNET_DEVICE bool lend() const { return first_.lends(); }

 private:
  WindowSlot first_, second_;
};

#endif  // FFNET_HAS_SM80

// What the lanes know of the windows when a kernel is compiled.
enum class Windows {
  alone,    // aligned planes one window wide: there are no neighbours
  aligned,  // all planes of unit 16
  any,
};

// Calls `body(element, rows of the filter, windows)` with the leanest kernel that fits, as types.
template <class Body>
void with_stream_kernel(Dtype dtype, int kernel_rows, const PanelShape& shape, bool aligned, const Body& body) {
  const auto with_rows = [&](auto element, auto windows) {
    if (kernel_rows <= 3)
      body(element, std::integral_constant<int, 3>{}, windows);
    else
      body(element, std::integral_constant<int, 7>{}, windows);
  };
  with_16_bit_storage(dtype, [&](auto element) {
    if (!aligned)
      with_rows(element, std::integral_constant<Windows, Windows::any>{});
    else if (shape.windows > 1)
      with_rows(element, std::integral_constant<Windows, Windows::aligned>{});
    else
      with_rows(element, std::integral_constant<Windows, Windows::alone>{});
  });
}

}  // namespace ffnet
