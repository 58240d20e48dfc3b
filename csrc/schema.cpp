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

  // CPU instruction sets: chooses one by its index in the build's list, returns the one in use before.
  m.def("use_instruction_set(int index) -> int");
}
