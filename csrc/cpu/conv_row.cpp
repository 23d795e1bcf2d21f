// Rows of filters by taps of one row.
#include "conv_row_blocks.h"

namespace ffnet::FFNET_ISA {

template ConvRow select_conv_row<FloatTaps>(const Filter&, int64_t);

ConvRow select_part_row(int64_t kh, int64_t kw) {
  if (kh <= 9) {
    switch (kw) {
      case 1: return conv_row<FloatTaps, 1, 1>;
      case 2: return conv_row<FloatTaps, 2, 1>;
      case 3: return conv_row<FloatTaps, 3, 1>;
      case 4: return conv_row<FloatTaps, 4, 1>;
      case 7: return conv_row<FloatTaps, 7, 1>;
    }
  }
  return conv_row_any<FloatTaps, 1>;
}

}  // namespace ffnet::FFNET_ISA
