// For the benchmarks only: nothing else needs this module, which one version of Python loads.
#include <pybind11/pybind11.h>

#include "../cpu/select.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "What the benchmarks ask of the processor.";
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
