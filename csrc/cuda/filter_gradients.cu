// The second stage of the filters' gradients: partial sums are added in a fixed order, so results do not vary.
#include "device.h"
#include "storage.h"

namespace ffnet {
namespace {

constexpr int kFinishWarps = 4;

template <class T>
struct Parameters {
  int64_t outputs, splits;
  int taps, kw;
  const float* partials;
  const T *filter, *bias, *scale;
  int64_t filter_output, filter_y, filter_x;  // strides
  T *filter_grad, *bias_grad, *scale_grad;
};

// A warp per output; the bias's sum follows those of the taps.
template <class T>
FFNET_KERNEL(kFinishWarps* kWarp, 4)
filter_gradients_kernel(FFNET_PARAMETER Parameters<T> p) {
  const int lane = thread_index() % kWarp;
  const int64_t output = int64_t{block_x()} * kFinishWarps + thread_index() / kWarp;
  if (output >= p.outputs) return;
  const float scale = p.scale ? to_float(p.scale[output]) : 1.0f;
  float product = 0.0f;
  for (int tap = lane; tap <= p.taps; tap += kWarp) {
    float sum = 0.0f;
    for (int64_t split = 0; split < p.splits; ++split)
      sum += p.partials[(split * p.outputs + output) * (p.taps + 1) + tap];
    if (tap < p.taps) {
      if (p.filter_grad) p.filter_grad[output * p.taps + tap] = from_float<T>(scale * sum);
      if (p.scale_grad)
        product +=
            sum * to_float(p.filter[output * p.filter_output + tap / p.kw * p.filter_y + tap % p.kw * p.filter_x]);
    } else {
      if (p.bias_grad) p.bias_grad[output] = from_float<T>(scale * sum);
      if (p.scale_grad && p.bias) product += sum * to_float(p.bias[output]);
    }
  }
  if (p.scale_grad) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
    if (lane == 0) p.scale_grad[output] = from_float<T>(product);
  }
}

template <class T>
void run(const FilterGradients& call, const Device& device) {
  const Filter& f = call.filter;
  const Parameters<T> p{call.outputs,
                        call.splits,
                        f.kh * f.kw,
                        f.kw,
                        call.partials,
                        static_cast<const T*>(f.data),
                        static_cast<const T*>(f.bias),
                        static_cast<const T*>(call.scale),
                        f.output,
                        f.y,
                        f.x,
                        static_cast<T*>(call.filter_grad),
                        static_cast<T*>(call.bias_grad),
                        static_cast<T*>(call.scale_grad)};
  Grid grid;
  grid.x = (call.outputs + kFinishWarps - 1) / kFinishWarps;
  grid.threads = kFinishWarps * kWarp;
  launch("filter_gradients_kernel", filter_gradients_kernel<T>, grid, p, device.stream);
}

}  // namespace

void finish_filter_gradients(const FilterGradients& call, const Device& device) {
  with_storage(call.dtype, [&](auto element) { run<decltype(element)>(call, device); });
}

}  // namespace ffnet
