// The backward of attention_backward.cu for whole planes of 7, 8 or 16 rows, filters of 7 rows and GELU. A panel is
// computed in two phases, each of which fits into the registers: first the hidden map and its gradient, rounded, go to
// shared memory; then the gradients of the query and of both filters are computed from there. The planes of a panel
// stay in shared memory for both; the second phase replaces their rows by those of the next panel as soon as it has
// read them.
#include "attention_backward.h"

namespace ffnet {
namespace {

constexpr int kRows = 7;           // of a filter
constexpr int kReach = kRows / 2;  // rows above and below its own that a result reads

// Rows that arrive together: the whole plane where it arrives as it lies in memory.
template <Windows WINDOWS, int HEIGHT>
constexpr int kChunk = linear_width(WINDOWS) > 0 ? HEIGHT : 4;

// A filter as pairs of neighbouring taps of a row, from which each lane takes those of its part of the banded matrix:
// a fifth of the matrix itself (band.h).
class TapPairs {
 public:
  static constexpr int kBefore = 11, kPairs = 26;        // of a row; before the one that begins with the first tap
  static constexpr int kBytes = kRows * kPairs * 4 + 8;  // filled up to a multiple of 16

  FFNET_DEVICE static void store(unsigned char* memory, const FilterView& f, int64_t output, int lane) {
    const int kx = lane - kBefore, x = f.mirrored ? f.kw - 1 - kx : kx;
    const bool exists = kx >= 0 && kx < f.kw;
    const uint16_t* source = f.data + output * f.output + (f.mirrored ? kRows - 1 : 0) * f.y + (exists ? x * f.x : 0);
    const int64_t step = f.mirrored ? -f.y : f.y;
    auto* target = reinterpret_cast<uint32_t*>(memory) + lane;
#pragma unroll
    for (int ky = 0; ky < kRows; ++ky) {
      const uint32_t tap = exists ? *source : 0, next = shuffle(tap, lane + 1);
      if (lane < kPairs) target[ky * kPairs] = tap | next << 16;
      source += step;
    }
  }
};

// Rows of a filter as a lane needs them, in registers.
template <bool HALO>
class LoadedFilter {
 public:
  FFNET_DEVICE LoadedFilter(const unsigned char* memory, const FilterView& f, int lane) {
    const int n = lane / 4, t = lane % 4;
    const auto* pairs = reinterpret_cast<const uint32_t*>(memory) + TapPairs::kBefore + f.pad_left - n + 2 * t;
#pragma unroll
    for (int ky = 0; ky < kRows; ++ky) {
      rows_[ky].own = pairs[ky * TapPairs::kPairs];
      if constexpr (HALO) rows_[ky].outer = pairs[ky * TapPairs::kPairs + (t < 2 ? -4 : 4)];
    }
  }
  FFNET_DEVICE Band row(int ky) const { return rows_[ky]; }

 private:
  Band rows_[kRows];
};

// Four planes of a panel in shared memory: two that arrive, and two that the kernel writes.
template <int HEIGHT>
struct Planes {
  static constexpr int kMapBytes = (HEIGHT + HEIGHT % 2) * kRowBytes;
  static constexpr int kBytes = 4 * kMapBytes + 3 * TapPairs::kBytes;
  enum Map { query, gradient, hidden, hidden_grad };

  unsigned char* memory;
  int lane;

