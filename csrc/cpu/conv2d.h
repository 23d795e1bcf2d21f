// conv2d, one group, as two products: conv2d.cpp has the pixels on the left, pointwise_conv2d.cpp the weight; and
// few_pixels.cpp for so few pixels that neither pays.
#pragma once

#include <initializer_list>

#include "kernels.h"
#include "simd.h"

namespace ffnet::FFNET_ISA {

// Whether f holds for the strides of every map of a convolution that keeps the size of its map.
template <class F>
bool all_maps(const Conv2d& op, const F& f) {
  return f(op.x_stride) && f(op.out_stride) && (!op.residual || f(op.residual_stride));
}

// Whether each row of the maps begins where the one before it ends; and whether each image does, of so many pixels.
inline bool rows_follow(const Conv2d& op) {
  return op.h == 1 || all_maps(op, [&](const Strides& s) { return s.h == op.w * s.w; });
}
inline bool images_follow(const Conv2d& op, int64_t pixels) {
  return all_maps(op, [&](const Strides& s) { return s.n == pixels * s.w; });
}

// The same with rows of so many pixels, all of which follow each other.
inline Conv2d with_rows(Conv2d op, int64_t images, int64_t rows, int64_t width) {
  op.n = images, op.h = op.out_h = rows, op.w = op.out_w = width;
  for (Strides* s : {&op.x_stride, &op.out_stride, &op.residual_stride}) s->h = width * s->w;
  return op;
}

// Takes 1x1 filters, stride 1, no padding.
void pointwise_conv2d(const Conv2d& op, const Executor& executor);
void few_pixels_conv2d(const Conv2d& op, const Executor& executor);

}  // namespace ffnet::FFNET_ISA
