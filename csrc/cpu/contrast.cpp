// Room `contrast` on the CPU: InfoNCE whose scores are never stored, rows' and columns' logsumexp from one product, and
// all gradients from one more.
#include <unordered_map>

#include "../check.h"
#include "walk.h"

namespace oodkern {
namespace {

// Labels or places, [N] int64, dense.
struct Indices {
  Tensor held;
  const int64_t* data = nullptr;
  bool given = false;  // an empty tensor has no data either

  Indices(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == count && tensor->scalar_type() == ScalarType::Long, name,
                    ": expected one int64 a row");
    given = true;
    held = torch::stable::contiguous(*tensor);
    data = static_cast<const int64_t*>(held.const_data_ptr());
  }
};

// How often each of `labels` occurs in `among`.
std::vector<double> counts(const Indices& labels, int64_t count, const Indices& among, int64_t among_count) {
  std::unordered_map<int64_t, int64_t> occurrences;
  for (int64_t i = 0; i < among_count; ++i) ++occurrences[among.data[i]];
  std::vector<double> out(count);
  for (int64_t i = 0; i < count; ++i) {
    const auto found = occurrences.find(labels.data[i]);
    out[i] = found == occurrences.end() ? 0.0 : double(found->second);
  }
  return out;
}

// The arguments that value and gradients share, checked and prepared.
struct Pair {
  Operand q, k;
  int64_t N, M;
  bool wide, normalize, symmetric;
  Indices target, query_label, key_label;
  double temperature;
  std::vector<double> q_count, k_count;  // positives, of labels
  std::vector<char> column_scale;        // [M] Real

  Pair(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& t, const std::optional<Tensor>& ql,
       const std::optional<Tensor>& kl, const Tensor& temp, bool norm, bool both)
      : q(queries, product_storage(storage_of(queries))),
        k(keys, q.read()),
        N(q.rows()),
        M(k.rows()),
        wide(q.read() == Storage::kFloat64),
        normalize(norm),
        symmetric(both),
        target(t, "target", N),
        query_label(ql, "query_labels", N),
        key_label(kl, "key_labels", M) {
    STD_TORCH_CHECK(target.given || (query_label.given && key_label.given),
                    "target: expected one key a query, or labels of both");
    STD_TORCH_CHECK(!symmetric || N == M, "keys: expected as many as queries, since symmetric");
    STD_TORCH_CHECK(temp.numel() == 1 && temp.scalar_type() == score_dtype(queries),
                    "temperature: expected one number in the dtype of scores");
    for (int64_t i = 0; target.given && i < N; ++i) {
      STD_TORCH_CHECK(target.data[i] >= 0 && target.data[i] < M, "target: expected keys in 0..", M - 1, ", got ",
                      target.data[i]);
    }
    temperature = real_of(wide, temp.const_data_ptr(), 0);
    if (normalize) column_scale = inverse_norms(k, 0, M, 1.0);
    if (!target.given) {
      q_count = counts(query_label, N, key_label, M);
      k_count = counts(key_label, M, query_label, N);
    }
  }
  const void* real_at(const std::vector<char>& numbers, int64_t i) const {
    return numbers.empty() ? nullptr : numbers.data() + i * (wide ? 8 : 4);
  }
  void scale(const Part& part) const {
    const double factor = 1 / temperature;
    const auto row_scale = normalize ? inverse_norms(q, part.row, part.z.rows, factor)
                                     : reals(wide, part.z.rows, [&](int64_t) { return factor; });
    tile_engine().affine(part.z, row_scale.data(), real_at(column_scale, part.column), nullptr);
  }
  // The positives of a part, with the places relative to it.
  Positives positives(const Part& part, std::vector<int64_t>& places) const {
    if (!target.given) return {nullptr, query_label.data + part.row, key_label.data + part.column};
    places.assign(target.data + part.row, target.data + part.row + part.z.rows);
    for (int64_t& place : places) place -= part.column;
    return {places.data(), nullptr, nullptr};
  }
};

const Reduce kLse{Reduction::kLogSumExp, 1.0};

// One direction's loss: of its logsumexp, the sum of its positives' scores, and how many they are.
double direction(double lse, double sum, double count) {
  return count == 0 ? 0.0 : lse - sum / count;
}

// What the rows of a walk come to.
struct Rows {
  const Pair& pair;
  Tensor lse;                    // [N]
  std::vector<double> positive;  // [N]
  std::vector<RowState> states;  // of a wave

