// Room `subspace` on the CPU, its first half: the mean absolute cosine of features to class weights.
#include "../check.h"
#include "walk.h"

namespace oodkern {
namespace {

// Features and weights, whose products become cosines.
struct Cosines {
  Operand x, w;
  bool wide;
  std::vector<char> column_scale;  // [K] Real

  Cosines(const Tensor& features, const Tensor& weight)
      : x(features, product_storage(storage_of(features))),
        w(weight, x.read()),
        wide(x.read() == Storage::kFloat64),
        column_scale(inverse_norms(w, 0, w.rows(), 1.0)) {}
  void scale(const Part& part) const {
    const auto row_scale = inverse_norms(x, part.row, part.z.rows, 1.0);
    tile_engine().affine(part.z, row_scale.data(), column_scale.data() + part.column * (wide ? 8 : 4), nullptr);
  }
};

const Reduce kAbsolute{Reduction::kAbsSum, 1.0};

// The scores and, where asked for, their gradient in the features for an upstream of ones, in the scores' dtype.
std::tuple<Tensor, Tensor> scored(const Tensor& features, const Tensor& weight, bool with_gradient) {
  check_matrix(features, "features");
  check_same_columns(weight, "weight", features);
  const Cosines cosines(features, weight);
  const int64_t K = weight.size(0);
  const double share = K ? 1.0 / double(K) : 0.0;
  Tensor value = empty_of(features, {features.size(0)}, score_dtype(features));
  Gradient gradient{value, true};
  Workspace workspace(features);
  Walk walk(cosines.x, cosines.w);
  if (with_gradient) {
    gradient.result = empty_of(features, sizes_of(features), score_dtype(features));
    walk.dx = &gradient;
  }
  walk.plan();
  std::vector<RowState> states(walk.wave());
  walk.run(workspace, [&](const Part& part) {
    RowState* state = states.data() + part.wave_row;
    cosines.scale(part);
    if (part.column == 0) tile_engine().begin(kAbsolute, part.z.rows, state);
    tile_engine().reduce(part.z, kAbsolute, state);
    if (part.column + part.z.columns == K) {
      void* out = static_cast<char*>(value.mutable_data_ptr()) + part.row * int64_t(value.element_size());
      tile_engine().finish(cosines.wide, kAbsolute, part.z.rows, state, share, out);
    }
    if (!with_gradient) return;
    const auto scale = reals(cosines.wide, part.z.rows, [&](int64_t) { return share; });
    tile_engine().slope(part.z, kAbsolute, scale.data(), scale.data());
    cosines.scale(part);
  });
  return {value, gradient.result};
}

Tensor alignment(const Tensor& features, const Tensor& weight) {
  return std::get<0>(scored(features, weight, false));
}

std::tuple<Tensor, Tensor> alignment_foreseen(const Tensor& features, const Tensor& weight) {
  return scored(features, weight, true);
}

std::tuple<Tensor, Tensor> alignment_backward(const Tensor& grad, const Tensor& features, const Tensor& weight,
                                              bool for_features, bool for_weight) {
  check_matrix(features, "features");
  check_same_columns(weight, "weight", features);
  check_per_row(grad, "grad", features);
  const Cosines cosines(features, weight);
  const int64_t K = weight.size(0);
  // Of a cosine the part along the feature, and along the weight, has no slope.
  Gradient of_features{gradient_of(features, for_features), true};
  Gradient of_weight{gradient_of(weight, for_weight), true};
  const Column upstream = as_column(grad);
  Workspace workspace(features);
  Walk walk(cosines.x, cosines.w);
  if (for_features) walk.dx = &of_features;
  if (for_weight) walk.dw = &of_weight;
  walk.plan();
  walk.run(workspace, [&](const Part& part) {
    const auto scale = reals_of(cosines.wide, upstream, part.row, part.z.rows, 1.0 / double(K ? K : 1));
    tile_engine().slope(part.z, kAbsolute, scale.data(), scale.data());  // the sign of the product is the cosine's
    cosines.scale(part);
  });
  return {of_features.result, of_weight.result};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("alignment", TORCH_BOX(&oodkern::alignment));
  m.impl("alignment_foreseen", TORCH_BOX(&oodkern::alignment_foreseen));
  m.impl("alignment_backward", TORCH_BOX(&oodkern::alignment_backward));
}
