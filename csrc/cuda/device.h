// What kernels need of a GPU, behind functions: nvcc compiles them to instructions, any other compiler to the host
// execution that the tests run (host/execution.h). Kernels use nothing else of CUDA.
#pragma once

#include <stdexcept>
#include <string>

#include "types.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
// A kernel takes one struct by value. The bounds are threads a block and the least number of blocks a multiprocessor.
#define FFNET_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FFNET_PARAMETER const __grid_constant__
#define FFNET_INLINE_LAMBDA __attribute__((always_inline))  // a call would keep what it refers to in memory
#else
#include "host/collectives.h"
#define FFNET_KERNEL(threads, blocks) void
#define FFNET_PARAMETER const
#define FFNET_INLINE_LAMBDA
#endif

// Tensor cores with 16-deep products, bfloat16 and asynchronous copies: sm_80 on. Kernels built on them are empty
// below.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FFNET_HAS_SM80 1
#else
#define FFNET_HAS_SM80 0
#endif

// Where kernels need a few more registers than on sm_90: then one block fewer runs on a multiprocessor.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
#define FFNET_FEWER_BLOCKS 0
#else
#define FFNET_FEWER_BLOCKS 1
#endif

namespace ffnet {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef __CUDACC__

FFNET_DEVICE int thread_index() { return threadIdx.x; }
FFNET_DEVICE int block_x() { return blockIdx.x; }
FFNET_DEVICE int block_y() { return blockIdx.y; }
FFNET_DEVICE int block_z() { return blockIdx.z; }
FFNET_DEVICE int grid_x() { return gridDim.x; }
FFNET_DEVICE int block_threads() { return blockDim.x; }

// The dynamic shared memory of the block, the only kind that kernels use; 16-byte aligned.
FFNET_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

FFNET_DEVICE void sync_block() { __syncthreads(); }
FFNET_DEVICE void sync_warp() { __syncwarp(); }

template <class V>
FFNET_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}

template <class V>
FFNET_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}

FFNET_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FFNET_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d = a·b + c of 16x16 and 16x8 matrices: T is Half or BFloat16, sums are float. Lane 4g + t holds of a the rows g
// (a0, a2) and g + 8 (a1, a3), columns 2t, 2t + 1 (a0, a1) and 2t + 8, 2t + 9 (a2, a3); of b column g, rows 2t, 2t + 1
// (b0) and 2t + 8, 2t + 9 (b1); of c and d the rows g (0, 1) and g + 8 (2, 3), columns 2t, 2t + 1.
template <class T>
FFNET_DEVICE void multiply_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1, const float (&c)[4]);

// The same, 8 deep: without a2, a3 and b1.
template <class T>
FFNET_DEVICE void multiply_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4]);

#if FFNET_HAS_SM80
#define FFNET_DEFINE_MULTIPLY(T, name)                                                                                \
  template <>                                                                                                         \
  FFNET_DEVICE void multiply_16x8x16<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,            \
                                        uint32_t b0, uint32_t b1, const float (&c)[4]) {                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                               \
                 ".f32 "                                                                                              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }                                                                                                                   \
  template <>                                                                                                         \
  FFNET_DEVICE void multiply_16x8x8<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4]) {   \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                                \
                 ".f32 "                                                                                              \
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"                                               \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                            \
  }
FFNET_DEFINE_MULTIPLY(Half, "f16")
FFNET_DEFINE_MULTIPLY(BFloat16, "bf16")
#undef FFNET_DEFINE_MULTIPLY

// Four 8x8 matrices of 16-bit values: lane 8i + r gives the address of row r of matrix i (16 bytes, aligned) and gets
// of each matrix row lane / 4, columns 2t, 2t + 1 with t = lane % 4; transposed, columns and rows change roles.
FFNET_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

FFNET_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 8 aligned bytes of shared memory, loaded at every call: the compiler would keep them in registers, of which there are
// too few.
FFNET_DEVICE uint2 load_again(const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint2 pair;
  asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];" : "=r"(pair.x), "=r"(pair.y) : "r"(address));
  return pair;
}

FFNET_DEVICE uint32_t load_again(const uint32_t* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t word;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// An 8x8 matrix of 16-bit values, rows and columns swapped: lane 4g + t gives row g, columns 2t, 2t + 1, and gets those
// of the result.
FFNET_DEVICE uint32_t transpose_matrix(uint32_t row) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(row));
  return transposed;
}

// Asynchronous copy of 4, 8 or 16 aligned bytes into shared memory; zeros where `valid` is false, and nothing is read.
template <int BYTES>
FFNET_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(BYTES),
                 "r"(valid ? BYTES : 0)
                 : "memory");
}

// The same of 16 aligned bytes of which only the first `bytes` are read; the others become zeros.
FFNET_DEVICE void copy_async_of(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}

// Closes a group of the thread's copies. Every thread must wait for all its groups before it ends.
FFNET_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most GROUPS_LEFT of the newest groups are in flight.
template <int GROUPS_LEFT>
FFNET_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}
#endif

#endif  // __CUDACC__

FFNET_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How a kernel is started.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
  int threads = 128;
  size_t shared_bytes = 0;
};

// How many blocks of a kernel run on a multiprocessor of the current device at once, as the driver says for its
// registers and this much shared memory; at least 1. Asked for once a kernel: its blocks are always alike (runtime.cu).
int resident_blocks(const void* kernel, int threads, size_t shared_bytes);

// Starts `kernel` on a stream of the current device; raises std::runtime_error with its name where that fails.
template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), const Grid& grid, const Parameters& parameters,
            [[maybe_unused]] void* stream) {
  using namespace std::string_literals;
  const auto fail = [&](const std::string& why) {
    throw std::runtime_error("ffnet_kernels (cuda): "s + name + ": " + why);
  };
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    fail("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
         " blocks");
#ifdef __CUDACC__
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would report it
    fail(cudaGetErrorString(error));
  };
  const auto* code = reinterpret_cast<const void*>(kernel);
  const int shared_bytes = static_cast<int>(grid.shared_bytes);
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(cudaLaunchKernel(code, blocks, dim3(grid.threads), arguments, grid.shared_bytes,
                         static_cast<cudaStream_t>(stream)));
#else
  const host::Index blocks{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
  host::record_start(name, reinterpret_cast<const void*>(kernel), grid.x * grid.y * grid.z);
  host::run_grid(blocks, grid.threads, grid.shared_bytes, [&] { kernel(parameters); });
#endif
}

}  // namespace ffnet
