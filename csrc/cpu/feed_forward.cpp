// feed_forward: residual + scale * (project * act(expand * x + b1) + b2) of channels-last maps, float32, and its
// gradients.
//
// The forward pass keeps z = expand * x + b1 and makes act(z), strip by strip of pixels, in L2. The backward pass makes
// act(z) and its derivative again from z.
#include "activation.h"
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
  WeightPacking first, second;                // in the order in which a strip meets them
  int64_t begin = 0, pixels = 0, strips = 0;  // the pixels at hand: all, or, backward, a block of them
  // Forward.
  const float *expand_bias = nullptr, *project_bias = nullptr;
  // Backward; of the block: act(z), gradient of z.
  const FeedForwardBackward* backward = nullptr;
  float *hidden = nullptr, *hidden_grad = nullptr;
  int64_t from(int64_t strip) const { return begin + strip * pixels / strips; }
};

void pack(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const int64_t tasks = work.first.tasks();
  task < tasks ? work.first.run(task) : work.second.run(task - tasks);
}

void forward_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const FeedForward& op = work.op;
  const int64_t first = work.from(strip), rows = work.from(strip + 1) - first, floats = rows * op.hidden;
  float *z = op.z + first * op.hidden, *out = op.out + first * op.outputs;
  const float* residual = op.residual ? op.residual + first * op.outputs : nullptr;
  float* hidden = Arena(floats).floats(floats);
  multiply(op.x + first * op.channels, op.channels, rows, work.first.packed(), work.expand_bias,
           [&](const Block& at, float* block) {
             with_activation(op.activation, [&](auto activation) {
               each_vector(at, op.hidden, block, [&](int64_t i, const float* sum, int64_t lanes) {
                 const Vec x = Vec::load(sum);
                 store_lanes(x, z + i, lanes);
                 store_lanes(activation(x), hidden + i, lanes);
               });
             });
           });
  multiply(hidden, op.hidden, rows, work.second.packed(), work.project_bias, [&](const Block& at, float* block) {
    each_vector(at, op.outputs, block, [&](int64_t i, const float* sum, int64_t lanes) {
      const Vec x = Vec::load(sum);
      store_lanes(residual ? load_lanes(residual + i, lanes) + x : x, out + i, lanes);
    });
  });
}

void backward_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const FeedForward& op = work.op;
  const int64_t first = work.from(strip), rows = work.from(strip + 1) - first;
  const float* z = op.z + first * op.hidden;
  const int64_t at_hidden = (first - work.begin) * op.hidden;
  float *hidden = work.hidden + at_hidden, *grad = work.hidden_grad + at_hidden;
  multiply(work.backward->grad + first * op.outputs, op.outputs, rows, work.first.packed(), nullptr,
           [&](const Block& at, float* block) {
             const bool piecewise = is_piecewise(op.activation);
             with_slope(op.activation, [&](auto activation) {
               each_vector(at, op.hidden, block, [&](int64_t i, const float* sum, int64_t lanes) {
                 const Activated a = activation(load_lanes(z + i, lanes));
                 store_lanes(a.value, hidden + i, lanes);
                 store_lanes(times_slope(Vec::load(sum), a.slope, piecewise), grad + i, lanes);
               });
             });
           },
           [&](const Block& at) { ask_for(at, op.hidden, z); });
  if (!work.backward->x_grad) return;
  float* x_grad = work.backward->x_grad + first * op.channels;
  multiply(grad, op.hidden, rows, work.second.packed(), nullptr,
           [&](const Block& at, float* block) { store_block(at, op.channels, block, x_grad); });
}

// From the gradients of the unscaled projection: that of the scale, and the scaled ones.
void finish_scale(const FeedForwardBackward& op) {
  const FeedForward& f = op.forward;
  for (int64_t o = 0; o < f.outputs; ++o) {
    float* row = op.project_grad + o * f.hidden;
    const float* weight = f.project + o * f.hidden;
    const Vec scale = Vec::fill(f.scale[o]);
    Vec sum = Vec::fill(0);
    for (int64_t i = 0; i < f.hidden; i += kLanes) {
      const int64_t lanes = min_of(kLanes, f.hidden - i);
      const Vec grad = load_lanes(row + i, lanes);
      sum = fma(grad, load_lanes(weight + i, lanes), sum);
      store_lanes(grad * scale, row + i, lanes);
    }
    float parts[kLanes], total = f.project_bias ? op.project_bias_grad[o] * f.project_bias[o] : 0;
    sum.store(parts);
    for (const float part : parts) total += part;
    op.scale_grad[o] = total;
    op.project_bias_grad[o] *= f.scale[o];
  }
}

}  // namespace

void feed_forward(const FeedForward& op, const Executor& executor) {
  const Buffer expand(PackedWeight{nullptr, op.channels, op.hidden}.floats()),
      project(PackedWeight{nullptr, op.hidden, op.outputs}.floats()), biases(padded(op.hidden) + padded(op.outputs));
  float* project_bias = biases.data + padded(op.hidden);
  pack_bias(op.expand_bias, nullptr, op.hidden, biases.data);
  pack_bias(op.project_bias, op.scale, op.outputs, project_bias);
  Work work{op,
            {op.expand, op.hidden, op.channels, nullptr, false, expand.data},
            {op.project, op.outputs, op.hidden, op.scale, false, project.data}};
  work.pixels = op.pixels, work.strips = pixel_strips(op.pixels, 2 * op.hidden, executor.threads);
  work.expand_bias = biases.data, work.project_bias = project_bias;
  executor.run(work.first.tasks() + work.second.tasks(), pack, &work);
  executor.run(work.strips, forward_strip, &work);
}

void feed_forward_backward(const FeedForwardBackward& op, const Executor& executor) {
  // Pixels go in blocks, so that the hidden maps between the products stay in cache; cut by the shape alone.
  constexpr int64_t kBlockFloats = 384 * 1024;
  const FeedForward& f = op.forward;
  const int64_t blocks = ceil_div(f.pixels, max_of(256, kBlockFloats / f.hidden)), most = ceil_div(f.pixels, blocks);
  const Buffer hidden(most * f.hidden), hidden_grad(most * f.hidden),
      expand(PackedWeight{nullptr, f.hidden, f.channels}.floats()),
      project(PackedWeight{nullptr, f.outputs, f.hidden}.floats());
  Work work{f,
            {f.project, f.outputs, f.hidden, f.scale, true, project.data},
            {f.expand, f.hidden, f.channels, nullptr, true, expand.data}};
  work.backward = &op, work.hidden = hidden.data, work.hidden_grad = hidden_grad.data;
  executor.run(work.first.tasks() + work.second.tasks(), pack, &work);
  PointwiseWgradSum project_sum(most, f.hidden, f.outputs, op.project_grad, op.project_bias_grad),
      expand_sum(most, f.channels, f.hidden, op.expand_grad, op.expand_bias_grad);
  for (int64_t block = 0; block < blocks; ++block) {
    work.begin = block * f.pixels / blocks, work.pixels = (block + 1) * f.pixels / blocks - work.begin;
    work.strips = pixel_strips(work.pixels, 2 * f.hidden, executor.threads);
    executor.run(work.strips, backward_strip, &work);
    project_sum.add(op.grad + work.begin * f.outputs, hidden.data, work.pixels, executor);
    expand_sum.add(hidden_grad.data, f.x + work.begin * f.channels, work.pixels, executor);
  }
  project_sum.finish(executor), expand_sum.finish(executor);
  if (f.scale) finish_scale(op);
}

}  // namespace ffnet::FFNET_ISA
