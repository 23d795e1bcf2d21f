// Rows of filters by taps of two rows, where the processor has instructions for them.
#include "conv_row_blocks.h"

namespace ffnet::FFNET_ISA {

#if defined(__AVX512BF16__)
template ConvRow select_conv_row<PairTaps>(const Filter&, int64_t);
#endif

}  // namespace ffnet::FFNET_ISA
