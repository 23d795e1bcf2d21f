// What the host needs to know about the device.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "device.h"
#include "kernels.h"
#ifndef __CUDACC__
#include "host/settings.h"
#endif

namespace ffnet {

#ifdef __CUDACC__
namespace {

// Compiled like all other kernels: the code of it that the device loads shows which code of theirs it loads.
FFNET_KERNEL(32, 1) probe_kernel(FFNET_PARAMETER int) {}

struct Known {
  int architecture, multiprocessors;
};

Known ask() {
  int device = 0, multiprocessors = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    throw std::runtime_error(std::string("ffnet_kernels (cuda): the library does not run on this GPU: ") +
                             cudaGetErrorString(error));
  }
  // Code compiled for an older architecture has only the features of that one, even on a newer GPU.
  return {attributes.ptxVersion, multiprocessors};
}

}  // namespace
#endif

Device current_device(void* stream) {
#ifdef __CUDACC__
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost];  // architecture and multiprocessors in one number, 0 before they were asked for
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMost) {
    const Known found = ask();
    return {found.architecture, found.multiprocessors, stream};
  }
  int packed = known[device].load(std::memory_order_relaxed);
  if (packed == 0) {
    const Known found = ask();
    packed = found.architecture << 16 | found.multiprocessors;
    known[device].store(packed, std::memory_order_relaxed);
  }
  return {packed >> 16, packed & 0xffff, stream};
#else
  return {host::settings().architecture, host::settings().multiprocessors, stream};
#endif
}

#ifdef __CUDACC__
int resident_blocks(const void* kernel, int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) device = -1;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  int blocks = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) != cudaSuccess)
    cudaGetLastError();  // the launch reports what is wrong
  return known[{device, kernel}] = std::max(blocks, 1);
}
#else
int resident_blocks(const void*, int, size_t) { return host::settings().resident_blocks; }
#endif

}  // namespace ffnet
