// Every operator's schema. Kernels register themselves for CPU and CUDA next to their code; fake kernels and
// autograd rules are registered in tsynd/ops/registration.py (the stable ABI has neither).
#include <torch/csrc/stable/library.h>

// value [B] float32; gradients have the inputs' dtype. objective: mutual_information | entropy;
// task: multiclass | multilabel.
STABLE_TORCH_LIBRARY(tsynd, m) {
  m.def("logits_uncertainty(Tensor logits, str objective, str task) -> (Tensor value, Tensor gradient)");
  m.def("expected_information(Tensor logits, Tensor targets, str task) -> (Tensor value, Tensor gradient)");
  m.def(
      "head_uncertainty(Tensor features, Tensor weight, Tensor? bias, str objective, str task)"
      " -> (Tensor value, Tensor gradient)");
  m.def(
      "dropout_head_uncertainty(Tensor features, Tensor weight, Tensor? bias, float p, int samples, int seed,"
      " int layer, Tensor sample_ids, str objective, str task) -> (Tensor value, Tensor gradient)");
  m.def(
      "dropout_mask(int units, float p, int samples, int seed, int layer, Tensor sample_ids)"
      " -> Tensor mask");
  // input [images, units, inner], or [samples * images, ...] where `passes`; out [samples * images, units,
  // inner]
  m.def(
      "dropout_expand(Tensor input, float p, int samples, int seed, int layer, Tensor sample_ids, bool "
      "passes)"
      " -> Tensor out");
  m.def(
      "dropout_gather(Tensor gradient, float p, int samples, int seed, int layer, Tensor sample_ids,"
      " bool passes) -> Tensor out");
  m.def(
      "ascend_(Tensor(a!) latents, Tensor gradient, Tensor origin, float step, float radius, str rule)"
      " -> ()");
}
