// oodkern._build: what was built, as plain attributes. Written by csrc/native_build.py into build_info.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_info.h"

PYBIND11_MODULE(_build, m) {
  m.doc() = "What was built: compiler, flags, CUDA version and architectures or the reason why there are none.";
  m.attr("compiler") = OODKERN_COMPILER;
  m.attr("flags") = OODKERN_FLAGS;
  m.attr("torch_version") = OODKERN_TORCH_VERSION;
  m.attr("instruction_sets") = std::vector<std::string>{OODKERN_INSTRUCTION_SETS};
  m.attr("cuda_version") = OODKERN_CUDA_VERSION;  // None where there is no CUDA library
  m.attr("cuda_architectures") = std::vector<std::string>{OODKERN_CUDA_ARCHITECTURES};
  m.attr("cuda_reason") = OODKERN_CUDA_REASON;  // why there is no CUDA library; empty where there is one
}
