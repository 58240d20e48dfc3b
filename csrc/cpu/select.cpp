// Room `select` on the CPU: the nearest of K centers to each row.
#include <cmath>

#include "../check.h"
#include "walk.h"

namespace oodkern {
namespace {

// argmin |x - c|^2 = argmax x . c - |c|^2 / 2; where rows count by their direction x / |x| instead, it is argmax
// (x . c) / |x| - |c|^2 / 2.
std::tuple<Tensor, Tensor> nearest_center(const Tensor& features, const Tensor& centers, bool normalize) {
  check_matrix(features, "features");
  check_columns_beside(centers, "centers", features);
  const int64_t K = centers.size(0);
  STD_TORCH_CHECK(K > 0, "centers: expected at least one");
  // Products of 16-bit numbers are exact in float32 either way; a center's norm has to be as exact as they are.
  const Operand x(features, product_storage(storage_of(features), storage_of(centers))), c(centers, x.read());
  const bool wide = x.read() == Storage::kFloat64;
  Workspace workspace(features);
  void* half_norms = workspace.take(K * 8);
  for (int64_t k = 0; k < K; ++k) {
    const double half = -0.5 * tile_engine().square_sum(c.stored(), c.row(k), c.columns());
    put_real(wide, half_norms, k, half);
  }
  Tensor index = empty_of(features, {features.size(0)}, ScalarType::Long);
  Tensor distance = empty_of(features, {features.size(0)}, score_dtype(features));
  Walk walk(x, c);
  if (!normalize) walk.bias = half_norms;
  walk.plan();
  std::vector<Best> states(walk.wave());
  std::vector<double> scales(walk.wave(), 1.0);
  walk.run(workspace, [&](const Part& part) {
    Best* best = states.data() + part.wave_row;
    double* scale = scales.data() + part.wave_row;
    if (part.column == 0) {
      std::fill(best, best + part.z.rows, Best{-INFINITY, -1});
      for (int64_t i = 0; normalize && i < part.z.rows; ++i) scale[i] = inverse_norm(x, part.row + i);
    }
    if (normalize) {
      const auto row_scale = reals(wide, part.z.rows, [&](int64_t i) { return scale[i]; });
      const void* bias = static_cast<const char*>(half_norms) + part.column * (wide ? 8 : 4);
      tile_engine().affine(part.z, row_scale.data(), nullptr, bias);
    }
    tile_engine().best(part.z, part.column, best);
    if (part.column + part.z.columns < K) return;
    for (int64_t i = 0; i < part.z.rows; ++i) {
      const int64_t row = part.row + i;
      const double square = tile_engine().square_distance(x.stored(), x.row(row), scale[i], c.stored(),
                                                          c.row(best[i].index), x.columns());
      static_cast<int64_t*>(index.mutable_data_ptr())[row] = best[i].index;
      put_real(wide, distance.mutable_data_ptr(), row, square);
    }
  });
  return {index, distance};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("nearest_center", TORCH_BOX(&oodkern::nearest_center));
}
