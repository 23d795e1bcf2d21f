// How kernels go through the maps: which panels a warp takes, and the ring in shared memory that their rows arrive in.
#pragma once

#include <type_traits>

#include "band.h"
#include "linear.h"
#include "schedule.h"
#include "storage.h"

namespace ffnet {

constexpr int kStreamWarps = 4;  // of a block; they share nothing

// How many panels a warp does in turn with the same filter.
struct StreamSplit {
  int splits;  // of a channel's panels
  int panels;  // of a split
};

// Splits for multiprocessors on which `resident` blocks run at once: those that leave the busiest one the least to do.
// A block takes `panel_rows` a panel and `start_rows` to fetch its filters and first rows. One block alone takes
// longer, since nothing runs while it waits, and two take a little longer than three. Among equals, the fewest splits.
inline StreamSplit stream_split(int panels, int64_t channels, int panel_rows, int start_rows, int resident,
                                const Device& device) {
  const int64_t slots = int64_t{resident} * device.multiprocessors;
  const int64_t wave = std::max<int64_t>(1, slots * kStreamWarps / channels);  // splits that fill the slots once
  const int64_t most = std::min<int64_t>(panels, 4 * wave + 1), step = std::max<int64_t>(1, wave / 64);
  StreamSplit best{1, panels};
  double least = 0.0;
  for (int64_t wanted = std::min(std::max<int64_t>(1, wave / 4), most); wanted <= most; wanted += step) {
    const int a_split = static_cast<int>((panels + wanted - 1) / wanted), splits = (panels + a_split - 1) / a_split;
    const int64_t blocks = (splits * channels + kStreamWarps - 1) / kStreamWarps;
    const int64_t fullest = (blocks + device.multiprocessors - 1) / device.multiprocessors;
    const int64_t last = fullest % resident;  // blocks that run at the end
    const double idle = last == 1 ? 0.6 : last == 2 ? 0.2 : 0.0;
    const double cost = (fullest + idle) * (static_cast<double>(a_split) * panel_rows + start_rows);
    if (least == 0.0 || cost < least) least = cost, best = {splits, a_split};
  }
  return best;
}

// With few images and channels, schedulers are idle: then the rows of a plane are divided, too, as long as that makes
// the way down a panel, including the `overlap` rows that segments read twice, a quarter shorter.
inline PanelShape stream_shape(int64_t n, int rows, int columns, int64_t channels, int overlap, const Device& device) {
  PanelShape best = panel_shape(n, rows, columns, 1);
  const int64_t schedulers = int64_t{4} * device.multiprocessors;
  int steps = rows + overlap / 2;
  for (int segments = 2; best.panels * channels < 2 * schedulers && rows / segments >= 8; segments *= 2) {
    const PanelShape shape = panel_shape(n, rows, columns, segments);
    if (4 * (shape.segment_rows + overlap) > 3 * steps) break;
    best = shape, steps = shape.segment_rows + overlap;
  }
  return best;
}

// The stages of a map that a kernel of such windows and schedules has in shared memory.
template <int K, Windows WINDOWS, class ROWS>
struct StreamRing {
  static constexpr bool kWhole = linear_width(WINDOWS) > 0 && ROWS::kPlane;  // a stage is a whole plane
  static constexpr int kRows = kWhole ? ROWS::kHeight : K;                   // of a stage
  static constexpr int kStages = kWhole && kRows > K ? 2 : ffnet::kStages<K>;
  static constexpr int kBytes = kStages * kRows * kRowBytes;
};

// The parameters of every streaming kernel; `Parameters` of each derive from it.
struct StreamParameters {
  PanelShape shape;
  StreamRows rows;
  StreamSplit split;
  int64_t channels;  // of the result
};

// Chooses the splits that suit a streaming kernel, whose warps take `warp_bytes` of shared memory, and its grid.
template <int K, class Parameters>
Grid plan_stream(void (*kernel)(Parameters), Parameters& p, int warp_bytes, const Device& device) {
  Grid grid;
  grid.threads = kStreamWarps * kWarp;
  grid.shared_bytes = static_cast<size_t>(kStreamWarps) * warp_bytes;
  const int resident = resident_blocks(reinterpret_cast<const void*>(kernel), grid.threads, grid.shared_bytes);
  constexpr int kStartRows = K + 6;  // by the instructions before the first panel
  p.split = stream_split(p.shape.panels, p.channels, p.rows.input_end, kStartRows, resident, device);
  grid.x = (p.split.splits * p.channels + kStreamWarps - 1) / kStreamWarps;
  return grid;
}

template <int K, class Parameters>
void start_stream(const char* name, void (*kernel)(Parameters), Parameters p, int warp_bytes, const Device& device) {
  const Grid grid = plan_stream<K>(kernel, p, warp_bytes, device);
  launch(name, kernel, grid, p, device.stream);
}

#if FFNET_HAS_SM80

// A warp's share of a kernel: panels of a channel, and shared memory.
struct StreamTask {
  int lane, split, begin, end;  // panels
  int64_t channel;
  unsigned char* memory;

