// The inner kernel of all matrix products (product.h), compiled once for all operators.
#include "product.h"

#include <utility>

namespace ffnet::FFNET_ISA {
namespace {

// One running sum over the whole depth would accumulate rounding errors, so after so many steps it is added to C and
// restarted. For bfloat16 products these errors are smaller than the final rounding.
template <class Taps>
constexpr int64_t kRunningDepth = Taps::rows == 1 ? 128 : 512;

// C += A * B for R rows and the first V vectors of a panel; C is [R][kPanel].
template <class Taps, Order order, int V, int R>
void product_block(const LeftOperand& a, const float* b, float* c) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = Vec::fill(0);
  constexpr int64_t kLine = 16;  // floats
  for (int64_t run = 0; run < a.runs; ++run) {
    const float *row[R], *column = a.data + run * a.run_stride;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) row[r] = column + r * a.stride;
    for (int64_t k = 0; k < a.depth;) {
      if constexpr (order == Order::by_rows_ahead) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + R * a.stride + k, 0, 2);
      }
      const int64_t end = order == Order::by_rows_ahead ? min_of(k + kLine, a.depth) : a.depth;
      for (; k < end; ++k, b += kPanel) {
        Vec right[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) right[v] = Vec::load(b + v * Vec::lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vec left = Vec::fill(order == Order::by_columns ? column[r] : row[r][k]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum[r][v] = Taps::add(left, right[v], sum[r][v]);
        }
        column += a.stride;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = c + r * kPanel + v * Vec::lanes;
      (Vec::load(at) + sum[r][v]).store(at);
    }
  }
}

template <class Taps, Order order, int V, size_t... I>
FFNET_INLINE void product_of(int64_t rows, const LeftOperand& a, const float* b, float* c, std::index_sequence<I...>) {
  using Block = void (*)(const LeftOperand&, const float*, float*);
  static constexpr Block make[] = {product_block<Taps, order, V, I + 1>...};
  if (a.runs * a.depth <= kRunningDepth<Taps>) return make[rows - 1](a, b, c);
  const int64_t step = order == Order::by_columns ? a.stride : 1;
  for (int64_t run = 0; run < a.runs; ++run, b += a.depth * kPanel)
    for (int64_t k = 0; k < a.depth; k += kRunningDepth<Taps>)
      make[rows - 1]({a.data + run * a.run_stride + k * step, a.stride, min_of(kRunningDepth<Taps>, a.depth - k)},
                     b + k * kPanel, c);
}

}  // namespace

template <class Taps, Order order>
void add_product(int64_t rows, int64_t columns, const LeftOperand& a, const float* b, float* c) {
  constexpr std::make_index_sequence<kProductRows> each;
  if (columns > kLanes)
    product_of<Taps, order, 2>(rows, a, b, c, each);
  else
    product_of<Taps, order, 1>(rows, a, b, c, each);
}

#define FFNET_ADD_PRODUCT(Taps, order) \
  template void add_product<Taps, Order::order>(int64_t, int64_t, const LeftOperand&, const float*, float*);
FFNET_ADD_PRODUCT(FloatTaps, by_rows)
FFNET_ADD_PRODUCT(FloatTaps, by_rows_ahead)
FFNET_ADD_PRODUCT(FloatTaps, by_columns)
#if defined(__AVX512BF16__)
FFNET_ADD_PRODUCT(PairTaps, by_rows)
FFNET_ADD_PRODUCT(PairTaps, by_rows_ahead)
#endif

}  // namespace ffnet::FFNET_ISA
