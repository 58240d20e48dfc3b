// Room `linear_energy` on the CPU: E and J of logits that are never stored, their two derivatives, and five scores of
// one pass.
#include <cmath>
#include <string>

#include "../check.h"
#include "walk.h"

namespace oodkern {
namespace {

struct Head {
  Operand x, w;
  bool wide;
  Workspace workspace;
  void* bias = nullptr;  // [K] Real, or null

  Head(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& b)
      : x(features, product_storage(storage_of(features))),
        w(weight, x.read()),
        wide(x.read() == Storage::kFloat64),
        workspace(features) {
    if (b) bias = row_of(*b);
  }
  // One row of numbers as Real, dense.
  void* row_of(const Tensor& tensor) {
    const Column column = as_column(tensor);
    void* out = workspace.take(w.rows() * (wide ? 8 : 4) + 8);
    const Storage stored = storage_of(tensor);
    const char* from = static_cast<const char*>(column.data());
    for (int64_t k = 0; k < w.rows(); ++k) {
      tile_engine().widen(stored, from + k * column.stride * bytes_of(stored), 1,
                          static_cast<char*>(out) + k * (wide ? 8 : 4));
    }
    return out;
  }
};

struct Kind {
  Reduce reduce;
  double sign;
};
Kind kind_of(const std::string& score, double temperature) {
  STD_TORCH_CHECK(score == "energy" || score == "joint_energy", "score: expected energy or joint_energy, got ", score);
  if (score == "energy") return {{Reduction::kLogSumExp, temperature}, -1.0};
  return {{Reduction::kSoftplusSum, 1.0}, 1.0};
}

void check_head(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_matrix(features, "features");
  check_same_columns(weight, "weight", features);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == features.scalar_type(),
        "bias: expected [K] in the dtype of features");
  }
}

void* real_at(const Tensor& tensor, int64_t i) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + i * int64_t(tensor.element_size());
}

Tensor linear_score(std::string score, const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                    double temperature) {
  check_head(features, weight, bias);
  const Kind kind = kind_of(score, temperature);
  Head head(features, weight, bias);
  const int64_t K = weight.size(0);
  Tensor value = empty_of(features, {features.size(0)}, score_dtype(features));
  Walk walk(head.x, head.w);
  walk.bias = head.bias;
  walk.plan();
  std::vector<RowState> states(walk.wave());
  walk.run(head.workspace, [&](const Part& part) {
    RowState* state = states.data() + part.wave_row;
    if (part.column == 0) tile_engine().begin(kind.reduce, part.z.rows, state);
    tile_engine().reduce(part.z, kind.reduce, state);
    if (part.column + part.z.columns == K) {
      tile_engine().finish(head.wide, kind.reduce, part.z.rows, state, kind.sign, real_at(value, part.row));
    }
  });
  return value;
}

struct Wanted {
  Gradient features, weight;
  Tensor bias;
  std::vector<double> bias_sums;

