// conv2d, one group, as two products: conv2d.cpp has the pixels on the left, pointwise_conv2d.cpp the weight.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

// Takes 1x1 filters, stride 1, no padding.
void pointwise_conv2d(const Conv2d& op, const Executor& executor);

}  // namespace ffnet::FFNET_ISA
