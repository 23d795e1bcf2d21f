// Gradients of a depthwise filter and its bias on tensor cores, for 16-bit planes: filter_grad[ky, kx] = Σ gradient[y,
// x] · input[s·y + ky - top, s·x + kx - left] over images, rows and columns.
//
// With 16 windows of 16 columns of the gradient as the depth of a product, gradient' · input is a matrix of 16 columns
// of the gradient by the columns of the input around them, one for each ky; it is summed over all that a warp reads,
// and its diagonals are the taps. A warp streams down its windows; the rows of the input that it needs stay in a ring.
#include "device.h"
#include "panel.h"
#include "storage.h"

namespace ffnet {
namespace {

constexpr int kWgradWarps = 4;
constexpr int kWide = 16;  // columns of a window

struct Parameters {
  Plane x, gradient;
  int64_t n, channels;  // of the gradient
  int multiplier, stride_h, stride_w, pad_top, pad_left, kh, kw;
  int windows, origin;  // windows of a row; column of the input where the first one's chunks begin, a multiple of 4
  int64_t panels, splits, panels_a_split;
  int row_groups;  // of the filter, each by a warp of its own
  float* partials;
};

// ROWS of a filter at once, CHUNKS of 8 columns of the input.
template <int ROWS, int CHUNKS>
struct WgradTile {
  static constexpr int kAhead = 2;  // rows of the gradient that are in flight
  static constexpr int kInputPitch =
      CHUNKS % 2 ? CHUNKS * 16 : CHUNKS * 16 + 16;  // odd multiples of 16: no bank conflicts
  static constexpr int kInputRow = kPanel * kInputPitch;
  static constexpr int kInputRows = ROWS + 2 * (kAhead + 1);  // with stride 2
  static constexpr int kGradientPitch = 48, kGradientRow = kPanel * kGradientPitch, kGradientRows = kAhead + 1;
  static constexpr int kSums = kWide * CHUNKS * 8 * 4;
  static constexpr int kRings = kInputRows * kInputRow + kGradientRows * kGradientRow;
  static constexpr int kBytes = kRings > kSums ? kRings : kSums;
};

#if FFNET_HAS_SM80

// Copies `columns` values, a multiple of 4, from a row of a plane on; zeros where there is no such row or column.
FFNET_DEVICE void copy_run(unsigned char* target, const Plane& plane, const uint16_t* row, bool exists, int column,
                           int columns) {
  for (int e = 0; e < columns; e += 4) {
    const int from = column + e;
    if (plane.unit >= 8) {
      copy_async<8>(target + 2 * e, row + from, exists && from >= 0 && from < plane.w);
    } else if (plane.unit >= 4) {
      copy_async<4>(target + 2 * e, row + from, exists && from >= 0 && from < plane.w);
      copy_async<4>(target + 2 * e + 4, row + from + 2, exists && from + 2 >= 0 && from + 2 < plane.w);
    } else {
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<uint16_t*>(target)[e + i] =
            exists && from + i >= 0 && from + i < plane.w ? row[from + i] : uint16_t{0};
    }
  }
}

#endif

template <class T, int ROWS, int CHUNKS>
FFNET_KERNEL(kWgradWarps* kWarp, 2)
wgrad_kernel(FFNET_PARAMETER Parameters p) {
#if FFNET_HAS_SM80
  using Tile = WgradTile<ROWS, CHUNKS>;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, g = lane / 4, t = lane % 4;
  int64_t task = int64_t{block_x()} * kWgradWarps + warp;
  const int64_t channel = task % p.channels;
  task /= p.channels;
  const int group = static_cast<int>(task % p.row_groups), first_ky = group * ROWS;
  const int64_t split = task / p.row_groups;
  if (split >= p.splits) return;
  unsigned char* inputs = shared_memory() + warp * Tile::kBytes;
  unsigned char* gradients = inputs + Tile::kInputRows * Tile::kInputRow;

  float sums[ROWS][CHUNKS][4] = {}, bias_sum[4] = {};
  const uint32_t one = from_float<T>(1.0f).bits, ones = one | one << 16;

  const int64_t end = smaller(p.panels, (split + 1) * p.panels_a_split);
  for (int64_t panel = split * p.panels_a_split; panel < end; ++panel) {
    // Lane l copies half of window l / 2.
    const int64_t index = panel * kPanel + lane / 2, image = index / p.windows;
    const int window = static_cast<int>(index - image * p.windows), side = lane % 2;
    const bool exists = image < p.n;
    const uint16_t* input_plane = p.x.data + (exists ? image * p.x.n : 0) + channel / p.multiplier * p.x.c;
    const uint16_t* gradient_plane = p.gradient.data + (exists ? image * p.gradient.n : 0) + channel * p.gradient.c;

    int next_row = first_ky - p.pad_top, next_slot = 0;  // of the input, to be copied
    const auto fetch = [&](int y) {
      if (y < p.gradient.h) {
        copy_run(gradients + y % Tile::kGradientRows * Tile::kGradientRow + lane / 2 * Tile::kGradientPitch + side * 16,
                 p.gradient, gradient_plane + int64_t{y} * p.gradient.w, exists, window * kWide + side * 8, 8);
        for (const int last = p.stride_h * y + first_ky + ROWS - 1 - p.pad_top; next_row <= last; ++next_row) {
          const bool inside = exists && static_cast<unsigned>(next_row) < static_cast<unsigned>(p.x.h);
          copy_run(inputs + next_slot * Tile::kInputRow + lane / 2 * Tile::kInputPitch + side * CHUNKS * 8, p.x,
                   input_plane + int64_t{next_row} * p.x.w, inside,
                   p.stride_w * window * kWide + p.origin + side * CHUNKS * 4, CHUNKS * 4);
          next_slot = next_slot + 1 < Tile::kInputRows ? next_slot + 1 : 0;
        }
      }
      commit_copies();
    };
    for (int y = 0; y < Tile::kAhead; ++y) fetch(y);

    int slot = 0;  // of the input row that the group's first row of the filter meets
    for (int y = 0; y < p.gradient.h; ++y) {
      sync_warp();  // the rows that are overwritten next have been read
      fetch(y + Tile::kAhead);
      wait_for_copies<Tile::kAhead>();
      sync_warp();
      uint32_t a[4];
      load_matrices_transposed(a, gradients + y % Tile::kGradientRows * Tile::kGradientRow +
                                      (lane % 8 + lane / 16 * 8) * Tile::kGradientPitch + lane / 8 % 2 * 16);
      if (group == 0) multiply_16x8x16<T>(bias_sum, a[0], a[1], a[2], a[3], ones, ones, bias_sum);
      int row_slot = slot;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const unsigned char* row = inputs + row_slot * Tile::kInputRow + lane % 16 * Tile::kInputPitch;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
          uint32_t b[4];
          const int second = c + 1 < CHUNKS ? lane / 16 : 0;  // the last of an odd number is loaded twice
          load_matrices_transposed(b, row + (c + second) * 16);
          multiply_16x8x16<T>(sums[i][c], a[0], a[1], a[2], a[3], b[0], b[1], sums[i][c]);
          if (c + 1 < CHUNKS) multiply_16x8x16<T>(sums[i][c + 1], a[0], a[1], a[2], a[3], b[2], b[3], sums[i][c + 1]);
        }
        row_slot = row_slot + 1 < Tile::kInputRows ? row_slot + 1 : 0;
      }
      slot += p.stride_h;
      if (slot >= Tile::kInputRows) slot -= Tile::kInputRows;
    }
    wait_for_copies<0>();
    sync_warp();
  }

