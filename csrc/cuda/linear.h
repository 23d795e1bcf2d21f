// Planes 7, 14 or 28 wide, in shared memory as they lie in memory. Their rows begin at any even address, so windows
// would arrive in pieces of 4 or 2 bytes. But consecutive rows are one piece: all aligned 16-byte pieces that it
// touches are copied, and its offset in the first of them is added when it is read.
#pragma once

#include "panel.h"

namespace ffnet {

// A stage of ROWS rows of the images of a panel, in as much memory as rows of windows take.
template <int ROWS, int WIDTH>
struct LinearStage {
  static constexpr int kWindows = (WIDTH + kWindow - 1) / kWindow;  // of an image
  static constexpr int kImages = kPanel / kWindows, kImagesAHalf = kImages / 2;
  static constexpr int kRow = 2 * WIDTH, kBytes = ROWS * kRow;
  static constexpr int kUnit = WIDTH % 2 ? 2 : 4;                  // what addresses are multiples of
  static constexpr int kChunks = (kBytes + 16 - kUnit + 15) / 16;  // that an image's rows touch at most
  static constexpr int kPitch = ROWS * kRowBytes / kImages;        // of images: reads have no bank conflicts
  static constexpr int kLanes = kWarp / kImages;                   // that copy an image
  static constexpr int kCopies = (kChunks + kLanes - 1) / kLanes;  // of a lane
  static_assert(kChunks * 16 <= kPitch && kPitch % 16 == 0);
};

#if FFNET_HAS_SM80

// As RowCopies. A lane's image is that of window lane / 2.
template <int ROWS, int WIDTH>
class LinearCopies {
  using Stage = LinearStage<ROWS, WIDTH>;

 public:
  FFNET_DEVICE void start(const Plane& plane, const Window& window, int64_t channel, int first_row, int) {
    const bool exists = window.exists && plane.w > 0;
    const uint16_t* first = plane.data + (exists ? window.n * plane.n + channel * plane.c : 0);
    source_ = reinterpret_cast<const unsigned char*>(first) + int64_t{first_row} * Stage::kRow;
    place_ = first_row * Stage::kRow;
    end_ = exists ? plane.h * Stage::kRow : kNever;
  }

  template <class KNOWN>
  FFNET_DEVICE void fetch(const Plane&, unsigned char* stage, int lane) {
    if (!KNOWN::nothing()) {
      const int own = lane % Stage::kLanes * 16, shift = static_cast<int>(reinterpret_cast<uintptr_t>(source_) % 16);
      const unsigned char* source = source_ + (own - shift);
      unsigned char* target = stage + lane / Stage::kLanes * Stage::kPitch + own;
      const int place = place_ + own - shift, left = end_ - place;
#pragma unroll
      for (int i = 0; i < Stage::kCopies; ++i) {
        constexpr int step = 16 * Stage::kLanes;
        if ((i + 1) * Stage::kLanes > Stage::kChunks && own >= 16 * Stage::kChunks - i * step) continue;
        int bytes = left - i * step < 16 ? left - i * step : 16;  // nothing is read past the end of a plane
        bytes = bytes > 0 ? bytes : 0;
        if (!KNOWN::starts_inside() && place + i * step <= -16) bytes = 0;
        copy_async_of(target + i * step, source + i * step, bytes);
      }
    }
    source_ += Stage::kBytes;
    place_ += Stage::kBytes;
  }

 private:
  static constexpr int kNever = -(1 << 30);

  const unsigned char* source_;  // of the image's next row
  int place_, end_;              // of that row and of the last one's end, from the plane's first element
};

// Where a lane finds columns 2t, 2t + 1 of window g of both halves, in a stage after the other.
template <int ROWS, int WIDTH>
class LinearPlaces {
  using Stage = LinearStage<ROWS, WIDTH>;

 public:
  FFNET_DEVICE void open_panel(const Plane& plane, const Window (&windows)[2], int64_t channel, int first_row) {
    const auto low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(plane.data));  // what an address begins with
    const uint32_t own = static_cast<uint32_t>(channel) * static_cast<uint32_t>(plane.c);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      first_[half] = low + 2 * (static_cast<uint32_t>(windows[half].n) * static_cast<uint32_t>(plane.n) + own) +
                     static_cast<uint32_t>(first_row * Stage::kRow);
  }

  // The stage is the next one.
  FFNET_DEVICE void open_stage(const unsigned char* stage, int lane) {
    const int window = lane / 4, column = window % Stage::kWindows * kWindow + lane % 4 * 2;
    const unsigned char* own = stage + window / Stage::kWindows * Stage::kPitch + 2 * column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      place_[half] = own + first_[half] % 16;
      // If a lane's second column does not exist, the first one is read again.
      if constexpr (WIDTH % 2) second_[half] = place_[half] + (column + 1 < WIDTH ? 2 : 0);
      first_[half] += Stage::kBytes;
    }
    if constexpr (WIDTH % 2)
      keeps_ = column + 1 < WIDTH ? 1u << 16 : 0;
    else
      keeps_ = column < WIDTH ? ~0u : 0;
  }

  // Of row `i` of the stage; zeros for columns that are none of the plane's.
  FFNET_DEVICE RowPair row(int i) const {
    RowPair pair;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = half * Stage::kImagesAHalf * Stage::kPitch + i * Stage::kRow;
      if constexpr (WIDTH % 2)
        pair.half[half] = *reinterpret_cast<const uint16_t*>(second_[half] + offset) * keeps_ +
                          *reinterpret_cast<const uint16_t*>(place_[half] + offset);
      else
        pair.half[half] = *reinterpret_cast<const uint32_t*>(place_[half] + offset) & keeps_;
    }
    return pair;
  }

 private:
  uint32_t first_[2];  // the lowest bits of the next stage's first address
  const unsigned char *place_[2], *second_[2];
  uint32_t keeps_;
};

#endif  // FFNET_HAS_SM80

}  // namespace ffnet