  Rows(const Pair& pair, const Tensor& queries, const Walk& walk)
      : pair(pair), lse(empty_of(queries, {pair.N}, score_dtype(queries))), positive(pair.N), states(walk.wave()) {}
  void visit(const Part& part) {
    pair.scale(part);
    RowState* state = states.data() + part.wave_row;
    if (part.column == 0) tile_engine().begin(kLse, part.z.rows, state);
    tile_engine().reduce(part.z, kLse, state);
    std::vector<int64_t> places;
    tile_engine().positives(part.z, pair.positives(part, places), false, positive.data() + part.row);
    if (part.column + part.z.columns < pair.M) return;
    void* out = static_cast<char*>(lse.mutable_data_ptr()) + part.row * int64_t(lse.element_size());
    tile_engine().finish(pair.wide, kLse, part.z.rows, state, 1.0, out);
  }
  double loss(int64_t i) const {
    return direction(real_of(pair.wide, lse.const_data_ptr(), i), positive[i],
                     pair.target.given ? 1.0 : pair.q_count[i]);
  }
};

std::tuple<Tensor, Tensor, Tensor> info_nce(const Tensor& queries, const Tensor& keys,
                                            const std::optional<Tensor>& target,
                                            const std::optional<Tensor>& query_labels,
                                            const std::optional<Tensor>& key_labels, const Tensor& temperature,
                                            bool normalize, bool symmetric) {
  check_matrix(queries, "queries");
  check_same_columns(keys, "keys", queries);
  const Pair pair(queries, keys, target, query_labels, key_labels, temperature, normalize, symmetric);
  const ScalarType dtype = score_dtype(queries);
  Tensor loss = empty_of(queries, {pair.N}, dtype), column_lse = empty_of(queries, {symmetric ? pair.M : 0}, dtype);
  Workspace workspace(queries);
  Walk walk(pair.q, pair.k);
  walk.plan();
  Rows rows(pair, queries, walk);
  std::vector<RowState> columns(symmetric ? pair.M : 0);
  std::vector<double> column_positive(symmetric && !pair.target.given ? pair.M : 0, 0.0);
  tile_engine().begin(kLse, int64_t(columns.size()), columns.data());
  const auto on_columns = [&](const Part& part) {
    tile_engine().reduce_columns(part.z, columns.data() + part.column);
    if (column_positive.empty()) return;
    std::vector<int64_t> places;
    tile_engine().positives(part.z, pair.positives(part, places), true, column_positive.data() + part.column);
  };
  walk.run(workspace, [&](const Part& part) { rows.visit(part); }, symmetric ? Walk::Visit(on_columns) : nullptr);
  tile_engine().finish(pair.wide, kLse, int64_t(columns.size()), columns.data(), 1.0, column_lse.mutable_data_ptr());

  const auto of_column = [&](int64_t j) { return real_of(pair.wide, column_lse.const_data_ptr(), j); };
  for (int64_t i = 0; i < pair.N; ++i) {
    double value = rows.loss(i);
    if (symmetric) {
      const double other = pair.target.given ? of_column(pair.target.data[i]) - rows.positive[i]
                                             : direction(of_column(i), column_positive[i], pair.k_count[i]);
      value = (value + other) / 2;
    }
    put_real(pair.wide, loss.mutable_data_ptr(), i, value);
  }
  return {loss, rows.lse, column_lse};
}

// Of the queries' direction the losses, and the gradients of their sum, in the dtype of scores, since they are yet to
// be multiplied by an upstream: the logsumexp of a row is known while its scores are there. Where rows of scores are
// too long to be held, the losses alone.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_foreseen(const Tensor& queries, const Tensor& keys,
                                                                     const std::optional<Tensor>& target,
                                                                     const std::optional<Tensor>& query_labels,
                                                                     const std::optional<Tensor>& key_labels,
                                                                     const Tensor& temperature, bool normalize,
                                                                     bool for_queries, bool for_keys) {
  check_matrix(queries, "queries");
  check_same_columns(keys, "keys", queries);
  const Pair pair(queries, keys, target, query_labels, key_labels, temperature, normalize, false);
  const ScalarType dtype = score_dtype(queries);
  Gradient of_queries{empty_of(queries, {0}, dtype), normalize}, of_keys{empty_of(keys, {0}, dtype), normalize};
  Workspace workspace(queries);
  Walk walk(pair.q, pair.k);
  walk.prefers_whole_rows = true;
  walk.rows_a_thread = 256;  // of 4,096 keys half of what is held, for 3 % of the time
  if (for_queries) walk.dx = &of_queries;
  if (for_keys) walk.dw = &of_keys;
  walk.plan();
  if (!walk.whole_rows()) {
    const auto [loss, lse, columns] =
        info_nce(queries, keys, target, query_labels, key_labels, temperature, normalize, false);
    return {loss, lse, of_queries.result, of_keys.result, empty_of(queries, {0}, dtype)};
  }
  if (for_queries) of_queries.result = empty_of(queries, sizes_of(queries), dtype);
  if (for_keys) of_keys.result = empty_of(keys, sizes_of(keys), dtype);
  Rows rows(pair, queries, walk);
  std::vector<double> products(pair.N, 0.0);  // sum_j G_ij s_ij
  walk.run(workspace, [&](const Part& part) {
    rows.visit(part);
    const int64_t count = part.z.rows;
    const auto of_label = [&](int64_t i, double number) {
      return pair.target.given || pair.q_count[part.row + i] ? number : 0.0;
    };
    const auto scale = reals(pair.wide, count, [&](int64_t i) { return of_label(i, 1.0); });
    const auto taken = reals(pair.wide, count, [&](int64_t i) {
      return pair.target.given ? 1.0 : of_label(i, 1.0 / pair.q_count[part.row + i]);
    });
    const auto lse = reals_of(pair.wide, as_column(rows.lse), part.row, count, 1.0);
    std::vector<int64_t> places;
    const Contrast contrast{
        pair.positives(part, places), scale.data(), lse.data(), taken.data(), nullptr, nullptr, nullptr};
    tile_engine().contrast(part.z, contrast, products.data() + part.row);
    pair.scale(part);  // dz to d(q . k)
  });
  Tensor loss = empty_of(queries, {pair.N}, dtype), of_temperature = empty_of(queries, {}, dtype);
  double total = 0;
  for (int64_t i = 0; i < pair.N; ++i) {
    put_real(pair.wide, loss.mutable_data_ptr(), i, rows.loss(i));
    total += products[i];
  }
  put_real(pair.wide, of_temperature.mutable_data_ptr(), 0, -total / pair.temperature);
  return {loss, rows.lse, of_queries.result, of_keys.result, of_temperature};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                                                     const std::optional<Tensor>& target,
                                                     const std::optional<Tensor>& query_labels,
                                                     const std::optional<Tensor>& key_labels, const Tensor& temperature,
                                                     const Tensor& query_lse, const Tensor& key_lse, bool normalize,
                                                     bool symmetric, bool for_queries, bool for_keys) {
  check_matrix(queries, "queries");
  check_same_columns(keys, "keys", queries);
  check_per_row(grad, "grad", queries);
  check_per_row(query_lse, "query_lse", queries);
  if (symmetric) check_per_row(key_lse, "key_lse", keys);
  const Pair pair(queries, keys, target, query_labels, key_labels, temperature, normalize, symmetric);
  const bool labels = !pair.target.given;
  const Column upstream = as_column(grad), row_lse = as_column(query_lse), column_lse = as_column(key_lse);
  const auto grad_of = [&](int64_t i) { return real_of(pair.wide, upstream.data(), i * upstream.stride); };
  const double share = symmetric ? 0.5 : 1.0;
  // a_i and b_j: the upstream of each row's and column's logsumexp.
  const auto a = [&](int64_t i) { return labels && pair.q_count[i] == 0 ? 0.0 : share * grad_of(i); };
  std::vector<double> b(symmetric ? pair.M : 0, 0.0);
  for (int64_t i = 0; symmetric && i < pair.N; ++i) {
    if (!labels) b[pair.target.data[i]] += share * grad_of(i);
    if (labels && pair.k_count[i] != 0) b[i] = share * grad_of(i);
  }
  const auto row_scale = reals(pair.wide, pair.N, a);
  const auto row_taken = reals(pair.wide, pair.N, [&](int64_t i) {
    return labels ? (pair.q_count[i] == 0 ? 0.0 : a(i) / pair.q_count[i]) : grad_of(i);  // both directions' at once
  });
  const auto row_values = reals_of(pair.wide, row_lse, 0, pair.N, 1.0);
  const auto column_scale = reals(pair.wide, int64_t(b.size()), [&](int64_t j) { return b[j]; });
  const auto column_values = symmetric ? reals_of(pair.wide, column_lse, 0, pair.M, 1.0) : std::vector<char>();
  const auto column_taken = reals(pair.wide, labels ? int64_t(b.size()) : 0,
                                  [&](int64_t j) { return pair.k_count[j] == 0 ? 0.0 : b[j] / pair.k_count[j]; });

  Gradient of_queries{gradient_of(queries, for_queries), normalize};
  Gradient of_keys{gradient_of(keys, for_keys), normalize};
  Workspace workspace(queries);
  Walk walk(pair.q, pair.k);
  if (for_queries) walk.dx = &of_queries;
  if (for_keys) walk.dw = &of_keys;
  walk.plan();
  std::vector<double> products(pair.N, 0.0);  // sum_j G_ij s_ij
  walk.run(workspace, [&](const Part& part) {
    pair.scale(part);
    std::vector<int64_t> places;
    std::vector<double> again(part.again ? part.z.rows : 0);
    const Contrast contrast{pair.positives(part, places),
                            pair.real_at(row_scale, part.row),
                            pair.real_at(row_values, part.row),
                            pair.real_at(row_taken, part.row),
                            pair.real_at(column_scale, part.column),
                            pair.real_at(column_values, part.column),
                            pair.real_at(column_taken, part.column)};
    tile_engine().contrast(part.z, contrast, part.again ? again.data() : products.data() + part.row);
    pair.scale(part);  // dz to d(q . k)
  });
  double total = 0;
  for (const double product : products) total += product;
  Tensor of_temperature = empty_of(queries, {}, score_dtype(queries));
  put_real(pair.wide, of_temperature.mutable_data_ptr(), 0, -total / pair.temperature);
  return {of_queries.result, of_keys.result, of_temperature};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&oodkern::info_nce));
  m.impl("info_nce_foreseen", TORCH_BOX(&oodkern::info_nce_foreseen));
  m.impl("info_nce_backward", TORCH_BOX(&oodkern::info_nce_backward));
}