  FFNET_DEVICE StreamTask(const StreamParameters& p, int warp_bytes) : lane(thread_index() % kWarp) {
    const int warp = thread_index() / kWarp;
    const int64_t task = int64_t{block_x()} * kStreamWarps + warp;
    channel = task % p.channels;
    split = static_cast<int>(task / p.channels);
    begin = split * p.split.panels;
    end = static_cast<int>(smaller(p.shape.panels, begin + int64_t{p.split.panels}));
    memory = shared_memory() + warp * warp_bytes;
  }
  // The last block may have more warps than there are tasks.
  FFNET_DEVICE bool exists(const StreamParameters& p) const { return split < p.split.splits; }
};

// What a stream reads: a map's plane of a channel, and which of its rows comes first.
struct Source {
  const Plane& plane;
  int64_t channel;
  int first_row;
};

// How ROWS rows of a map get into a stage, and where they are found there, if not as rows of windows.
template <int ROWS, Windows WINDOWS, int WIDTH = linear_width(WINDOWS)>
struct StageLayout {
  using Copies = LinearCopies<ROWS, WIDTH>;
  using Places = LinearPlaces<ROWS, WIDTH>;
};
template <int ROWS, Windows WINDOWS>
struct StageLayout<ROWS, WINDOWS, 0> {
  using Copies = RowCopies<ROWS, WINDOWS>;
  struct Places {};
};

// The rows of MAPS maps, a turn of K rows of each at a time, for one panel after another. Meanwhile the next turns are
// in flight, also across the end of a panel. Whole planes that arrive as they lie in memory are a stage each.
template <int K, Windows WINDOWS, int MAPS, class ROWS>
class RowStream {
  using Ring = StreamRing<K, WINDOWS, ROWS>;

 public:
  // `sources` must outlive the stream.
  FFNET_DEVICE RowStream(const PanelShape& shape, const Source* sources, int turns, const StreamTask& task)
      : shape_(shape),
        sources_(sources),
        slot_(shape, task.lane / 2 % kWindow),
        memory_(task.memory),
        lane_(task.lane),
        turns_(turns),
        panel_(task.begin),
        end_(task.end) {
    open_panel();
    for (int stage = 0; stage < Ring::kStages - 1; ++stage) {
      if constexpr (Ring::kWhole) {
        if (stage > 0) ++panel_, open_panel();
        fetch_maps<WholePlane, WholePlane>();
      } else {
        fetch<CheckedTurn>();
      }
    }
  }

  // Waits for the rows of the next turn, which `turn` is.
  template <class TURN>
  FFNET_DEVICE void advance(const TURN&) {
    if constexpr (Ring::kWhole && !TURN::kFirst) return;
    wait_for_copies<Ring::kStages - 2>();
    sync_warp();
    read_ = memory_ + next_offset(write_offset_);
    if constexpr (kLinear) {
#pragma unroll
      for (int m = 0; m < MAPS; ++m) places_[m].open_stage(read_ + m * Ring::kBytes, lane_);
    }
    if constexpr (Ring::kWhole) {
      ++panel_;
      open_panel();
      fetch_maps<WholePlane, WholePlane>();
    } else {
      fetch<TURN>();
    }
  }

  // The turns that follow are those of a panel of these windows.
  FFNET_DEVICE void begin_panel([[maybe_unused]] const Window (&windows)[2]) {
    if constexpr (kLinear) {
#pragma unroll
      for (int m = 0; m < MAPS; ++m)
        places_[m].open_panel(sources_[m].plane, windows, sources_[m].channel, first_row(m));
    }
  }

  // The lane's part of row `i` of the turn, which is row `row` of its plane.
  FFNET_DEVICE RowPair row(int map, int i, [[maybe_unused]] int row) const {
    if constexpr (kLinear) {
      return places_[map].row(Ring::kWhole ? row : i);
    } else {
      const auto* words = reinterpret_cast<const uint32_t*>(read_ + map * Ring::kBytes + i * kRowBytes);
      return {{words[lane_], words[kWarp + lane_]}};
    }
  }

  FFNET_DEVICE void close() { wait_for_copies<0>(); }

 private:
  static constexpr bool kLinear = linear_width(WINDOWS) > 0;
  using Layout = StageLayout<Ring::kRows, WINDOWS>;
  using WholePlane = KnownRows<Ring::kRows, 0, Ring::kRows>;

  FFNET_DEVICE static int next_offset(int offset) {
    const int next = offset + Ring::kRows * kRowBytes;
    return next < Ring::kBytes ? next : 0;
  }

  // Of a map, in the first stage of a panel.
  FFNET_DEVICE int first_row(int map) const { return Ring::kWhole ? 0 : sources_[map].first_row; }

