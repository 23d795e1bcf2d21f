// conv2d, one group, as two products: conv2d.cpp has the pixels on the left, pointwise_conv2d.cpp the weight; and
// few_pixels.cpp for so few pixels that neither pays.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

// Whether each row of the map, and of the result, begins where the one before it ends.
inline bool rows_follow(const Conv2d& op) {
  return op.h == 1 || (op.x_stride.h == op.w * op.x_stride.w && op.out_stride.h == op.out_w * op.out_stride.w);
}

// Takes 1x1 filters, stride 1, no padding.
void pointwise_conv2d(const Conv2d& op, const Executor& executor);
void few_pixels_conv2d(const Conv2d& op, const Executor& executor);

}  // namespace ffnet::FFNET_ISA
