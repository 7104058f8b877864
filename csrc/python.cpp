// The module tsynd.ops._C: importing it registers the operators; it tells how they were built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <array>
#include <map>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "cuda/plan.h"
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

using Plan = std::map<std::string, py::object>;

Plan plan_logits(int64_t samples, int64_t classes, const std::string& task, int64_t shared_bytes,
                 int multiprocessors) {
  const tsynd::RowPlan plan =
      tsynd::plan_rows(samples, classes, task == "multilabel", {shared_bytes, multiprocessors});
  if (plan.kind == tsynd::RowPlan::kNone)
    tsynd::refuse_rows(samples, classes, {shared_bytes, multiprocessors});
  Plan out{{"kernel", py::str(plan.kind == tsynd::RowPlan::kRegisters ? "registers"
                              : plan.kind == tsynd::RowPlan::kStaged  ? "staged"
                                                                      : "streamed")},
           {"shared_bytes", py::int_(plan.shared_bytes)}};
  if (plan.kind == tsynd::RowPlan::kRegisters) out["lanes_per_image"] = py::int_(plan.lanes);
  return out;
}

Plan plan_head(int64_t images, int64_t units, int64_t classes, int64_t samples, const std::string& task,
               bool narrow, int64_t shared_bytes, int multiprocessors, int capability,
               const std::optional<std::string>& best) {
  const tsynd::HeadPlan plan =
      tsynd::plan_head(images, units, classes, samples, task == "multilabel", narrow, true,
                       {shared_bytes, multiprocessors, capability},
                       best ? tsynd::parse_head_kernel(best->c_str()) : tsynd::best_head_kernel());
  if (plan.kind == tsynd::HeadPlan::kRows) {
    Plan out = plan_logits(samples, classes, task, shared_bytes, multiprocessors);
    out["kernel"] = py::str("product, " + std::string(py::str(out["kernel"])) + " rows, product");
    return out;
  }
  Plan out{{"kernel", py::str(plan.kind == tsynd::HeadPlan::kWgmma ? "wgmma" : "fused")},
           {"images_per_block", py::int_(plan.images)},
           {"columns", py::int_(plan.columns)},
           {"stages", py::int_(plan.stages)},
           {"shared_bytes", py::int_(plan.shared_bytes)}};
  if (plan.cluster > 1) out["blocks_per_cluster"] = py::int_(plan.cluster);
  return out;
}

Plan plan_dropout_head(int64_t units, int64_t classes, int64_t samples, bool narrow, int64_t shared_bytes,
                       int multiprocessors) {
  const tsynd::DropoutHeadPlan plan =
      tsynd::plan_dropout_head(units, classes, samples, narrow, {shared_bytes, multiprocessors});
  if (plan.kind == tsynd::DropoutHeadPlan::kGeneral) return {{"kernel", py::str("expanded passes")}};
  return {
      {"kernel", py::str(plan.kind == tsynd::DropoutHeadPlan::kTensor ? "tensor cores" : "multiply-adds")},
      {"warps_per_block", py::int_(plan.warps)},
      {"shared_bytes", py::int_(plan.shared_bytes)}};
}

Plan plan_information(int64_t images, int64_t targets, int64_t classes, int64_t samples,
                      const std::string& task, int64_t shared_bytes) {
  const tsynd::InformationPlan plan =
      tsynd::plan_information(images, targets, classes, samples, task == "multilabel", {shared_bytes, 1});
  return {{"kernel", py::str("ratios, product, logarithms, product")},
          {"images_at_once", py::int_(plan.images)},
          {"columns_at_once", py::int_(plan.columns)},
          {"shared_bytes", py::int_(plan.shared_bytes)}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the tsynd operators with torch and tells how they were built.";
  m.def("build_info", &build_info, "Versions this module was built with, and the CPU kernels in use.");
  m.def("plan_logits", &plan_logits, py::arg("samples"), py::arg("classes"), py::arg("task"),
        py::arg("shared_bytes"), py::arg("multiprocessors"), "Which CUDA kernel serves logits_uncertainty.");
  m.def("plan_head", &plan_head, py::arg("images"), py::arg("units"), py::arg("classes"), py::arg("samples"),
        py::arg("task"), py::arg("narrow"), py::arg("shared_bytes"), py::arg("multiprocessors"),
        py::arg("capability") = 0, py::arg("best") = py::none(),
        "Which CUDA kernels serve head_uncertainty; narrow: float16 or bfloat16; capability: 90 for Hopper; "
        "best: the best that may be taken, wgmma, fused or rows, else what TSYND_CUDA_HEAD says.");
  m.def("plan_dropout_head", &plan_dropout_head, py::arg("units"), py::arg("classes"), py::arg("samples"),
        py::arg("narrow"), py::arg("shared_bytes"), py::arg("multiprocessors"),
        "Which CUDA kernel serves dropout_head_uncertainty.");
  m.def("plan_information", &plan_information, py::arg("images"), py::arg("targets"), py::arg("classes"),
        py::arg("samples"), py::arg("task"), py::arg("shared_bytes"),
        "How the CUDA kernels of expected_information cut their work; ValueError for sizes that none serves, "
        "as in "
        "the other plans.");
  m.def("philox4x32", &philox, py::arg("counter"), py::arg("key"), py::arg("rounds") = tsynd::kMaskRounds,
        "Philox4x32 block of four 32-bit words (the host build of the kernels' own function).");
}
