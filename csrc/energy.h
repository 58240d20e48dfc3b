// Rooms of one number a row that can be differentiated twice, `energy` first, on any device: arguments checked, results
// allocated, one RowCall made of both. An Engine brings
//   run(call, rows, logits)   computes it
//   prepare(data, bytes)      is told of large results before they are written
#pragma once

#include "check.h"

namespace oodkern {

// Energy and JointEnergy differ in their reducer and their sign, and in nothing else.
struct RowKind {
  Reduction reduction;
  double sign;
  double temperature;
  const char* input = "logits";  // the raw ops' names of what they are given
  const char* score = "energy";
};
inline RowKind energy_kind(double temperature) {
  return {Reduction::kLogSumExp, -1.0, temperature};
}
inline RowKind joint_energy_kind() {
  return {Reduction::kSoftplusSum, 1.0, 1.0};
}

inline RowCall call_of(RowKind kind, Pass pass, const Tensor& logits, const Rows& rows) {
  RowCall call{};
  call.reduction = kind.reduction;
  call.pass = pass;
  call.storage = storage_of(logits);
  call.temperature = kind.temperature;
  call.sign = kind.sign;
  call.columns = rows.columns;
  call.logits = rows.data();
  call.logits_stride = rows.stride;
  return call;
}

template <class Engine>
struct RowOps {
  static Tensor forward(RowKind kind, const Tensor& logits) {
    check_logits(logits, kind.input);
    const Rows rows = as_rows(logits);
    std::vector<int64_t> sizes = sizes_of(logits);
    sizes.pop_back();
    Tensor score = empty_of(logits, sizes, score_dtype(logits));
    RowCall call = call_of(kind, Pass::kForward, logits, rows);
    call.score = score.mutable_data_ptr();
    Engine::run(call, rows.rows, logits);
    return score;
  }

  // What both derivatives read. `saved` is the score, or `grad` once more where no slope needs it.
  static Tensor differentiate(RowKind kind, const Tensor& grad, const Tensor& logits, const Tensor& saved,
                              const Tensor* cotangent, Tensor* grad_grad) {
    check_logits(logits, kind.input);
    check_per_row(grad, "grad", logits, kind.input);
    check_per_row(saved, kind.score, logits, kind.input);
    check_same_device(grad, "grad", logits, kind.input);
    check_same_device(saved, kind.score, logits, kind.input);
    const Rows rows = as_rows(logits);
    const Column upstream = as_column(grad);
    const Column score = as_column(saved);
    Tensor result = empty_of(logits, sizes_of(logits), logits.scalar_type());
    RowCall call = call_of(kind, Pass::kBackward, logits, rows);
    call.saved_score = score.data();
    call.saved_score_stride = score.stride;
    call.grad_score = upstream.data();
    call.grad_score_stride = upstream.stride;
    call.grad_logits = result.mutable_data_ptr();
    Engine::prepare(call.grad_logits, result.numel() * int64_t(result.element_size()));
    if (!cotangent) {
      Engine::run(call, rows.rows, logits);
      return result;
    }
    check_same_shape(*cotangent, "cotangent", logits, kind.input);
    check_same_device(*cotangent, "cotangent", logits, kind.input);
    const Rows directions = as_rows(*cotangent);
    *grad_grad = empty_of(logits, sizes_of(grad), score_dtype(logits));
    call.pass = Pass::kDoubleBackward;
    call.cotangent = directions.data();
    call.cotangent_stride = directions.stride;
    call.grad_grad_score = grad_grad->mutable_data_ptr();
    Engine::run(call, rows.rows, logits);
    return result;
  }

  static Tensor energy(const Tensor& logits, double temperature) { return forward(energy_kind(temperature), logits); }
  static Tensor energy_backward(const Tensor& grad, const Tensor& logits, const Tensor& energy, double temperature) {
    return differentiate(energy_kind(temperature), grad, logits, energy, nullptr, nullptr);
  }
  static std::tuple<Tensor, Tensor> energy_double_backward(const Tensor& cotangent, const Tensor& grad,
                                                           const Tensor& logits, const Tensor& energy,
                                                           double temperature) {
    Tensor grad_grad;
    Tensor result = differentiate(energy_kind(temperature), grad, logits, energy, &cotangent, &grad_grad);
    return {grad_grad, result};
  }

  static Tensor joint_energy(const Tensor& logits) { return forward(joint_energy_kind(), logits); }
  static Tensor joint_energy_backward(const Tensor& grad, const Tensor& logits) {
    return differentiate(joint_energy_kind(), grad, logits, grad, nullptr, nullptr);
  }
  static std::tuple<Tensor, Tensor> joint_energy_double_backward(const Tensor& cotangent, const Tensor& grad,
                                                                 const Tensor& logits) {
    Tensor grad_grad;
    Tensor result = differentiate(joint_energy_kind(), grad, logits, grad, &cotangent, &grad_grad);
    return {grad_grad, result};
  }
};

}  // namespace oodkern

// The room's raw ops in a STABLE_TORCH_LIBRARY_IMPL.
#define OODKERN_ENERGY_OPS(m, Engine)                                                            \
  m.impl("energy", TORCH_BOX(&oodkern::RowOps<Engine>::energy));                                 \
  m.impl("energy_backward", TORCH_BOX(&oodkern::RowOps<Engine>::energy_backward));               \
  m.impl("energy_double_backward", TORCH_BOX(&oodkern::RowOps<Engine>::energy_double_backward)); \
  m.impl("joint_energy", TORCH_BOX(&oodkern::RowOps<Engine>::joint_energy));                     \
  m.impl("joint_energy_backward", TORCH_BOX(&oodkern::RowOps<Engine>::joint_energy_backward));   \
  m.impl("joint_energy_double_backward", TORCH_BOX(&oodkern::RowOps<Engine>::joint_energy_double_backward))
