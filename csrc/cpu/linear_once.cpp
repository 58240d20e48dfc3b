// Room `linear_energy` on the CPU, what one pass over the logits gives: five scores, or a score and its gradients.
#include <algorithm>
#include <cmath>
#include <limits>

#include "linear_head.h"

namespace oodkern {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_scores(const Tensor& features, const Tensor& weight,
                                                                 const std::optional<Tensor>& bias) {
  check_mixed_head(features, weight, bias);
  STD_TORCH_CHECK(weight.size(0) > 0, "weight: expected at least one class");
  LinearHead head(features, weight, bias);
  const int64_t K = weight.size(0);
  const auto score = [&] { return empty_of(features, {features.size(0)}, score_dtype(features)); };
  Tensor energy = score(), joint = score(), largest = score(), msp = score();
  Tensor argmax = empty_of(features, {features.size(0)}, ScalarType::Long);
  Walk walk(head.x, head.w);
  walk.bias = head.bias;
  walk.plan();
  std::vector<RowState> lse_states(walk.wave()), joint_states(walk.wave());
  std::vector<Best> best_states(walk.wave());
  const Reduce lse{Reduction::kLogSumExp, 1.0}, softplus{Reduction::kSoftplusSum, 1.0};
  walk.run(head.workspace, [&](const Part& part) {
    const TileEngine& engine = tile_engine();
    const int64_t rows = part.z.rows;
    RowState *of_lse = lse_states.data() + part.wave_row, *of_joint = joint_states.data() + part.wave_row;
    Best* best = best_states.data() + part.wave_row;
    if (part.column == 0) {
      engine.begin(lse, rows, of_lse);
      engine.begin(softplus, rows, of_joint);
      std::fill(best, best + rows, Best{-INFINITY, -1});
    }
    engine.scores(part.z, part.column, of_lse, of_joint, best);  // rows of a walk's tile are padded
    if (part.column + part.z.columns < K) return;
    engine.finish(head.wide, lse, rows, of_lse, -1.0, real_at(energy, part.row));
    engine.finish(head.wide, softplus, rows, of_joint, 1.0, real_at(joint, part.row));
    for (int64_t i = 0; i < rows; ++i) {
      static_cast<int64_t*>(argmax.mutable_data_ptr())[part.row + i] = best[i].index;
      const double maximum = best[i].maximum;
      put_real(head.wide, largest.mutable_data_ptr(), part.row + i, maximum);
      // exp(maximum + low), without the rounding of an energy as large as the logits
      put_real(head.wide, msp.mutable_data_ptr(), part.row + i, std::isfinite(maximum) ? 1 / of_lse[i].sum : NAN);
    }
  });
  return {energy, joint, largest, argmax, msp};
}

// A wave of long bfloat16 rows leaves its slopes in the memory of the weight's gradient: those of a slice of S classes
// [N, S] are read before its rows [S, D] are written, and fit where N <= D.
bool fits_in_gradient(const Walk& walk) {
  return walk.x.read() == Storage::kBFloat16 && walk.one_wave() && walk.x.rows() <= walk.x.columns();
}
void through_gradient(const Kind& kind, LinearHead& head, Walk& walk, const Tensor& gradient, const Tensor& value,
                      const Tensor& upstream, const std::function<void()>& foresee) {
  const TileEngine& engine = tile_engine();
  const int64_t N = head.x.rows(), D = head.x.columns(), K = head.w.rows();
  const auto rows_of = [&](const Part& part, auto&& body) {
    for (int64_t i = 0; i < part.z.rows; ++i) {
      body(static_cast<float*>(part.z.z) + i * part.z.stride,
           real_at(gradient, part.column * D + (part.row + i) * part.z.columns));
    }
  };
  // What each row has come to after each slice, of which its slopes are first taken.
  std::vector<float> totals((K / walk.slice() + 1) * N);
  const auto totals_of = [&](const Part& part) { return totals.data() + part.column / walk.slice() * N + part.row; };
  const std::vector<float> ones(walk.wave(), 1.0f);
  std::vector<RowState> states(walk.wave());
  Walk first = walk;
  first.dx = first.dw = nullptr, first.column_sum = nullptr;
  Workspace workspace(value);
  first.run(workspace, [&](const Part& part) {
    RowState* state = states.data() + part.wave_row;
    float* total = totals_of(part);
    if (part.column == 0) engine.begin(kind.reduce, part.z.rows, state);
    engine.reduce(part.z, kind.reduce, state);
    engine.finish(false, kind.reduce, part.z.rows, state, kind.sign, real_at(value, part.row));
    engine.finish(false, kind.reduce, part.z.rows, state, 1.0, total);
    // Of logits that are all -inf as yet there is nothing, and no difference to be taken.
    for (int64_t i = 0; i < part.z.rows; ++i) total[i] = std::max(total[i], std::numeric_limits<float>::lowest());
    engine.slope(part.z, kind.reduce, total, ones.data());
    rows_of(part, [&](float* z, void* slopes) { engine.narrow(Storage::kBFloat16, z, part.z.columns, slopes); });
  });
  foresee();
  const Column wholes = as_column(value), grads = as_column(upstream);
  walk.given = true;
  walk.run(head.workspace, [&](const Part& part) {
    rows_of(part, [&](float* z, void* slopes) { engine.widen(Storage::kBFloat16, slopes, part.z.columns, z); });
    // What a row came to later lowers all slopes of the energy by one factor.
    const auto scale = reals(false, part.z.rows, [&](int64_t i) {
      const double g = kind.sign * real_of(false, grads.data(), part.row + i);
      if (kind.reduce.reduction != Reduction::kLogSumExp) return g;
      const double whole = kind.sign * real_of(false, wholes.data(), part.row + i);
      return g * std::exp((totals_of(part)[i] - whole) / kind.reduce.temperature);
    });
    engine.affine(part.z, scale.data(), nullptr, nullptr);
  });
}

// The gradients of sum_i linear_i S_i + |hinge_i| relu(+-(S_i - margin_i))^2, with the sign of hinge_i, beside the
// scores S: the upstream of a row is known as soon as its score is, so that its logits are formed once. Where rows of
// them are too long to be held, the scores alone. Without `linear` it is that of sum_i S_i in the features, in the
// scores' dtype, since it is yet to be multiplied by an upstream.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_score_foreseen(
    std::string score, const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
    double temperature, const std::optional<Tensor>& linear, const std::optional<Tensor>& hinge,
    const std::optional<Tensor>& margin, bool for_features, bool for_weight, bool for_bias) {
  check_head(features, weight, bias);
  STD_TORCH_CHECK(linear || !(hinge || for_weight || for_bias), "linear: expected one, but for the features alone");
  if (linear) check_per_row(*linear, "linear", features);
  STD_TORCH_CHECK(hinge.has_value() == margin.has_value(), "margin: expected with hinge, and only then");
  if (hinge) check_per_row(*hinge, "hinge", features);
  if (margin) check_per_row(*margin, "margin", features);
  const Kind kind = kind_of(score, temperature);
  LinearHead head(features, weight, bias);
  Wanted wanted(features, weight, for_features && linear, for_weight, for_bias && bias);
  if (!linear && for_features) wanted.features.result = empty_of(features, sizes_of(features), score_dtype(features));
  Tensor value = empty_of(features, {features.size(0)}, score_dtype(features));
  Tensor upstream = empty_of(features, {features.size(0)}, score_dtype(features));
  const Column slopes = as_column(linear ? *linear : value), hinges = as_column(hinge ? *hinge : value),
               margins = as_column(margin ? *margin : value), values = as_column(value);
  const auto number = [&](const Column& column, int64_t i) {
    return real_of(head.wide, column.data(), i * column.stride);
  };
  const auto foresee = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double g = linear ? number(slopes, i) : 1.0;
      if (hinge) {
        const double h = number(hinges, i), off = number(values, i) - number(margins, i);
        if (h != 0 && !(h * off <= 0)) g += 2 * std::fabs(h) * off;
      }
      put_real(head.wide, upstream.mutable_data_ptr(), i, g);
    }
  };
  Walk walk(head.x, head.w);
  walk.bias = head.bias;
  walk.prefers_whole_rows = true;
  wanted.into(walk, for_features, for_weight);
  walk.plan();
  if (!walk.whole_rows() && !(for_weight && fits_in_gradient(walk))) {
    const Tensor nothing = empty_of(features, {0}, score_dtype(features));
    return {linear_score(score, features, weight, bias, temperature), nothing, nothing, nothing, nothing};
  }
  std::vector<RowState> states(walk.wave());
  const TileEngine& engine = tile_engine();
  if (!walk.whole_rows()) {
    through_gradient(kind, head, walk, wanted.weight.result, value, upstream, [&] { foresee(0, features.size(0)); });
    wanted.finish_bias(head.wide);
    return {value, upstream, wanted.features.result, wanted.weight.result, wanted.bias};
  }
  walk.run(head.workspace, [&](const Part& part) {
    RowState* state = states.data() + part.wave_row;
    engine.begin(kind.reduce, part.z.rows, state);
    engine.reduce(part.z, kind.reduce, state);
    engine.finish(head.wide, kind.reduce, part.z.rows, state, kind.sign, real_at(value, part.row));
    foresee(part.row, part.row + part.z.rows);
    const auto reduced = reals_of(head.wide, values, part.row, part.z.rows, kind.sign);
    const auto scale = reals_of(head.wide, as_column(upstream), part.row, part.z.rows, kind.sign);
    engine.slope(part.z, kind.reduce, reduced.data(), scale.data());
  });
  wanted.finish_bias(head.wide);
  return {value, upstream, wanted.features.result, wanted.weight.result, wanted.bias};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("linear_scores", TORCH_BOX(&oodkern::linear_scores));
  m.impl("linear_score_foreseen", TORCH_BOX(&oodkern::linear_score_foreseen));
}
