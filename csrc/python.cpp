// The module tsynd._C: importing it registers the operators; it tells how they were built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <array>
#include <map>
#include <string>

#include "cpu/kernels.h"
#include "philox.h"

namespace py = pybind11;

namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key, int rounds) {
  const tsynd::Philox4 out = tsynd::philox4x32(
      tsynd::Philox4{{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1], rounds);
  return {out.w[0], out.w[1], out.w[2], out.w[3]};
}

std::map<std::string, std::string> build_info() {
  return {{"torch", TORCH_VERSION},
          {"compiler", TSYND_COMPILER},
          {"cuda", TSYND_CUDA_VERSION},
          {"cuda_architectures", TSYND_CUDA_ARCHITECTURES_TEXT},
          {"cpu_kernels", tsynd::kernels().isa}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the tsynd operators with torch and tells how they were built.";
  m.def("build_info", &build_info, "Versions this module was built with, and the CPU kernels in use.");
  m.def("philox4x32", &philox, py::arg("counter"), py::arg("key"), py::arg("rounds") = tsynd::kMaskRounds,
        "Philox4x32 block of four 32-bit words (the host build of the kernels' own function).");
}
