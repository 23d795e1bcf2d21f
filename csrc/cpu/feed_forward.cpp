// feed_forward: residual + scale * (project * act(expand * x + b1) + b2) of channels-last maps, float32, and its gradients.
//
// The forward pass keeps z = expand * x + b1 and makes act(z), strip by strip of pixels, in L2. The backward pass makes
// act(z) and its derivative again from z.
#include "activation_slope.h"
#include "pointwise_wgrad.h"
#include "training.h"

namespace ffnet::FFNET_ISA {
namespace {

FFNET_INLINE int64_t padded(int64_t columns) { return ceil_div(columns, kPanel) * kPanel; }

// `bias` times `scale` in a whole number of panels; either may be missing.
void pack_bias(const float* bias, const float* scale, int64_t columns, float* out) {
  for (int64_t i = 0; i < padded(columns); ++i) out[i] = bias && i < columns ? bias[i] * (scale ? scale[i] : 1) : 0;
}

struct Work {
  const FeedForward& op;
  const FeedForwardBackward* backward;
  WeightPacking first, second;  // in the order in which a strip meets them
  int64_t strips;
  const float *first_bias, *second_bias;
  float *hidden, *hidden_grad;  // backward: act(z), gradient of z
  int64_t from(int64_t strip) const { return strip * op.pixels / strips; }
};

void pack(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const int64_t tasks = work.first.tasks();
  task < tasks ? work.first.run(task) : work.second.run(task - tasks);
}

// f(offset, lanes) for every vector of `floats` adjacent floats.
template <class F>
FFNET_INLINE void each_vector(int64_t floats, F f) {
  int64_t i = 0;
  for (; i + kLanes <= floats; i += kLanes) f(i, kLanes);
  if (i < floats) f(i, floats - i);
}

void forward_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const FeedForward& op = work.op;
  const int64_t first = work.from(strip), rows = work.from(strip + 1) - first, floats = rows * op.hidden;
  float *z = op.z + first * op.hidden, *out = op.out + first * op.outputs;
  Arena arena(floats + kLanes);
  float* hidden = arena.floats(floats + kLanes);
  multiply(op.x + first * op.channels, op.channels, rows, work.first.matrix(), work.first_bias, z, op.hidden);
  each_vector(floats, [&](int64_t i, int64_t lanes) { Vec::load_first(z + i, lanes).store(hidden + i); });
  activate_row(hidden, kLanes, ceil_div(floats, kLanes), op.activation);
  multiply(hidden, op.hidden, rows, work.second.matrix(), work.second_bias, out, op.outputs);
  if (!op.residual) return;
  const float* residual = op.residual + first * op.outputs;
  each_vector(rows * op.outputs, [&](int64_t i, int64_t lanes) {
    (Vec::load_first(out + i, lanes) + Vec::load_first(residual + i, lanes)).store_first(out + i, lanes);
  });
}

void backward_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const FeedForward& op = work.op;
  constexpr int64_t kBlock = 16 * kLanes;
  const int64_t first = work.from(strip), rows = work.from(strip + 1) - first, floats = rows * op.hidden;
  const float* z = op.z + first * op.hidden;
  float *hidden = work.hidden + first * op.hidden, *grad = work.hidden_grad + first * op.hidden;
  multiply(work.backward->grad + first * op.outputs, op.outputs, rows, work.first.matrix(), work.first_bias, grad,
           op.hidden);
  float slope[kBlock], value[kBlock], from[kBlock];
  for (int64_t block = 0; block < floats; block += kBlock) {
    const int64_t count = min_of(kBlock, floats - block), vectors = ceil_div(count, kLanes);
    each_vector(count, [&](int64_t i, int64_t lanes) {
      const Vec at = Vec::load_first(z + block + i, lanes);
      at.store(slope + i), at.store(value + i);
      Vec::load_first(grad + block + i, lanes).store(from + i);
    });
    slope_row(slope, value, vectors, op.activation);
    if (op.activation != Activation::none) apply_slope_row(from, slope, from, vectors, op.activation);
    each_vector(count, [&](int64_t i, int64_t lanes) {
      Vec::load(value + i).store_first(hidden + block + i, lanes);
      Vec::load(from + i).store_first(grad + block + i, lanes);
    });
  }
  if (work.backward->x_grad)
    multiply(grad, op.hidden, rows, work.second.matrix(), work.second_bias, work.backward->x_grad + first * op.channels,
             op.channels);
}

