// The libraries define their operators themselves, so that C++ programs need nothing else. csrc/build.py generates
// operator_schemas.h from ffnet_kernels/ops/schemas.py. Python loads the libraries first, then adds fakes, gradients
// and fallbacks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "operator_schemas.h"

// Exists from torch 2.12 on, which is newer than TORCH_TARGET_VERSION: null in older ones.
extern "C" {
__attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
__attribute__((weak)) AOTITorchError torch_library_def_with_tags(TorchLibraryHandle, const char*, const int32_t*,
                                                                 int32_t);
}

namespace ffnet {

// Defines a namespace's operators for the lifetime of this object.
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