  // Diagonals: column x of the gradient meets column s·x + kx - left of the input.
  auto* matrix = reinterpret_cast<float*>(inputs);
  float* partials = p.partials + (split * p.channels + channel) * (p.kh * p.kw + 1);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) matrix[(g + e / 2 * 8) * CHUNKS * 8 + c * 8 + 2 * t + e % 2] = sums[i][c][e];
    sync_warp();
    if (first_ky + i < p.kh)
      for (int kx = lane; kx < p.kw; kx += kWarp) {
        float sum = 0.0f;
        for (int x = 0; x < kWide; ++x) sum += matrix[x * CHUNKS * 8 + p.stride_w * x + kx - p.pad_left - p.origin];
        partials[(first_ky + i) * p.kw + kx] = sum;
      }
    sync_warp();
  }
  if (group == 0) {
    float sum = bias_sum[0] + bias_sum[2];  // all columns are alike: rows g and g + 8
    for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) partials[p.kh * p.kw] = sum;
  }
#endif
}

Parameters parameters(const Convolution& call, const Device& device) {
  Parameters p{};
  p.x = plane(call.x, call.h, call.w), p.gradient = plane(call.out, call.out_h, call.out_w);
  p.n = call.n, p.multiplier = call.multiplier, p.channels = call.channels * call.multiplier;
  p.stride_h = call.stride_h, p.stride_w = call.stride_w, p.pad_top = call.pad_top, p.pad_left = call.pad_left;
  p.kh = call.filter.kh, p.kw = call.filter.kw;
  p.windows = (call.out_w + kWide - 1) / kWide;
  p.origin = -((call.pad_left + 3) / 4 * 4);
  p.panels = (call.n * p.windows + kPanel - 1) / kPanel;
  const int64_t busy = 8 * int64_t{device.multiprocessors};  // warps
  const int64_t wanted = std::clamp<int64_t>((busy + p.channels - 1) / p.channels, 1, std::max<int64_t>(p.panels, 1));
  p.panels_a_split = std::max<int64_t>((p.panels + wanted - 1) / wanted, 1);
  p.splits = (p.panels + p.panels_a_split - 1) / p.panels_a_split;
  return p;
}

