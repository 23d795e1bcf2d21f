// The functions of device.h on the host: each warp collective gathers the lanes' operands, computes the whole result
// and hands every lane its part.
#pragma once

#include <cmath>

#include "../types.h"
#include "execution.h"

namespace ffnet {

struct uint2 {
  uint32_t x, y;
};

using host::sync_block;

inline int thread_index() { return host::thread_index(); }
inline int block_x() { return static_cast<int>(host::block_index().x); }
inline int block_y() { return static_cast<int>(host::block_index().y); }
inline int block_z() { return static_cast<int>(host::block_index().z); }
inline int grid_x() { return static_cast<int>(host::grid_size().x); }
inline int block_threads() { return host::block_threads(); }
inline unsigned char* shared_memory() { return host::shared_memory(); }

inline void sync_warp() {
  host::warp_collective("sync_warp", nullptr, nullptr, [](const void* const*, void* const*) {});
}

template <class V>
struct Shuffled {
  V value;
  int lane;
};

template <class V>
V shuffle(V value, int lane) {
  const Shuffled<V> input{value, lane & 31};
  V output;
  host::warp_collective("shuffle", &input, &output, [](const void* const* inputs, void* const* outputs) {
    for (int i = 0; i < host::kWarp; ++i) {
      const int from = static_cast<const Shuffled<V>*>(inputs[i])->lane;
      *static_cast<V*>(outputs[i]) = static_cast<const Shuffled<V>*>(inputs[from])->value;
    }
  });
  return output;
}

template <class V>
V shuffle_xor(V value, int mask) {
  return shuffle(value, (thread_index() % host::kWarp) ^ mask);
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

struct MatrixOperands {
  uint32_t a[4], b[2];
  float c[4];
};

template <class T, int DEPTH>
void multiply_on_host(float (&d)[4], const MatrixOperands& operands) {
  host::warp_collective("matrix product", &operands, &d, [](const void* const* inputs, void* const* outputs) {
    float a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < host::kWarp; ++lane) {
      const auto& in = *static_cast<const MatrixOperands*>(inputs[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < DEPTH / 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8] = low_float<T>(in.a[i]);
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high_float<T>(in.a[i]);
      }
      for (int i = 0; i < DEPTH / 8; ++i) {
        b[2 * t + i * 8][g] = low_float<T>(in.b[i]);
        b[2 * t + i * 8 + 1][g] = high_float<T>(in.b[i]);
      }
    }
    for (int lane = 0; lane < host::kWarp; ++lane) {
      const auto& in = *static_cast<const MatrixOperands*>(inputs[lane]);
      float result[4];
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        result[i] = in.c[i];
        for (int k = 0; k < DEPTH; ++k) result[i] += a[row][k] * b[k][column];
      }
      memcpy(outputs[lane], result, sizeof result);
    }
  });
}

template <class T>
void multiply_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      const float (&c)[4]) {
  multiply_on_host<T, 16>(d, {{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}});
}

template <class T>
void multiply_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4]) {
  multiply_on_host<T, 8>(d, {{a0, a1, 0, 0}, {b0, 0}, {c[0], c[1], c[2], c[3]}});
}

template <bool TRANSPOSED>
void load_matrices_on_host(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) host::fault("a row of a matrix at a misaligned address");
  // Each lane reads its own row, so that a sanitizer knows whose access it is.
  uint16_t values[8];
  memcpy(values, row, sizeof values);
  host::warp_collective(TRANSPOSED ? "load matrices, transposed" : "load matrices", values, &r,
                        [](const void* const* inputs, void* const* outputs) {
                          for (int lane = 0; lane < host::kWarp; ++lane) {
                            const int g = lane / 4, t = lane % 4;
                            const auto at = [&](int matrix, int i, int j) -> uint32_t {
                              return static_cast<const uint16_t*>(inputs[matrix * 8 + i])[j];
                            };
                            uint32_t result[4];
                            for (int m = 0; m < 4; ++m)
                              result[m] = TRANSPOSED ? at(m, 2 * t, g) | at(m, 2 * t + 1, g) << 16
                                                     : at(m, g, 2 * t) | at(m, g, 2 * t + 1) << 16;
                            memcpy(outputs[lane], result, sizeof result);
                          }
                        });
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_on_host<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices_on_host<true>(r, row); }

inline uint2 load_again(const void* shared) {
  uint2 pair;
  memcpy(&pair, shared, sizeof pair);
  return pair;
}

inline uint32_t load_again(const uint32_t* shared) { return *shared; }

inline uint32_t transpose_matrix(uint32_t row) {
  uint32_t transposed;
  host::warp_collective("transpose matrix", &row, &transposed, [](const void* const* inputs, void* const* outputs) {
    for (int lane = 0; lane < host::kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const auto at = [&](int i, int j) -> uint32_t {
        return *static_cast<const uint32_t*>(inputs[4 * i + j / 2]) >> j % 2 * 16 & 0xffff;
      };
      *static_cast<uint32_t*>(outputs[lane]) = at(2 * t, g) | at(2 * t + 1, g) << 16;
    }
  });
  return transposed;
}

template <int BYTES>
void copy_async(void* shared, const void* global, bool valid) {
  host::copy_async(shared, global, BYTES, valid ? BYTES : 0);
}

inline void copy_async_of(void* shared, const void* global, int bytes) { host::copy_async(shared, global, 16, bytes); }

inline void commit_copies() { host::commit_copies(); }

template <int GROUPS_LEFT>
void wait_for_copies() {
  host::wait_for_copies(GROUPS_LEFT);
}

}  // namespace ffnet
