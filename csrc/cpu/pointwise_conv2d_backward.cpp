// Gradients of a 1x1 convolution of dense channels-last maps, float32.
#include "buffer.h"
#include "pointwise.h"
#include "pointwise_wgrad.h"

namespace ffnet::FFNET_ISA {
namespace {

struct Work {
  const PointwiseConv2dBackward& op;
  WeightPacking weight;
  int64_t strips;
};

void pack(void* context, int64_t task) { static_cast<const Work*>(context)->weight.run(task); }

void run_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const PointwiseConv2dBackward& op = work.op;
  const int64_t first = strip * op.pixels / work.strips, last = (strip + 1) * op.pixels / work.strips;
  float* x_grad = op.x_grad + first * op.inputs;
  multiply(op.grad + first * op.outputs, op.outputs, last - first, work.weight.packed(), nullptr,
           [&](const Block& at, float* block) { store_block(at, op.inputs, block, x_grad); });
}

}  // namespace

void pointwise_conv2d_backward(const PointwiseConv2dBackward& op, const Executor& executor) {
  if (op.x_grad) {
    const Buffer packed(PackedWeight{nullptr, op.outputs, op.inputs}.floats());
    Work work{op,
              {op.weight, op.outputs, op.inputs, nullptr, true, packed.data},
              pixel_strips(op.pixels, op.inputs + op.outputs, executor.threads)};
    executor.run(work.weight.tasks(), pack, &work);
    executor.run(work.strips, run_strip, &work);
  }
  if (!op.weight_grad) return;
  PointwiseWgradSum sum(op.pixels, op.inputs, op.outputs, op.weight_grad, op.bias_grad);
  sum.add(op.grad, op.x, op.pixels, executor);
  sum.finish(executor);
}

}  // namespace ffnet::FFNET_ISA
