// feed_forward: residual + scale * (project * act(expand * x + b1) + b2) of channels-last maps, float32, and its
// gradients.
//
// The forward pass keeps z = expand * x + b1 and makes act(z), strip by strip of pixels, in L2. The backward pass makes
// act(z) and its derivative again from z.
#include "activation_slope.h"
#include "pointwise_wgrad.h"
#include "training.h"

namespace ffnet::FFNET_ISA {
namespace {

FFNET_INLINE int64_t padded(int64_t columns) { return ceil_div(columns, kPointwisePanel) * kPointwisePanel; }

// `bias` times `scale` in a whole number of panels; either may be missing.
void pack_bias(const float* bias, const float* scale, int64_t columns, float* out) {
  for (int64_t i = 0; i < padded(columns); ++i) out[i] = bias && i < columns ? bias[i] * (scale ? scale[i] : 1) : 0;
}

struct Work {
  const FeedForward& op;
  const FeedForwardBackward* backward;
  WeightPacking first, second;    // in the order in which a strip meets them
  int64_t begin, pixels, strips;  // the pixels at hand: all, or, backward, a block of them
  const float *first_bias, *second_bias;
  float *hidden, *hidden_grad;  // backward, of the block: act(z), gradient of z
  int64_t from(int64_t strip) const { return begin + strip * pixels / strips; }
};

void pack(void* context, int64_t task) {
  const Work& work = *static_cast<const Work*>(context);
  const int64_t tasks = work.first.tasks();
  task < tasks ? work.first.run(task) : work.second.run(task - tasks);
}

struct WholeVector {
  FFNET_INLINE Vec load(const float* p) const { return Vec::load(p); }
  FFNET_INLINE void store(float* p, Vec x) const { x.store(p); }
};
struct PartOfVector {
  int64_t lanes;
  FFNET_INLINE Vec load(const float* p) const { return Vec::load_first(p, lanes); }
  FFNET_INLINE void store(float* p, Vec x) const { x.store_first(p, lanes); }
};

// f(offset, how to load and store) for every vector of `floats` adjacent floats.
template <class F>
FFNET_INLINE void each_vector(int64_t floats, F f) {
  int64_t i = 0;
  for (; i + kLanes <= floats; i += kLanes) f(i, WholeVector());
  if (i < floats) f(i, PartOfVector{floats - i});
}

template <Vec (*function)(Vec)>
void activate_with(const float* z, float* hidden, int64_t floats) {
  each_vector(floats, [&](int64_t i, auto lanes) { lanes.store(hidden + i, function(lanes.load(z + i))); });
}

FFNET_INLINE Vec identity(Vec x) { return x; }

// hidden = act(z)
void activate(const float* z, float* hidden, int64_t floats, Activation activation) {
  switch (activation) {
    case Activation::none: return activate_with<identity>(z, hidden, floats);
    case Activation::relu: return activate_with<relu>(z, hidden, floats);
    case Activation::gelu: return activate_with<gelu>(z, hidden, floats);
    case Activation::gelu_tanh: return activate_with<gelu_tanh>(z, hidden, floats);
    case Activation::silu: return activate_with<silu>(z, hidden, floats);
  }
}

template <Activated (*function)(Vec)>
void differentiate_with(const float* z, float* hidden, float* grad, int64_t floats) {
  each_vector(floats, [&](int64_t i, auto lanes) {
    const Activated at = function(lanes.load(z + i));
    lanes.store(hidden + i, at.value);
    lanes.store(grad + i, lanes.load(grad + i) * at.slope);
  });
}

// hidden = act(z), grad *= act'(z)
void differentiate(const float* z, float* hidden, float* grad, int64_t floats, Activation activation) {
  switch (activation) {
    case Activation::none: return activate_with<identity>(z, hidden, floats);
    case Activation::relu:  // stops any gradient, an infinite one too
      return each_vector(floats, [&](int64_t i, auto lanes) {
        const Vec at = lanes.load(z + i);
        lanes.store(hidden + i, relu(at));
        lanes.store(grad + i, where_positive(at, lanes.load(grad + i)));
      });
    case Activation::gelu: return differentiate_with<gelu_with_slope>(z, hidden, grad, floats);
    case Activation::gelu_tanh: return differentiate_with<gelu_tanh_with_slope>(z, hidden, grad, floats);
    case Activation::silu: return differentiate_with<silu_with_slope>(z, hidden, grad, floats);
  }
}

void forward_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const FeedForward& op = work.op;
  const int64_t first = work.from(strip), rows = work.from(strip + 1) - first, floats = rows * op.hidden;
  float *z = op.z + first * op.hidden, *out = op.out + first * op.outputs;
  float* hidden = Arena(floats).floats(floats);
  multiply(op.x + first * op.channels, op.channels, rows, work.first.matrix(), work.first_bias, z, op.hidden);
  activate(z, hidden, floats, op.activation);
  multiply(hidden, op.hidden, rows, work.second.matrix(), work.second_bias, out, op.outputs);
  if (!op.residual) return;
  const float* residual = op.residual + first * op.outputs;
  each_vector(rows * op.outputs,
              [&](int64_t i, auto lanes) { lanes.store(out + i, lanes.load(out + i) + lanes.load(residual + i)); });
}

void backward_strip(void* context, int64_t strip) {
  const Work& work = *static_cast<const Work*>(context);
  const FeedForward& op = work.op;
  const int64_t first = work.from(strip), rows = work.from(strip + 1) - first, floats = rows * op.hidden;
  const float* z = op.z + first * op.hidden;
  const int64_t at = (first - work.begin) * op.hidden;
  float *hidden = work.hidden + at, *grad = work.hidden_grad + at;
  multiply(work.backward->grad + first * op.outputs, op.outputs, rows, work.first.matrix(), work.first_bias, grad,
           op.hidden);
  differentiate(z, hidden, grad, floats, op.activation);
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
    each_vector(f.hidden, [&](int64_t i, auto lanes) {
      const Vec grad = lanes.load(row + i);
      sum = fma(grad, lanes.load(weight + i), sum);
      lanes.store(row + i, grad * scale);
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
  const Buffer expand(packed_matrix_floats(op.channels, op.hidden)),
      project(packed_matrix_floats(op.hidden, op.outputs)), biases(padded(op.hidden) + padded(op.outputs));
  float* project_bias = biases.data + padded(op.hidden);
  pack_bias(op.expand_bias, nullptr, op.hidden, biases.data);
  pack_bias(op.project_bias, op.scale, op.outputs, project_bias);
  Work work{op,
            nullptr,
            {op.expand, op.hidden, op.channels, nullptr, true, expand.data},
            {op.project, op.outputs, op.hidden, op.scale, true, project.data},
            0,
            op.pixels,
            pixel_strips(op.pixels, 2 * op.hidden, executor.threads),
            biases.data,
            project_bias,
            nullptr,
            nullptr};
  executor.run(work.first.tasks() + work.second.tasks(), pack, &work);
  executor.run(work.strips, forward_strip, &work);
}

void feed_forward_backward(const FeedForwardBackward& op, const Executor& executor) {
  // Pixels go in blocks, so that the hidden maps between the products stay in cache; cut by the shape alone.
  constexpr int64_t kBlockFloats = 384 * 1024;
  const FeedForward& f = op.forward;
  const int64_t blocks = ceil_div(f.pixels, max_of(1024, kBlockFloats / f.hidden)), most = ceil_div(f.pixels, blocks);
  const int64_t zero_floats = max_of(padded(f.hidden), padded(f.channels));
  const Buffer hidden(most * f.hidden), hidden_grad(most * f.hidden), zeros(zero_floats),
      expand(packed_matrix_floats(f.hidden, f.channels)), project(packed_matrix_floats(f.outputs, f.hidden));
  for (int64_t i = 0; i < zero_floats; ++i) zeros.data[i] = 0;
  Work work{f,
            &op,
            {f.project, f.outputs, f.hidden, f.scale, false, project.data},
            {f.expand, f.hidden, f.channels, nullptr, false, expand.data},
            0,
            0,
            0,
            zeros.data,
            zeros.data,
            hidden.data,
            hidden_grad.data};
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