  FFNET_DEVICE void open_panel() {
    Window window = slot_.at(shape_, panel_, lane_ / 2 / kWindow);
    window.exists &= panel_ < end_;
#pragma unroll
    for (int m = 0; m < MAPS; ++m)
      copies_[m].start(sources_[m].plane, window, sources_[m].channel, first_row(m), lane_);
  }

  template <class TURN>
  FFNET_DEVICE void fetch() {
    if (TURN::kOpens == Opens::always || (TURN::kOpens == Opens::ask && turn_ == turns_)) {
      turn_ = 0, ++panel_;
      open_panel();
    }
    ++turn_;
    fetch_maps<typename TURN::template Fetched<0>, typename TURN::template Fetched<1>>();
  }

  template <class FIRST, class SECOND>
  FFNET_DEVICE void fetch_maps() {
    fetch_map<0, FIRST>();
    if constexpr (MAPS > 1) fetch_map<1, SECOND>();
    commit_copies();
    write_offset_ = next_offset(write_offset_);
  }

  template <int MAP, class KNOWN>
  FFNET_DEVICE void fetch_map() {
    copies_[MAP].template fetch<KNOWN>(sources_[MAP].plane, memory_ + MAP * Ring::kBytes + write_offset_, lane_);
  }

  const PanelShape& shape_;
  const Source* sources_;
  WindowSlot slot_;
  typename Layout::Copies copies_[MAPS];
  typename Layout::Places places_[MAPS];
  unsigned char *memory_, *read_ = nullptr;
  int lane_, turns_, turn_ = 0, panel_, end_, write_offset_ = 0;
};

// The two windows of a panel whose elements a lane holds.
class LaneWindows {
 public:
  FFNET_DEVICE LaneWindows(const PanelShape& p, int lane) : slot_(p, lane / 4) {}
  FFNET_DEVICE void at(const PanelShape& p, int panel, Window (&windows)[2]) const {
    windows[0] = slot_.at(p, panel, 0), windows[1] = slot_.at(p, panel, 1);
  }
  FFNET_DEVICE bool lend() const { return slot_.lends(); }

 private:
  WindowSlot slot_;
};

#endif  // FFNET_HAS_SM80

// What a call allows its kernel to know.
struct KernelChoice {
  Dtype dtype;
  int filter_rows;
  bool known_rows;  // results as high as the input, and as far behind it as lag_of_known_rows says
  int unit;         // the least of all planes
};

// Calls `body(element, rows of the filter, windows, schedule)` with the leanest kernel that fits. Schedules that are
// known to the compiler are there for maps that networks have: 7, 8, 14, 16, 28, 32, 56 and 64 rows, with others of
// the same remainders.
template <class Body>
void with_stream_kernel(const KernelChoice& choice, const PanelShape& shape, const Body& body) {
  const auto with_windows = [&](auto element, auto k, auto windows, auto... known) {
    [[maybe_unused]] const auto called = [&](auto rows) {
      const bool takes = decltype(rows)::template takes<k()>(shape.segment_rows);
      if (takes) body(element, k, windows, rows);
      return takes;
    };
    if (choice.known_rows && shape.segments == 1 && (... || called(known))) return;
    constexpr Windows kWindows = linear_width(windows()) > 0 ? Windows::any : windows();
    body(element, k, std::integral_constant<Windows, kWindows>{}, AnyRows{});
  };
  const auto alone = std::integral_constant<Windows, Windows::alone>{};
  const auto aligned = std::integral_constant<Windows, Windows::aligned>{};
  const auto linear7 = std::integral_constant<Windows, Windows::linear7>{};
  const auto linear14 = std::integral_constant<Windows, Windows::linear14>{};
  const auto linear28 = std::integral_constant<Windows, Windows::linear28>{};
  const auto any = std::integral_constant<Windows, Windows::any>{};
  const auto k3 = std::integral_constant<int, 3>{};
  const auto k7 = std::integral_constant<int, 7>{};
  with_16_bit_storage(choice.dtype, [&](auto element) {
    const bool low = choice.filter_rows <= 3;
    if (choice.unit == 16 && shape.windows == 1)
      low ? with_windows(element, k3, alone) : with_windows(element, k7, alone, PlaneRows<8>{});
    else if (choice.unit == 16)
      low ? with_windows(element, k3, aligned, HighRows<1>{}, HighRows<2>{})
          : with_windows(element, k7, aligned, PlaneRows<16>{}, HighRows<0>{}, HighRows<1>{}, HighRows<4>{});
    else if (choice.unit >= 4 && shape.w == 28)
      low ? with_windows(element, k3, linear28, HighRows<1>{}) : with_windows(element, k7, linear28, HighRows<0>{});
    else if (choice.unit >= 4 && shape.w == 14 && !low)
      with_windows(element, k7, linear14, PlaneRows<14>{});
    else if (shape.w == 7 && !low)
      with_windows(element, k7, linear7, PlaneRows<7>{});
    else
      low ? with_windows(element, k3, any) : with_windows(element, k7, any);
  });
}

}  // namespace ffnet