int chunks(const Parameters& p) { return (p.stride_w * (kWide - 1) + p.kw - 1 - p.pad_left - p.origin) / 8 + 1; }

// The tile of a call, as types.
template <class Body>
void with_wgrad_tile(const Parameters& p, const Body& body) {
  const bool narrow = chunks(p) <= 3 && p.stride_h == 1;
  if (narrow && p.kh <= 3)
    body(WgradTile<3, 3>{}, std::integral_constant<int, 3>{}, std::integral_constant<int, 3>{});
  else if (narrow && p.kh <= 7)
    body(WgradTile<7, 3>{}, std::integral_constant<int, 7>{}, std::integral_constant<int, 3>{});
  else
    body(WgradTile<4, 8>{}, std::integral_constant<int, 4>{}, std::integral_constant<int, 8>{});
}

}  // namespace

bool wgrad_takes(const Convolution& call) {
  return call.dtype != Dtype::float32 && call.filter.kh <= 31 && call.filter.kw <= 31 && call.pad_left <= 64 &&
         planar(call.x, call.w) && planar(call.out, call.out_w) && chunks(parameters(call, {})) <= 8;
}

int64_t wgrad_splits(const Convolution& call, const Device& device) { return parameters(call, device).splits; }

void wgrad(const Convolution& call, float* partials, const Device& device) {
  Parameters p = parameters(call, device);
  p.partials = partials;
  with_wgrad_tile(p, [&](auto tile, auto rows, auto columns) {
    p.row_groups = (p.kh + rows() - 1) / rows();
    Grid grid;
    grid.x = (p.channels * p.row_groups * p.splits + kWgradWarps - 1) / kWgradWarps;
    grid.threads = kWgradWarps * kWarp;
    grid.shared_bytes = size_t{kWgradWarps} * tile.kBytes;
    with_16_bit_storage(call.dtype, [&](auto element) {
      launch("wgrad_kernel", wgrad_kernel<decltype(element), rows(), columns()>, grid, p, device.stream);
    });
  });
}

}  // namespace ffnet
