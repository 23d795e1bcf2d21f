// Measures the peak of the roofline: multiply-adds on registers only, at the full speed of this instruction set.
#include "kernels.h"
#include "storage.h"

namespace ffnet::FFNET_ISA {
namespace {

// Enough independent sums for two units with a latency of six cycles; 14 of AVX2's 16 registers.
constexpr int kChains = 12;

// Each step multiplies the previous sum: a product of constants would be hoisted out of the loop.
template <class Add>
FFNET_INLINE float chains(int64_t rounds, Add add) {
  Vec x = Vec::fill(1), w = Vec::fill(0.5f), sum[kChains];
  for (Vec& s : sum) s = Vec::fill(1);
  for (int64_t round = 0; round < rounds; ++round)
    for (Vec& s : sum) s = add(x, w, s);
  Vec all = sum[0];
  for (int i = 1; i < kChains; ++i) all = all + sum[i];
  float lanes[Vec::lanes];
  all.store(lanes);
  return lanes[0];
}

}  // namespace

int64_t multiply_adds(Storage storage, int64_t rounds) {
  int64_t products = kChains * Vec::lanes;
  float sum;
#if defined(__AVX512BF16__)
  if (storage == Storage::bfloat16) {
    products *= 2;
    sum = chains(rounds, [](Vec x, Vec w, Vec s) { return dot(x, w, s); });
  } else
#endif
    sum = chains(rounds, [](Vec x, Vec w, Vec s) { return fma(s, w, x); });
  (void)storage;                  // without such products, narrow maps are widened
  asm volatile("" : : "m"(sum));  // otherwise the compiler would remove the computation
  return rounds * products;
}

}  // namespace ffnet::FFNET_ISA
