// The table of training kernels of one instruction set; compiled once for each.
#include "training.h"

#include "simd.h"

namespace ffnet::FFNET_ISA {

void branched_depthwise(const BranchedDepthwise&, const Executor&);
void branched_depthwise_backward(const BranchedDepthwiseBackward&, const Executor&);

void feed_forward(const FeedForward&, const Executor&);
void feed_forward_backward(const FeedForwardBackward&, const Executor&);

const TrainingKernels* training_kernels() {
  static constexpr TrainingKernels table = {branched_depthwise, branched_depthwise_backward,
                                            feed_forward,       feed_forward_backward};
  return &table;
}

}  // namespace ffnet::FFNET_ISA
