// 1x1 convolution of channels-last maps and its gradients, float32.
#include "pointwise_wgrad.h"
#include "training.h"

namespace ffnet::FFNET_ISA {
namespace {

struct Work {
  const PointwiseConv2d& op;
  WeightPacking packing;
  int64_t strips;
  float* bias;  // a whole number of panels
};

void pack(void* context, int64_t task) { static_cast<const Work*>(context)->packing.run(task); }

void run_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const PackedMatrix b = work.packing.matrix();
  const int64_t first = strip * work.op.pixels / work.strips, last = (strip + 1) * work.op.pixels / work.strips;
  multiply(work.op.x + first * b.depth, b.depth, last - first, b, work.bias, work.op.out + first * b.columns,
           b.columns);
}

}  // namespace

void pointwise_conv2d(const PointwiseConv2d& op, const Executor& executor) {
  const int64_t depth = op.transposed ? op.outputs : op.inputs, columns = op.transposed ? op.inputs : op.outputs;
  const int64_t padded = ceil_div(columns, kPointwisePanel) * kPointwisePanel;
  const Buffer packed(packed_matrix_floats(depth, columns)), bias(padded);
  for (int64_t i = 0; i < padded; ++i) bias.data[i] = op.bias && i < columns ? op.bias[i] : 0;
  Work work{op,
            {op.weight, op.outputs, op.inputs, nullptr, !op.transposed, packed.data},
            pixel_strips(op.pixels, depth + columns, executor.threads),
            bias.data};
  executor.run(work.packing.tasks(), pack, &work);
  executor.run(work.strips, run_strip, &work);
}

void pointwise_conv2d_wgrad(const PointwiseWgrad& op, const Executor& executor) {
  PointwiseWgradSum sum(op.pixels, op.inputs, op.outputs, op.weight_grad, op.bias_grad);
  sum.add(op.grad, op.x, op.pixels, executor);
  sum.finish(executor);
}

}  // namespace ffnet::FFNET_ISA
