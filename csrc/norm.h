// Room `norm` on any device: its raw ops are those of a row's score (energy.h).
//
// With u = x / |x|, an upstream gradient g and a cotangent t of the gradient g u:
//   d/dg   = t . u
//   d/dx_k = g (t_k - (t . u) u_k) / |x|
// and 0 where |x| is 0.
#pragma once

#include "energy.h"

namespace oodkern {

template <class Engine>
struct NormOps {
  static constexpr RowKind kKind{Reduction::kNorm, 1.0, 1.0, "x", "norm"};

  static Tensor sample_norm(const Tensor& x) { return RowOps<Engine>::forward(kKind, x); }
  static Tensor sample_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& norm) {
    return RowOps<Engine>::differentiate(kKind, grad, x, norm, nullptr, nullptr);
  }
  static std::tuple<Tensor, Tensor> sample_norm_double_backward(const Tensor& cotangent, const Tensor& grad,
                                                                const Tensor& x, const Tensor& norm) {
    Tensor grad_grad;
    Tensor result = RowOps<Engine>::differentiate(kKind, grad, x, norm, &cotangent, &grad_grad);
    return {grad_grad, result};
  }
};

}  // namespace oodkern

#define OODKERN_NORM_OPS(m, Engine)                                                           \
  m.impl("sample_norm", TORCH_BOX(&oodkern::NormOps<Engine>::sample_norm));                   \
  m.impl("sample_norm_backward", TORCH_BOX(&oodkern::NormOps<Engine>::sample_norm_backward)); \
  m.impl("sample_norm_double_backward", TORCH_BOX(&oodkern::NormOps<Engine>::sample_norm_double_backward))
