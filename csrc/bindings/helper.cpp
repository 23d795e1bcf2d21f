// For the benchmarks only: nothing else needs this module, which one version of Python loads.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, m) { m.doc() = "What the benchmarks ask of the processor."; }