  FFNET_DEVICE unsigned char* row(int map, int y) const { return memory + map * kMapBytes + y * kRowBytes; }
  FFNET_DEVICE unsigned char* filter(int i) const { return memory + 4 * kMapBytes + i * TapPairs::kBytes; }
  // The lane's part of a row.
  FFNET_DEVICE RowPair read(int map, int y) const {
    const auto* words = reinterpret_cast<const uint32_t*>(row(map, y));
    return {{words[lane], words[kWarp + lane]}};
  }
  FFNET_DEVICE void write(int map, int y, RowPair values) const {
    auto* words = reinterpret_cast<uint32_t*>(row(map, y));
    words[lane] = values.half[0], words[kWarp + lane] = values.half[1];
  }
  // A row of this map and of the next one, transposed.
  FFNET_DEVICE void read_transposed(int map, int y, RowPair& first, RowPair& second) const {
    uint32_t r[4];
    load_matrices_transposed(r, row(map + lane / 16, y) + lane % 16 * (kWindow * 2));
    first = {{r[0], r[1]}}, second = {{r[2], r[3]}};
  }
};

// For the rows that a fresh row of a plane is multiplied with.
template <int HEIGHT>
struct PlaneTurn {
  int y;
  FFNET_DEVICE constexpr bool reads(int, int ky) const { return y - kReach + ky >= 0 && y - kReach + ky < HEIGHT; }
};

template <class T, Windows WINDOWS, class ROWS>
FFNET_KERNEL(kStreamWarps* kWarp, has_neighbours(WINDOWS) ? 2 : 3 - FFNET_FEWER_BLOCKS)
attention_backward_planes_kernel(FFNET_PARAMETER AttentionBackwardParameters p) {
#if FFNET_HAS_SM80
  constexpr bool HALO = has_neighbours(WINDOWS);
  constexpr int HEIGHT = ROWS::kHeight, kRowsAtOnce = kChunk<WINDOWS, HEIGHT>;
  constexpr int kChunks = (HEIGHT + kRowsAtOnce - 1) / kRowsAtOnce;
  constexpr bool kLinear = linear_width(WINDOWS) > 0;
  using Buffer = Planes<HEIGHT>;
  const StreamTask task(p, Buffer::kBytes);
  if (!task.exists(p)) return;
  const int lane = task.lane;
  const int64_t channel = task.channel;
  const Buffer planes{task.memory, lane};
  const Neighbours neighbours(p.shape, lane);
  const auto around = [&](RowPair row) { return HALO ? neighbours.of(row) : RowPair{}; };
  const float key_bias = p.key_bias ? to_float(T{p.key_bias[channel]}) : 0.0f;
  const float scale = p.scale ? to_float(T{p.scale[channel]}) : 1.0f;

  const WindowSlot slot(p.shape, lane / 2 % kWindow);
  using Layout = StageLayout<kRowsAtOnce, WINDOWS>;
  typename Layout::Copies copies[2];
  typename Layout::Places places[2];
  const auto open = [&](int panel) {
    Window window = slot.at(p.shape, panel, lane / 2 / kWindow);
    window.exists &= panel < task.end;
    copies[0].start(p.query, window, channel, 0, lane), copies[1].start(p.gradient, window, channel, 0, lane);
  };
  const auto fetch = [&](auto chunk) FFNET_INLINE_LAMBDA {
    constexpr int first = kRowsAtOnce * decltype(chunk)::value;
    using Rows = KnownRows<kRowsAtOnce, first, HEIGHT>;
    copies[0].template fetch<Rows>(p.query, planes.row(Buffer::query, first), lane);
    copies[1].template fetch<Rows>(p.gradient, planes.row(Buffer::gradient, first), lane);
    commit_copies();
  };
  open(task.begin);
  for_each_constant<kChunks>(fetch);
  // Loaded after the first rows have been requested, so that both are in flight.
  TapPairs::store(planes.filter(0), p.key, channel, lane);
  TapPairs::store(planes.filter(1), p.value_mirrored, channel, lane);
  TapPairs::store(planes.filter(2), p.key_mirrored, channel, lane);
  sync_warp();

  const LaneWindows lane_windows(p.shape, lane);
  FilterSums<T, kRows, HALO> key_grad, value_grad;
  MapSums<T> bias_grads;
#pragma unroll 1
  for (int panel = task.begin; panel < task.end; ++panel) {
    Window windows[2];
    lane_windows.at(p.shape, panel, windows);
    if constexpr (kLinear) {
      places[0].open_panel(p.query, windows, channel, 0), places[1].open_panel(p.gradient, windows, channel, 0);
      places[0].open_stage(planes.row(Buffer::query, 0), lane);
      places[1].open_stage(planes.row(Buffer::gradient, 0), lane);
    }
    const auto arrived = [&](int map, int y) FFNET_INLINE_LAMBDA {
      if constexpr (kLinear)
        return places[map].row(y);
      else
        return planes.read(map, y);
    };
    {
      const LoadedFilter<HALO> key(planes.filter(0), p.key, lane), value(planes.filter(1), p.value_mirrored, lane);
      const InsideMask inside(HEIGHT, p.shape.w, windows, lane);
      RollingSums<T, kRows, HALO> middle(key_bias), middle_grad(0.0f);
      for_each_constant<HEIGHT + kReach>([&](auto step) FFNET_INLINE_LAMBDA {
        constexpr int y = decltype(step)::value, i = y % kRows;
        if constexpr (y < HEIGHT && y % kRowsAtOnce == 0) {
          wait_for_copies<kChunks - 1 - y / kRowsAtOnce>();
          sync_warp();
        }
        if constexpr (y < HEIGHT) {
          const RowPair query = arrived(Buffer::query, y), gradient = arrived(Buffer::gradient, y);
          middle.add(i, key, query, around(query));
          middle_grad.add(i, value, gradient, around(gradient));
        }
        if constexpr (y >= kReach) {
          const float (&sum)[4] = middle.complete(i), (&sum_grad)[4] = middle_grad.complete(i);
          float grad[4], active[4];
          derivative_gelu(p.activation, sum, grad, active);
#pragma unroll
          for (int e = 0; e < 4; ++e) grad[e] *= scale * sum_grad[e];
          RowPair hidden{{pack<T>(active[0], active[1]), pack<T>(active[2], active[3])}},
              hidden_grad{{pack<T>(grad[0], grad[1]), pack<T>(grad[2], grad[3])}};
          if constexpr (kLinear)
            hidden = inside.template apply<true>(0, hidden), hidden_grad = inside.template apply<true>(0, hidden_grad);
          planes.write(Buffer::hidden, y - kReach, hidden);
          planes.write(Buffer::hidden_grad, y - kReach, hidden_grad);
        }
      });
    }
    sync_warp();

    const LoadedFilter<HALO> key_mirrored(planes.filter(2), p.key_mirrored, lane);
    const RowWriter<WINDOWS> query_grad(p.shape, p.query_grad, windows, false, channel, lane);
    RollingSums<T, kRows, HALO> result(0.0f);
    key_grad.open_panel(), value_grad.open_panel();
    const auto keep = [&](int y) FFNET_INLINE_LAMBDA {
      RowPair query, gradient;
      if constexpr (kLinear)
        query = transposed(arrived(Buffer::query, y)), gradient = transposed(arrived(Buffer::gradient, y));
      else
        planes.read_transposed(Buffer::query, y, query, gradient);
      key_grad.keep_transposed(y % kRows, query), value_grad.keep_transposed(y % kRows, gradient);
    };
    keep(0), keep(1), keep(2);
    open(panel + 1);
    for_each_constant<HEIGHT + kReach>([&](auto step) FFNET_INLINE_LAMBDA {
      constexpr int y = decltype(step)::value, i = y % kRows;
      if constexpr (y + kReach < HEIGHT) keep(y + kReach);
      // The last row of a chunk, or of the plane, has been kept: all its rows have been read.
      constexpr int last = y + kReach, chunk = last / kRowsAtOnce;
      if constexpr (last == HEIGHT - 1 || (last < HEIGHT && last % kRowsAtOnce == kRowsAtOnce - 1)) {
        sync_warp();
        fetch(std::integral_constant<int, chunk>{});
      }
      if constexpr (y < HEIGHT) {
        const RowPair hidden_grad = planes.read(Buffer::hidden_grad, y), outer = around(hidden_grad);
        result.add(i, key_mirrored, hidden_grad, outer);
        RowPair columns, columns_grad;
        planes.read_transposed(Buffer::hidden, y, columns, columns_grad);
        constexpr int newest = (y + kReach) % kRows;
        key_grad.add(newest, PlaneTurn<HEIGHT>{y}, {columns_grad, HALO ? transposed(outer) : RowPair{}});
        RowPair hidden_outer{};
        if constexpr (HALO) hidden_outer = transposed(around(planes.read(Buffer::hidden, y)));
        value_grad.add(newest, PlaneTurn<HEIGHT>{y}, {columns, hidden_outer});
        bias_grads.add(columns_grad, value_grad.kept(y % kRows));
      }
      if constexpr (y >= kReach) {
        const float (&sum)[4] = result.complete(i);
        query_grad.template write<true>(y - kReach, {{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])}});
      }
    });
  }
  wait_for_copies<0>();
  sync_warp();
  store_attention_gradients(p, task, key_grad, value_grad, bias_grads);
#endif
}

}  // namespace

bool attention_backward_of_planes(const KernelChoice& choice, AttentionBackwardParameters& p, bool start,
                                  const Device& device) {
  if (!choice.known_rows || choice.filter_rows != kRows || p.shape.segments > 1) return false;
  const auto take = [&](auto windows, auto rows) {
    with_16_bit_storage(choice.dtype, [&](auto element) {
      const auto kernel = attention_backward_planes_kernel<decltype(element), windows(), decltype(rows)>;
      const Grid grid = plan_stream<kRows>(kernel, p, Planes<decltype(rows)::kHeight>::kBytes, device);
      if (start) launch("attention_backward_planes_kernel", kernel, grid, p, device.stream);
    });
    return true;
  };
  const int height = p.shape.segment_rows;
  if (choice.unit == 16 && height == 8 && p.shape.windows == 1)
    return take(std::integral_constant<Windows, Windows::alone>{}, PlaneRows<8>{});
  if (choice.unit == 16 && height == 16)
    return take(std::integral_constant<Windows, Windows::aligned>{}, PlaneRows<16>{});
  if (p.shape.w == 7 && height == 7) return take(std::integral_constant<Windows, Windows::linear7>{}, PlaneRows<7>{});
  return false;
}

}  // namespace ffnet
