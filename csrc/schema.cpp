// Every raw op, one line each. Raw ops know no autograd: oodkern.ops wraps them in differentiable functions.
#include "stable.h"

STABLE_TORCH_LIBRARY(oodkern, m) {
  // Room `energy`: reductions of given logits [..., K].
  m.def("energy(Tensor logits, float temperature) -> Tensor");
  m.def("energy_backward(Tensor grad, Tensor logits, Tensor energy, float temperature) -> Tensor");
  m.def(
      "energy_double_backward(Tensor cotangent, Tensor grad, Tensor logits, Tensor energy, float temperature) -> "
      "(Tensor, Tensor)");
  m.def("joint_energy(Tensor logits) -> Tensor");
  m.def("joint_energy_backward(Tensor grad, Tensor logits) -> Tensor");
  m.def("joint_energy_double_backward(Tensor cotangent, Tensor grad, Tensor logits) -> (Tensor, Tensor)");

  // The CPU instruction sets that were built and that this processor has, worst first, between spaces; the one
  // in use (the best, unless another was chosen).
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
}