  Wanted(const Tensor& x, const Tensor& w, bool for_features, bool for_weight, bool for_bias) {
    features.result = gradient_of(x, for_features);
    weight.result = gradient_of(w, for_weight);
    bias = empty_of(w, {for_bias ? w.size(0) : 0}, w.scalar_type());
    if (for_bias) bias_sums.resize(w.size(0));
  }
  void into(Walk& walk, bool for_features, bool for_weight) {
    if (for_features) walk.dx = &features;
    if (for_weight) walk.dw = &weight;
    if (!bias_sums.empty()) walk.column_sum = bias_sums.data();
  }
  void finish_bias(bool wide) {
    for (size_t k = 0; k < bias_sums.size(); ++k) {
      const float single = float(bias_sums[k]);
      const void* sum = wide ? static_cast<const void*>(&bias_sums[k]) : &single;
      tile_engine().narrow(storage_of(bias), sum, 1, real_at(bias, int64_t(k)));
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_score_backward(std::string score, const Tensor& grad, const Tensor& features,
                                                         const Tensor& weight, const std::optional<Tensor>& bias,
                                                         const Tensor& value, double temperature, bool for_features,
                                                         bool for_weight, bool for_bias) {
  check_head(features, weight, bias);
  check_per_row(grad, "grad", features);
  check_per_row(value, "value", features);
  const Kind kind = kind_of(score, temperature);
  Head head(features, weight, bias);
  Wanted wanted(features, weight, for_features, for_weight, for_bias && bias);
  Walk walk(head.x, head.w);
  walk.bias = head.bias;
  wanted.into(walk, for_features, for_weight);
  const Column upstream = as_column(grad), saved = as_column(value);
  walk.plan();
  walk.run(head.workspace, [&](const Part& part) {
    const auto reduced = reals_of(head.wide, saved, part.row, part.z.rows, kind.sign);
    const auto scale = reals_of(head.wide, upstream, part.row, part.z.rows, kind.sign);
    tile_engine().slope(part.z, kind.reduce, reduced.data(), scale.data());
  });
  wanted.finish_bias(head.wide);
  return {wanted.features.result, wanted.weight.result, wanted.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_score_double_backward(
    std::string score, const std::optional<Tensor>& features_cotangent, const std::optional<Tensor>& weight_cotangent,
    const std::optional<Tensor>& bias_cotangent, const Tensor& grad, const Tensor& features, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& value, double temperature, bool for_features, bool for_weight,
    bool for_bias) {
  check_head(features, weight, bias);
  check_per_row(grad, "grad", features);
  check_per_row(value, "value", features);
  if (features_cotangent) check_same_shape(*features_cotangent, "features_cotangent", features, "features");
  if (weight_cotangent) check_same_shape(*weight_cotangent, "weight_cotangent", weight, "weight");
  if (bias_cotangent) {
    STD_TORCH_CHECK(bias.has_value(), "bias_cotangent: expected none without a bias");
    check_same_shape(*bias_cotangent, "bias_cotangent", *bias, "bias");
  }
  const Kind kind = kind_of(score, temperature);
  Head head(features, weight, bias);
  std::optional<Operand> v, u;
  if (features_cotangent) v.emplace(*features_cotangent, head.x.read());
  if (weight_cotangent) u.emplace(*weight_cotangent, head.x.read());
  const void* c = bias_cotangent ? head.row_of(*bias_cotangent) : nullptr;
  const int64_t N = features.size(0);
  const Column upstream = as_column(grad), saved = as_column(value);
  Tensor grad_grad = empty_of(features, {N}, score_dtype(features));

  const auto reduced_of = [&](const Part& part) {
    return reals_of(head.wide, saved, part.row, part.z.rows, kind.sign);
  };
  const auto second = [&](Walk& walk) {
    if (v) walk.v = &*v;
    if (u) walk.u = &*u;
    walk.second = true;
    walk.bias = head.bias;
    walk.bias_t = c;
  };
  // u = sum_k t slope, of which grad_grad holds sign u: complete before the first curvature is formed.
  std::vector<double> sums;
  const auto total = [&](const Part& part, const void* reduced) {
    double* sum = sums.data() + part.wave_row;
    if (part.column == 0) std::fill(sum, sum + part.z.rows, 0.0);
    tile_engine().second_sum(part.z, part.t, kind.reduce, reduced, sum);
    for (int64_t i = 0; i < part.z.rows; ++i) {
      void* out = real_at(grad_grad, part.row + i);
      head.wide ? void(*static_cast<double*>(out) = kind.sign * sum[i])
                : void(*static_cast<float*>(out) = float(kind.sign * sum[i]));
    }
    return sum;
  };
  Wanted wanted(features, weight, for_features, for_weight, for_bias && bias);
  Walk walk(head.x, head.w);
  second(walk);
  wanted.into(walk, for_features, for_weight);
  walk.plan();
  const bool gradients = walk.dx || walk.dw || walk.column_sum;
  if (!walk.whole_rows() || !gradients) {
    Walk first(head.x, head.w);
    second(first);
    first.plan();
    Workspace workspace(features);
    sums.resize(first.wave());
    first.run(workspace, [&](const Part& part) { total(part, reduced_of(part).data()); });
  }
  if (gradients) {
    sums.resize(walk.wave());
    walk.run(head.workspace, [&](const Part& part) {
      const auto reduced = reduced_of(part);
      const auto scale = reals_of(head.wide, upstream, part.row, part.z.rows, kind.sign);
      double* sum = sums.data() + part.wave_row;
      if (walk.whole_rows()) {
        total(part, reduced.data());
      } else {
        const auto known = reals_of(head.wide, as_column(grad_grad), part.row, part.z.rows, kind.sign);
        for (int64_t i = 0; i < part.z.rows; ++i) {
          sum[i] = head.wide ? reinterpret_cast<const double*>(known.data())[i]
                             : double(reinterpret_cast<const float*>(known.data())[i]);
        }
      }
      tile_engine().second(part.z, part.t, kind.reduce, reduced.data(), scale.data(), sum);
    });
    wanted.finish_bias(head.wide);
  }
  return {grad_grad, wanted.features.result, wanted.weight.result, wanted.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_scores(const Tensor& features, const Tensor& weight,
                                                                 const std::optional<Tensor>& bias) {
  check_head(features, weight, bias);
  STD_TORCH_CHECK(weight.size(0) > 0, "weight: expected at least one class");
  Head head(features, weight, bias);
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
    engine.reduce(part.z, lse, of_lse);
    engine.reduce(part.z, softplus, of_joint);
    engine.best(part.z, part.column, best);
    if (part.column + part.z.columns < K) return;
    engine.finish(head.wide, lse, rows, of_lse, -1.0, real_at(energy, part.row));
    engine.finish(head.wide, softplus, rows, of_joint, 1.0, real_at(joint, part.row));
    for (int64_t i = 0; i < rows; ++i) {
      static_cast<int64_t*>(argmax.mutable_data_ptr())[part.row + i] = best[i].index;
      const auto put = [&](auto real) {
        using Real = decltype(real);
        const Real maximum = Real(best[i].maximum);
        static_cast<Real*>(largest.mutable_data_ptr())[part.row + i] = maximum;
        // exp(maximum + low), without the rounding of an energy as large as the logits
        static_cast<Real*>(msp.mutable_data_ptr())[part.row + i] =
            std::isfinite(maximum) ? Real(1 / of_lse[i].sum) : Real(NAN);
      };
      head.wide ? put(double{}) : put(float{});
    }
  });
  return {energy, joint, largest, argmax, msp};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("linear_score", TORCH_BOX(&oodkern::linear_score));
  m.impl("linear_score_backward", TORCH_BOX(&oodkern::linear_score_backward));
  m.impl("linear_score_double_backward", TORCH_BOX(&oodkern::linear_score_double_backward));
  m.impl("linear_scores", TORCH_BOX(&oodkern::linear_scores));
}
