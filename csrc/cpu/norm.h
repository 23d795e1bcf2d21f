// Batch normalisation of a vector of channels: its statistics, its coefficients and those of its gradient.
#pragma once

#include "layout.h"
#include "training.h"

namespace ffnet::FFNET_ISA {

// Mean and sum of squared deviations of `count` values. Parts are measured separately and joined pairwise (Chan et
// al.), as a naive sum of squares would cancel.
struct Moments {
  Vec mean, deviations;
  float count;
  void join(const Moments& other) {
    const float total = count + other.count;
    const Vec delta = other.mean - mean;
    mean = fma(delta, Vec::fill(other.count / total), mean);
    deviations = fma(delta * delta, Vec::fill(count * (other.count / total)), deviations + other.deviations);
    count = total;
  }
};

// Sum of f over `count` vectors, given as at(i), in four parts for the latency of additions.
template <class At, class F>
FFNET_INLINE Vec sum_vectors(int64_t count, At at, F f) {
  Vec total[4] = {Vec::fill(0), Vec::fill(0), Vec::fill(0), Vec::fill(0)};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) total[p] = total[p] + f(at(i + p));
  for (; i < count; ++i) total[0] = total[0] + f(at(i));
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <class At>
FFNET_INLINE Moments moments_of(int64_t count, At at) {
  const Vec mean = sum_vectors(count, at, [](Vec y) { return y; }) * Vec::fill(1.f / static_cast<float>(count));
  const Vec deviations = sum_vectors(count, at, [mean](Vec y) { return (y - mean) * (y - mean); });
  return {mean, deviations, static_cast<float>(count)};
}

// Moments of the parts of a batch, joined in order, in double precision.
class JointMoments {
 public:
  // `shift` is what was subtracted from the values; null is 0.
  void join(const float* mean, const float* shift, const float* deviations, double count) {
    const double share = count / (count_ + count);
    for (int64_t l = 0; l < kLanes; ++l) {
      const double delta = static_cast<double>(mean[l]) + (shift ? shift[l] : 0) - mean_[l];
      mean_[l] += delta * share;
      deviations_[l] += deviations[l] + delta * delta * (count_ * share);
    }
    count_ += count;
  }
  Vec mean() const {
    float values[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) values[l] = static_cast<float>(mean_[l]);
    return Vec::load(values);
  }
  Vec variance() const {
    float values[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) values[l] = static_cast<float>(deviations_[l] / count_);
    return Vec::load(values);
  }

 private:
  double mean_[kLanes] = {}, deviations_[kLanes] = {}, count_ = 0;
};

// A vector of channels of an array with an element for each channel; lanes without a channel are 0.
FFNET_INLINE Vec lanes_of(const float* array, const Lanes& lanes) {
  return Vec::load_first(array + lanes.first, lanes.count);
}

// gamma / sqrt(variance + eps), and 1 / sqrt(variance + eps).
struct NormScale {
  Vec scale, inverse_deviation;
};
inline NormScale norm_scale(const Norm& norm, const Lanes& lanes) {
  float inverse[kLanes];
  for (int64_t l = 0; l < kLanes; ++l)
    inverse[l] = l < lanes.count ? 1 / __builtin_sqrtf(norm.variance[lanes.first + l] + norm.eps) : 0;
  const Vec deviation = Vec::load(inverse);
  return {lanes_of(norm.gamma, lanes) * deviation, deviation};
}

// Of a gradient g of the result: sum g and sum g (y - mean) over the batch, to the gradients of beta and gamma.
FFNET_INLINE void store_gradients(const Norm& norm, const Lanes& lanes, Vec grads, Vec products,
                                  const NormGradients& to) {
  grads.store_first(to.beta + lanes.first, lanes.count);
  (products * norm_scale(norm, lanes).inverse_deviation).store_first(to.gamma + lanes.first, lanes.count);
}

// The gradient of the normalisation's input is scale * g + slope * (y - mean) + shift, for `count` values in the batch.
struct NormSlope {
  Vec scale, slope, shift;
};
inline NormSlope norm_slope(const Norm& norm, const NormGradients& gradients, float count, const Lanes& lanes) {
  const NormScale at = norm_scale(norm, lanes);
  const Vec share = Vec::fill(-1.f / count) * at.scale;
  return {at.scale, share * at.inverse_deviation * lanes_of(gradients.gamma, lanes),
          share * lanes_of(gradients.beta, lanes)};
}

}  // namespace ffnet::FFNET_ISA
