// Every CPU kernel on four threads of its own, for ThreadSanitizer, which cannot follow torch's. Prints what differs
// from one thread's results, and which results hold a NaN: all scratch and outputs are NaN before they are written.
// TABLES are the functions that give the kernels of the instruction sets to try.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "training.h"

namespace ffnet {
void poison(float* scratch, size_t floats) { std::fill_n(scratch, floats, std::numeric_limits<float>::quiet_NaN()); }
float* thread_scratch(size_t floats) {
  static thread_local std::vector<float> buffer;
  if (buffer.size() < floats + 16) buffer.resize(floats + 16);
  float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
  poison(scratch, floats);
  return scratch;
}
}  // namespace ffnet

using namespace ffnet;

namespace {

const Kernels* kernels = nullptr;  // those that are tried at present

void run_alone(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

void run_on_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

constexpr int64_t kElement[] = {4, 2, 2};  // bytes, by storage

// Numbers in (-1, 1), of which every binary16 and bfloat16 is one as well.
std::vector<char> random(int64_t elements, Storage storage = Storage::float32) {
  static uint32_t state = 1;
  const int64_t bytes = kElement[static_cast<int>(storage)];
  std::vector<char> data(static_cast<size_t>(elements * bytes));
  for (int64_t i = 0; i < elements; ++i) {
    const float value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 26) / 32.f - 1.f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (storage == Storage::bfloat16) bits >>= 16;
    if (storage == Storage::float16)
      bits = value == 0 ? 0 : (bits >> 16 & 0x8000) | (((bits >> 13 & 0x3ffff) - (112u << 10)) & 0x7fff);
    std::memcpy(&data[static_cast<size_t>(i * bytes)], &bits, static_cast<size_t>(bytes));
  }
  return data;
}

// Outputs of a call, which are compared.
class Outputs {
 public:
  template <class T = void>
  T* add(int64_t elements, Storage storage = Storage::float32) {
    const int64_t bytes = elements * kElement[static_cast<int>(storage)];
    parts_.push_back({storage, std::vector<char>(static_cast<size_t>(bytes), '\xff')});  // NaN in every type
    return reinterpret_cast<T*>(parts_.back().bytes.data());
  }
  size_t bytes() const {
    size_t sum = 0;
    for (const Part& part : parts_) sum += part.bytes.size();
    return sum;
  }
  bool operator==(const Outputs& other) const {
    return std::equal(parts_.begin(), parts_.end(), other.parts_.begin(), other.parts_.end(),
                      [](const Part& a, const Part& b) { return a.bytes == b.bytes; });
  }
  bool hold_a_nan() const {
    return std::any_of(parts_.begin(), parts_.end(), [](const Part& part) { return holds_a_nan(part); });
  }

 private:
  struct Part {
    Storage storage;
    std::vector<char> bytes;
  };

  static bool holds_a_nan(const Part& part) {
    const size_t size = static_cast<size_t>(kElement[static_cast<int>(part.storage)]);
    for (size_t i = 0; i < part.bytes.size(); i += size) {
      uint32_t bits = 0;
      std::memcpy(&bits, &part.bytes[i], size);
      const bool nan = part.storage == Storage::float32    ? (bits & 0x7fffffff) > 0x7f800000
                       : part.storage == Storage::bfloat16 ? (bits & 0x7fff) > 0x7f80
                                                           : (bits & 0x7fff) > 0x7c00;
      if (nan) return true;
    }
    return false;
  }