// From the gradients of the unscaled projection: that of the scale, and the scaled ones.
void finish_scale(const FeedForwardBackward& op) {
  const FeedForward& f = op.forward;
  for (int64_t o = 0; o < f.outputs; ++o) {
    float* row = op.project_grad + o * f.hidden;
    const float* weight = f.project + o * f.hidden;
    const Vec scale = Vec::fill(f.scale[o]);
    Vec sum = Vec::fill(0);
    each_vector(f.hidden, [&](int64_t i, int64_t lanes) {
      const Vec grad = Vec::load_first(row + i, lanes);
      sum = fma(grad, Vec::load_first(weight + i, lanes), sum);
      (grad * scale).store_first(row + i, lanes);
    });
    float lanes[kLanes], total = f.project_bias ? op.project_bias_grad[o] * f.project_bias[o] : 0;
    sum.store(lanes);
    for (const float lane : lanes) total += lane;
    op.scale_grad[o] = total;
    op.project_bias_grad[o] *= f.scale[o];
  }
}

}  // namespace

void feed_forward(const FeedForward& op, const Executor& executor) {
  const Buffer expand(packed_matrix_floats(op.channels, op.hidden)), project(packed_matrix_floats(op.hidden, op.outputs)),
      biases(padded(op.hidden) + padded(op.outputs));
  float* project_bias = biases.data + padded(op.hidden);
  pack_bias(op.expand_bias, nullptr, op.hidden, biases.data);
  pack_bias(op.project_bias, op.scale, op.outputs, project_bias);
  Work work{op,
            nullptr,
            {op.expand, op.hidden, op.channels, nullptr, true, expand.data},
            {op.project, op.outputs, op.hidden, op.scale, true, project.data},
            pixel_strips(op.pixels, 2 * op.hidden, executor.threads),
            biases.data,
            project_bias,
            nullptr,
            nullptr};
  executor.run(work.first.tasks() + work.second.tasks(), pack, &work);
  executor.run(work.strips, forward_strip, &work);
}

void feed_forward_backward(const FeedForwardBackward& op, const Executor& executor) {
  const FeedForward& f = op.forward;
  const int64_t map = f.pixels * f.hidden, zero_floats = max_of(padded(f.hidden), padded(f.channels));
  const Buffer hidden(map), hidden_grad(map), zeros(zero_floats);
  for (int64_t i = 0; i < zero_floats; ++i) zeros.data[i] = 0;
  {
    const Buffer expand(packed_matrix_floats(f.hidden, f.channels)), project(packed_matrix_floats(f.outputs, f.hidden));
    Work work{f,
              &op,
              {f.project, f.outputs, f.hidden, f.scale, false, project.data},
              {f.expand, f.hidden, f.channels, nullptr, false, expand.data},
              pixel_strips(f.pixels, 2 * f.hidden, executor.threads),
              zeros.data,
              zeros.data,
              hidden.data,
              hidden_grad.data};
    executor.run(work.first.tasks() + work.second.tasks(), pack, &work);
    executor.run(work.strips, backward_strip, &work);
  }
  pointwise_wgrad(f.pixels, f.hidden, f.outputs, op.grad, hidden.data, op.project_grad, op.project_bias_grad, executor);
  if (f.scale) finish_scale(op);
  pointwise_wgrad(f.pixels, f.channels, f.hidden, hidden_grad.data, f.x, op.expand_grad, op.expand_bias_grad, executor);
}

}  // namespace ffnet::FFNET_ISA
