// Rows added to chosen rows of a matrix: what a loss of one logit a row adds to the gradient of the weight.
#include <algorithm>
#include <numeric>

#include "../check.h"
#include "dispatch.h"
#include "tiles.h"

namespace oodkern {
namespace {

// matrix[index_n] += rows_n. Rows that go to one place are added up first, in their order and in their own dtype, so
// that a row of 16 bits is rounded once.
void add_rows_(Tensor matrix, const Tensor& rows, const Tensor& index) {
  check_matrix(matrix, "matrix");
  check_matrix(rows, "rows");
  const int64_t N = rows.size(0), K = matrix.size(0), D = matrix.size(1);
  STD_TORCH_CHECK(rows.size(1) == D && rows.scalar_type() == score_dtype(matrix),
                  "rows: expected as many columns as the matrix, in float32, or float64 where it is");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == N && index.scalar_type() == ScalarType::Long,
                  "index: expected one int64 a row");
  STD_TORCH_CHECK(matrix.is_contiguous(), "matrix: expected a contiguous one");
  const Tensor dense_rows = torch::stable::contiguous(rows), dense_index = torch::stable::contiguous(index);
  const auto* place = static_cast<const int64_t*>(dense_index.const_data_ptr());
  for (int64_t n = 0; n < N; ++n) STD_TORCH_CHECK(place[n] >= 0 && place[n] < K, "index: expected 0..", K - 1);
  std::vector<int64_t> order(N), first;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return place[a] < place[b]; });
  for (int64_t i = 0; i < N; ++i) {
    if (i == 0 || place[order[i]] != place[order[i - 1]]) first.push_back(i);
  }
  first.push_back(N);
  const Storage storage = storage_of(matrix);
  const auto add = [&](auto real) {
    using Real = decltype(real);
    const auto* from = static_cast<const Real*>(dense_rows.const_data_ptr());
    char* const to = static_cast<char*>(matrix.mutable_data_ptr());
    parallel_for(0, int64_t(first.size()) - 1, grain_of(D), [&](int64_t begin, int64_t end) {
      std::vector<Real> sum(D), own(D);
      for (int64_t group = begin; group < end; ++group) {
        std::fill(sum.begin(), sum.end(), Real(0));
        for (int64_t i = first[group]; i < first[group + 1]; ++i) {
          const Real* row = from + order[i] * D;
          for (int64_t d = 0; d < D; ++d) sum[d] += row[d];
        }
        void* out = to + place[order[first[group]]] * D * int64_t(matrix.element_size());
        tile_engine().widen(storage, out, D, own.data());
        for (int64_t d = 0; d < D; ++d) own[d] += sum[d];
        tile_engine().narrow(storage, own.data(), D, out);
      }
    });
  };
  storage == Storage::kFloat64 ? add(double{}) : add(float{});
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("add_rows_", TORCH_BOX(&oodkern::add_rows_));
}
