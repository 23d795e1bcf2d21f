// What Python asks the native code that is no operator: which instruction sets there are, and which one runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/select.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Instruction sets of the native CPU kernels.";
  m.def("isa", [] { return std::string(ffnet::active_kernels().isa); }, "The instruction set that calls use.");
  m.def("lanes", [] { return ffnet::active_kernels().lanes; }, "Channels that one vector of it holds.");
  m.def(
      "is_unrolled", [](int64_t kh, int64_t kw) { return ffnet::active_kernels().is_unrolled(kh, kw); },
      pybind11::arg("kh"), pybind11::arg("kw"), "Whether filters of this size have code of their own.");
  m.def(
      "usable_isas",
      [] {
        std::vector<std::string> names;
        for (const ffnet::Kernels* kernels : ffnet::usable_kernels()) names.emplace_back(kernels->isa);
        return names;
      },
      "The instruction sets that this build holds and this processor runs, slowest first.");
  m.def(
      "multiply_adds",
      [](const std::string& dtype, int64_t rounds) {
        const auto storage = dtype == "bfloat16" ? ffnet::Storage::bfloat16 : ffnet::Storage::float32;
        const ffnet::Kernels& kernels = ffnet::active_kernels();
        pybind11::gil_scoped_release others_run;
        return kernels.multiply_adds(storage, rounds);
      },
      pybind11::arg("dtype"), pybind11::arg("rounds"),
      "Multiplies and adds on registers alone, as fast as the instruction set goes; the multiply-adds it did.");
  m.def("select_isa", &ffnet::select_isa, pybind11::arg("isa"),
        "Makes calls use this instruction set; an empty name returns to the default.");
}
