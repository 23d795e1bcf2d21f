// The libraries define their operators themselves, so that C++ programs need nothing else: the schemas are those of
// ffnet_kernels/ops/schemas.py, which csrc/build.py makes operator_schemas.h of. Python, which loads the libraries
// before it knows the operators, adds fakes, gradients and what runs where there is no kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "operator_schemas.h"

// Of torch from 2.12 on, and newer than TORCH_TARGET_VERSION: null in an older one.
extern "C" {
__attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
__attribute__((weak)) AOTITorchError torch_library_def_with_tags(TorchLibraryHandle, const char*, const int32_t*,
                                                                 int32_t);
}

namespace ffnet {

// A namespace's operators, for as long as this lives.
class Definitions {
 public:
  explicit Definitions(const char* name) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment(name, __FILE__, __LINE__, &library_));
  }
  ~Definitions() { aoti_torch_delete_library_object(library_); }
  Definitions(const Definitions&) = delete;
  Definitions& operator=(const Definitions&) = delete;

  void operator()(const char* schema) {
    if (torch_library_def_with_tags && torch_tag_pt2_compliant_tag) {
      const int32_t tag = torch_tag_pt2_compliant_tag();
      STABLE_TORCH_ERROR_CODE_CHECK(torch_library_def_with_tags(library_, schema, &tag, 1));
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(library_, schema));
    }
  }

 private:
  TorchLibraryHandle library_;
};

}  // namespace ffnet

#define FFNET_DEFINE(name, SCHEMAS)          \
  static const struct name##_definitions {   \
    ffnet::Definitions define{#name};        \
    name##_definitions() { SCHEMAS(define) } \
  } name##_defined;