  std::vector<Part> parts_;
};

struct Call {
  const char* name;
  // Makes outputs by the executor; none where no kernel takes the call.
  Outputs (*run)(Storage, const Executor&);
};

// Fixed inputs: both runs of a call read the same.
template <int id>
const void* input(int64_t elements, Storage storage = Storage::float32) {
  static std::vector<char> data[3];
  auto& of = data[static_cast<int>(storage)];
  if (of.empty()) of = random(elements, storage);
  return of.data();
}
template <int id>
const float* floats(int64_t elements) {
  return static_cast<const float*>(input<id>(elements));
}

constexpr int64_t N = 2, C = 40, H = 22, W = 20, kMap = N * C * H * W, kPixels = N * H * W, D = 90;
constexpr Strides kLast{C * H * W, 1, C * W, C};

// [C, 1, k, k], channels innermost as `optimize` stores them.
template <int id>
Filter filter(int64_t k, Storage storage) {
  return {input<id>(C * k * k, storage), floats<id + 1>(C), k, k, 1, k * C, C};
}

Outputs depthwise(Storage s, const Executor& e) {
  Outputs out;
  kernels->depthwise_conv2d({s, N, C, 1, H, W, H, W, 1, 1, 3, 3, input<0>(kMap, s), kLast, filter<10>(7, s),
                             Activation::gelu, out.add(kMap, s), kLast},
                            e);
  return out;
}

FfnifiedAttention attention_of(Storage s) {
  FfnifiedAttention op{};
  op.storage = s, op.n = N, op.channels = C, op.h = H, op.w = W;
  op.query = input<0>(kMap, s), op.query_stride = kLast;
  op.key = filter<10>(7, s), op.value = filter<20>(7, s);
  op.key_pad_top = op.key_pad_left = op.value_pad_top = op.value_pad_left = 3;
  op.activation = Activation::gelu, op.scale = floats<30>(C);
  return op;
}

Outputs attention(Storage s, const Executor& e) {
  Outputs out;
  FfnifiedAttention op = attention_of(s);
  op.residual = input<1>(kMap, s), op.residual_stride = kLast;
  op.out = out.add(kMap, s), op.out_stride = kLast;
  kernels->ffnified_attention(op, e);
  return out;
}

Outputs mix_channels(Storage s, const LayerNorm* norm, const Executor& e) {
  Outputs out;
  ChannelMixer op{};
  op.norm = norm;
  op.storage = s, op.n = N, op.channels = C, op.hidden = D, op.outputs = C;
  op.h = op.out_h = H, op.w = op.out_w = W;
  op.x = input<0>(kMap, s), op.x_stride = kLast, op.filter = filter<10>(7, s), op.pad_top = op.pad_left = 3;
  op.expand = input<31>(D * C, s), op.expand_stride = C, op.expand_bias = floats<32>(D);
  op.project = input<33>(C * D, s), op.project_stride = D, op.project_bias = floats<34>(C);
  op.activation = Activation::gelu, op.scale = floats<30>(C);
  op.residual = input<0>(kMap, s), op.residual_stride = kLast;
  op.out = out.add(kMap, s), op.out_stride = kLast;
  kernels->channel_mixer(op, e);
  return out;
}

Outputs mixer(Storage s, const Executor& e) { return mix_channels(s, nullptr, e); }

Outputs norm_mixer(Storage s, const Executor& e) {
  const LayerNorm norm{floats<50>(C), floats<51>(C), 1e-6f};
  return mix_channels(s, &norm, e);
}

Conv2d conv_of(Storage s, int64_t inputs, int64_t k, int64_t stride) {
  Conv2d op{};
  op.storage = s, op.n = N, op.channels = inputs, op.outputs = D;
  op.h = H, op.w = W, op.out_h = H / stride, op.out_w = W / stride;
  op.kh = op.kw = k, op.stride_h = op.stride_w = stride, op.pad_top = op.pad_left = k / 2;
  op.x_stride = {inputs * H * W, 1, inputs * W, inputs};
  op.weight_stride = k * k * inputs, op.channels_inside = true, op.bias = floats<35>(D);
  op.activation = Activation::gelu;
  op.out_stride = {D * op.out_h * op.out_w, 1, D * op.out_w, D};
  return op;
}

Outputs dense(Storage s, const Executor& e) {
  Outputs out;
  for (const int64_t k : {1, 3}) {
    Conv2d op = conv_of(s, C, k, k == 1 ? 1 : 2);
    op.x = input<0>(kMap, s), op.weight = k == 1 ? input<36>(D * C, s) : input<37>(D * C * 9, s);
    op.out = out.add(N * D * op.out_h * op.out_w, s);
    kernels->conv2d(op, e);
  }
  constexpr int64_t kInputs = 1000, kFew = 5;  // of a few pixels, whose weight several tasks read
  Conv2d op = conv_of(s, kInputs, 1, 1);
  op.n = op.h = op.out_h = 1, op.w = op.out_w = kFew;
  op.x = input<0>(kMap, s), op.weight = input<60>(D * kInputs, s), op.out = out.add(kFew * D, s);
  kernels->conv2d(op, e);
  return out;
}

Outputs stem(Storage s, const Executor& e) {
  Outputs out;
  Conv2d first = conv_of(s, 3, 3, 2), second = conv_of(s, D, 3, 2);
  first.x = input<2>(N * 3 * H * W, s), first.weight = input<38>(D * 27, s);
  second.h = first.out_h, second.w = first.out_w;
  second.out_h = (second.h + 1) / 2, second.out_w = (second.w + 1) / 2;
  second.out_stride = {D * second.out_h * second.out_w, 1, D * second.out_w, D};
  second.weight = input<39>(D * D * 9, s), second.out = out.add(N * D * second.out_h * second.out_w, s);
  try {
    kernels->conv2d_pair(first, second, e);
  } catch (const std::invalid_argument&) {  // else what it takes stays NaN, and what it does not counts as one more
    if (!kernels->pairs_conv2d(first, second)) return {};
  }
  return out;
}

FilterGrad filter_grad(Outputs& out, Storage s) { return {out.add(C * 49, s), 49, 7, 1, out.add(C, s)}; }

Outputs depthwise_backward(Storage s, const Executor& e) {
  Outputs out;
  DepthwiseConv2dBackward op{};
  op.storage = s, op.n = N, op.channels = C, op.multiplier = 1;
  op.h = op.out_h = H, op.w = op.out_w = W, op.stride_h = op.stride_w = 1, op.pad_top = op.pad_left = 3;
  op.x = input<0>(kMap, s), op.x_stride = kLast, op.filter = filter<10>(7, s), op.activation = Activation::gelu;
  op.grad = input<1>(kMap, s), op.grad_stride = kLast, op.x_grad = out.add(kMap, s), op.x_grad_stride = kLast;
  op.filter_grad = filter_grad(out, s);
  kernels->depthwise_conv2d_backward(op, e);
  return out;
}

Outputs attention_backward(Storage s, const Executor& e) {
  Outputs out;
  const FfnifiedAttention f = attention_of(s);
  kernels->ffnified_attention_backward({s,
                                        N,
                                        C,
                                        H,
                                        W,
                                        f.query,
                                        kLast,
                                        f.key,
                                        f.value,
                                        3,
                                        3,
                                        3,
                                        3,
                                        f.activation,
                                        f.scale,
                                        input<1>(kMap, s),
                                        kLast,
                                        out.add(kMap, s),
                                        kLast,
                                        filter_grad(out, s),
                                        filter_grad(out, s),
                                        out.add<float>(C, s)},
                                       e);
  return out;
}

Outputs pointwise_backward(Storage s, const Executor& e) {
  if (s != Storage::float32) return {};
  Outputs out;
  kernels->pointwise_conv2d_backward({kPixels, C, D, floats<40>(kPixels * D), floats<0>(kMap), floats<36>(D * C),
                                      out.add<float>(kMap), out.add<float>(D * C), out.add<float>(D)},
                                     e);
  return out;
}

Norm norm(Outputs& out) { return {floats<30>(C), floats<34>(C), 1e-5f, out.add<float>(C), out.add<float>(C)}; }

Outputs batch_norm(Storage s, const Executor& e) {
  Outputs out;
  const BatchNorm op{s, kPixels, C, input<0>(kMap, s), norm(out), Activation::gelu, out.add(kMap, s)};
  kernels->batch_norm(op, e);
  kernels->batch_norm_backward({op, input<1>(kMap, s), out.add(kMap, s), {out.add<float>(C), out.add<float>(C)}}, e);
  return out;
}

Outputs branched(Storage s, const Executor& e) {
  Outputs out;
  BranchedDepthwise op{s, N, C, 1, H, W, H, W, 1, 1, input<0>(kMap, s), kLast, 2, {}, Activation::gelu, nullptr, kLast};
  op.branch[0] = {{input<41>(C * 49, s), nullptr, 7, 7, 49, 7, 1}, norm(out)};
  op.branch[1] = {{input<42>(C * 9, s), nullptr, 3, 3, 9, 3, 1}, norm(out)};
  op.out = out.add(kMap, s);
  kernels->branched_depthwise(op, e);
  BranchedDepthwiseBackward back{op, input<1>(kMap, s), kLast, out.add(kMap, s), kLast, {}};
  for (const int b : {0, 1}) back.gradients[b] = {out.add(C * (b ? 9 : 49), s), {out.add<float>(C), out.add<float>(C)}};
  kernels->branched_depthwise_backward(back, e);
  return out;
}

Outputs feed_forward(Storage s, const Executor& e) {
  if (s != Storage::float32) return {};
  Outputs out;
  const FeedForward op{kPixels,
                       C,
                       D,
                       C,
                       floats<0>(kMap),
                       floats<36>(D * C),
                       floats<35>(D),
                       floats<43>(C * D),
                       floats<34>(C),
                       Activation::gelu,
                       floats<30>(C),
                       floats<1>(kMap),
                       out.add<float>(kPixels * D),
                       out.add<float>(kMap)};
  kernels->feed_forward(op, e);
  kernels->feed_forward_backward({op, floats<1>(kMap), out.add<float>(kMap), out.add<float>(D * C), out.add<float>(D),
                                  out.add<float>(C * D), out.add<float>(C), out.add<float>(C)},
                                 e);
  return out;
}

constexpr Call kCalls[] = {
    {"depthwise_conv2d", depthwise},
    {"ffnified_attention", attention},
    {"channel_mixer", mixer},
    {"norm_mixer", norm_mixer},
    {"conv2d", dense},
    {"conv2d_pair", stem},
    {"depthwise_conv2d_backward", depthwise_backward},
    {"ffnified_attention_backward", attention_backward},
    {"pointwise_conv2d_backward", pointwise_backward},
    {"batch_norm", batch_norm},
    {"branched_depthwise", branched},
    {"feed_forward", feed_forward},
};

}  // namespace

int main() {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  int faults = 0;
  for (const auto table : {TABLES}) {
    kernels = table();
    for (const Call& call : kCalls) {
      for (const Storage storage : {Storage::float32, Storage::bfloat16, Storage::float16}) {
        const Outputs alone = call.run(storage, {4, run_alone}), together = call.run(storage, {4, run_on_threads});
        if (!alone.bytes()) continue;
        const bool differ = !(alone == together), unwritten = alone.hold_a_nan();
        std::printf("%s %s %s: %zu bytes%s%s\n", kernels->isa, call.name, kNames[static_cast<int>(storage)],
                    alone.bytes(), differ ? ", differ" : "", unwritten ? ", hold a NaN" : "");
        faults += differ + unwritten;
      }
    }
  }
  return faults ? 1 : 0;
}
