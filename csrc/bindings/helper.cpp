// An optional module, which only the Python version that it was built for loads.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../cpu/select.h"

namespace {

constexpr int kLine = 64;

// Reading many objects that have left the cache costs one miss after the other; the processor can fetch dozens at once.
// Prefetching addresses that have been freed is harmless.
void fetch(const pybind11::buffer& addresses, int lines) {
  const pybind11::buffer_info info = addresses.request();
  if (info.itemsize != sizeof(std::uint64_t)) throw pybind11::value_error("addresses: expected an array('Q')");
  const auto* first = static_cast<const std::uint64_t*>(info.ptr);
  for (pybind11::ssize_t i = 0; i < info.size; ++i) {
    const auto* memory = reinterpret_cast<const char*>(first[i]);
    for (int line = 0; line < lines; ++line) __builtin_prefetch(memory + line * kLine);
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "What Python asks of the processor.";
  m.def("fetch", &fetch, pybind11::arg("addresses"), pybind11::arg("lines"),
        "Asks for cache lines: so many from each address of an array('Q').");
  m.def(
      "multiply_adds",
      [](const std::string& dtype, int64_t rounds) {
        const bool bfloat16 = dtype == "bfloat16";
        if (!bfloat16 && dtype != "float32") throw pybind11::value_error("dtype: expected float32 or bfloat16");
        const auto storage = bfloat16 ? ffnet::Storage::bfloat16 : ffnet::Storage::float32;
        const ffnet::Kernels& kernels = ffnet::active_kernels();
        pybind11::gil_scoped_release others_run;
        return kernels.multiply_adds(storage, rounds);
      },
      pybind11::arg("dtype"), pybind11::arg("rounds"),
      "Multiplies and adds on registers alone, as fast as the instruction set goes; the multiply-adds it did.");
}
