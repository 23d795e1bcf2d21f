// The roof of every kernel: multiply-adds that depend on nothing but registers, as fast as this instruction set goes.
#include "kernels.h"
#include "storage.h"

namespace ffnet::FFNET_ISA {
namespace {

// Enough for two units whose sums are ready again after six cycles; 14 registers of the 16 that AVX2 has.
constexpr int kChains = 12;

// Each step multiplies the sum before it: a product of constants would leave the loop where it is an instruction alone.
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
  (void)storage;                  // where there are no such products, narrow maps are widened
  asm volatile("" : : "m"(sum));  // wanted by nobody, it would not be computed
  return rounds * products;
}

}  // namespace ffnet::FFNET_ISA
