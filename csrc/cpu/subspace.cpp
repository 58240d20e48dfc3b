// Room `subspace` on the CPU, its second half: the energies inside and outside of a subspace, and their derivatives.
#include "subspace.h"

#include "../check.h"

namespace oodkern {
namespace {

void check(const Tensor& features, const Tensor& basis) {
  check_matrix(features, "features");
  check_matrix(basis, "basis");
  STD_TORCH_CHECK(basis.size(0) == features.size(1), "basis: expected [D, r] for features [N, D]");
  STD_TORCH_CHECK(basis.scalar_type() == score_dtype(features) || basis.scalar_type() == features.scalar_type(),
                  "basis: expected the dtype of features or of scores");
}

template <class Body>
void with_real(const Tensor& features, Body&& body) {
  score_dtype(features) == ScalarType::Double ? body(double{}) : body(float{});
}

Tensor per_row(const Tensor& features) {
  return empty_of(features, {features.size(0)}, score_dtype(features));
}

std::tuple<Tensor, Tensor> subspace_energy(const Tensor& features, const Tensor& basis) {
  check(features, basis);
  Tensor inside = per_row(features), outside = per_row(features);
  with_real(features, [&](auto real) {
    using Real = decltype(real);
    Subspace<Real>(features, basis)
        .forward(static_cast<Real*>(inside.mutable_data_ptr()), static_cast<Real*>(outside.mutable_data_ptr()));
  });
  return {inside, outside};
}

std::tuple<Tensor, Tensor> subspace_energy_backward(const Tensor& grad_inside, const Tensor& grad_outside,
                                                    const Tensor& features, const Tensor& basis, bool for_features,
                                                    bool for_basis) {
  check(features, basis);
  check_per_row(grad_inside, "grad_inside", features);
  check_per_row(grad_outside, "grad_outside", features);
  Tensor dx = gradient_of(features, for_features), du = gradient_of(basis, for_basis);
  with_real(features, [&](auto real) {
    Subspace<decltype(real)>(features, basis)
        .backward(as_column(grad_inside), as_column(grad_outside), for_features ? &dx : nullptr,
                  for_basis ? &du : nullptr);
  });
  return {dx, du};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> subspace_energy_double_backward(
    const std::optional<Tensor>& features_cotangent, const std::optional<Tensor>& basis_cotangent,
    const Tensor& grad_inside, const Tensor& grad_outside, const Tensor& features, const Tensor& basis,
    bool for_features, bool for_basis) {
  check(features, basis);
  check_per_row(grad_inside, "grad_inside", features);
  check_per_row(grad_outside, "grad_outside", features);
  STD_TORCH_CHECK(features_cotangent || basis_cotangent, "features_cotangent: expected one cotangent at least");
  if (features_cotangent) check_same_shape(*features_cotangent, "features_cotangent", features, "features");
  if (basis_cotangent) check_same_shape(*basis_cotangent, "basis_cotangent", basis, "basis");
  Tensor d_in = per_row(features), d_out = per_row(features);
  Tensor dx = gradient_of(features, for_features), du = gradient_of(basis, for_basis);
  with_real(features, [&](auto real) {
    using Real = decltype(real);
    Subspace<Real>(features, basis)
        .double_backward(features_cotangent ? &*features_cotangent : nullptr,
                         basis_cotangent ? &*basis_cotangent : nullptr, as_column(grad_inside), as_column(grad_outside),
                         static_cast<Real*>(d_in.mutable_data_ptr()), static_cast<Real*>(d_out.mutable_data_ptr()),
                         for_features ? &dx : nullptr, for_basis ? &du : nullptr);
  });
  return {d_in, d_out, dx, du};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("subspace_energy", TORCH_BOX(&oodkern::subspace_energy));
  m.impl("subspace_energy_backward", TORCH_BOX(&oodkern::subspace_energy_backward));
  m.impl("subspace_energy_double_backward", TORCH_BOX(&oodkern::subspace_energy_double_backward));
}
