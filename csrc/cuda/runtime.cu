// What the host asks of the device.
#include "device.h"
#include "kernels.h"
#ifndef __CUDACC__
#include "host/settings.h"
#endif

namespace ffnet {

Device current_device(void* stream) {
#ifdef __CUDACC__
  const auto attribute = [](cudaDeviceAttr name) {
    int device = 0, value = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, device);
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("ffnet_kernels (cuda): ") + cudaGetErrorString(error));
    return value;
  };
  const int architecture =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return {architecture, attribute(cudaDevAttrMultiProcessorCount), stream};
#else
  return {host::settings().architecture, host::settings().multiprocessors, stream};
#endif
}

}  // namespace ffnet
