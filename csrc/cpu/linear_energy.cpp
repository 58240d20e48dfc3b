// Room `linear_energy` on the CPU: E and J of logits that are never stored, and their two derivatives.
#include <cstring>

#include "linear_head.h"

namespace oodkern {
namespace {

// What logits take at most that are kept beside nothing else.
constexpr int64_t kKeptBytes = (int64_t(16) << 20) - (64 << 10);

// The score of each row; the logits stay in `kept`, where there is one.
Tensor scored(const Kind& kind, LinearHead& head, const Tensor& features, void* kept) {
  const int64_t K = head.w.rows();
  Tensor value = empty_of(features, {features.size(0)}, score_dtype(features));
  Walk walk(head.x, head.w);
  walk.bias = head.bias;
  walk.kept = kept;
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

}  // namespace

Tensor linear_score(std::string score, const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                    double temperature) {
  check_head(features, weight, bias);
  LinearHead head(features, weight, bias);
  return scored(kind_of(score, temperature), head, features, nullptr);
}

namespace {

// The gradients of the score, of logits that are formed again or were kept.
std::tuple<Tensor, Tensor, Tensor> gradients(const Kind& kind, LinearHead& head, const Tensor& grad,
                                             const Tensor& features, const Tensor& weight, const Tensor& value,
                                             bool for_features, bool for_weight, bool for_bias, void* kept) {
  Wanted wanted(features, weight, for_features, for_weight, for_bias);
  Walk walk(head.x, head.w);
  walk.bias = head.bias;
  wanted.into(walk, for_features, for_weight);
  walk.kept = kept, walk.given = kept != nullptr;
  const Column upstream = as_column(grad), saved = as_column(value);
  walk.plan();
  if (kept && !walk.once()) {  // with another number of threads than the score had: logits may be made slopes once
    walk.kept = nullptr, walk.given = false;
    walk.plan();
  }
  walk.run(head.workspace, [&](const Part& part) {
    const auto reduced = reals_of(head.wide, saved, part.row, part.z.rows, kind.sign);
    const auto scale = reals_of(head.wide, upstream, part.row, part.z.rows, kind.sign);
    tile_engine().slope(part.z, kind.reduce, reduced.data(), scale.data());
  });
  wanted.finish_bias(head.wide);
  return {wanted.features.result, wanted.weight.result, wanted.bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_score_backward(std::string score, const Tensor& grad, const Tensor& features,
                                                         const Tensor& weight, const std::optional<Tensor>& bias,
                                                         const Tensor& value, double temperature, bool for_features,
                                                         bool for_weight, bool for_bias) {
  check_head(features, weight, bias);
  check_per_row(grad, "grad", features);
  check_per_row(value, "value", features);
  LinearHead head(features, weight, bias);
  return gradients(kind_of(score, temperature), head, grad, features, weight, value, for_features, for_weight,
                   for_bias && bias, nullptr);
}

// Whether the logits are few enough to be kept from the score to its gradients, within what either holds at most.
bool keeps(const LinearHead& head, const Tensor& features, const Tensor& weight) {
  if (!head.x.in_place() || !head.w.in_place()) return false;
  const int64_t K = head.w.rows(), bytes = head.x.rows() * Walk::kept_stride(K) * (head.wide ? 8 : 4);
  // Of few classes the product takes no longer than logits to memory and back: 65,536 x 256 x 19 gains nothing.
  if (K < 64 && bytes > int64_t(1) << 20) return false;
  if (head.x.read() != Storage::kBFloat16) return bytes + K * 16 <= kKeptBytes;
  char some;
  Gradient of_features{features}, of_weight{weight};
  Walk walk(head.x, head.w);
  walk.dx = &of_features, walk.dw = &of_weight, walk.kept = &some;
  walk.plan();
  return bytes <= kWorkspaceBytes / 2 && walk.once();
}

// The score, and the logits for linear_score_backward_kept; none where they are too many.
std::tuple<Tensor, Tensor> linear_score_kept(std::string score, const Tensor& features, const Tensor& weight,
                                             const std::optional<Tensor>& bias, double temperature) {
  check_head(features, weight, bias);
  LinearHead head(features, weight, bias);
  Tensor logits = empty_of(features, {0}, score_dtype(features));
  if (keeps(head, features, weight)) {
    const int64_t stride = Walk::kept_stride(weight.size(0)), size = int64_t(logits.element_size());
    logits = empty_of(features, {features.size(0), stride}, score_dtype(features));
    for (int64_t n = 0; n < features.size(0); ++n) {  // what is behind a row is nothing's, and the same in every call
      char* row = static_cast<char*>(logits.mutable_data_ptr()) + n * stride * size;
      std::memset(row + weight.size(0) * size, 0, (stride - weight.size(0)) * size);
    }
  }
  void* const kept = logits.dim() == 2 ? logits.mutable_data_ptr() : nullptr;
  return {scored(kind_of(score, temperature), head, features, kept), logits};
}

// The gradients of logits that linear_score_kept gave, which become slopes.
std::tuple<Tensor, Tensor, Tensor> linear_score_backward_kept(std::string score, const Tensor& grad, Tensor logits,
                                                              const Tensor& features, const Tensor& weight,
                                                              const std::optional<Tensor>& bias, const Tensor& value,
                                                              double temperature, bool for_features, bool for_weight,
                                                              bool for_bias) {
  check_head(features, weight, bias);
  check_per_row(grad, "grad", features);
  check_per_row(value, "value", features);
  const std::vector<int64_t> expected{features.size(0), Walk::kept_stride(weight.size(0))};
  STD_TORCH_CHECK(
      sizes_of(logits) == expected && logits.scalar_type() == score_dtype(features) && logits.is_contiguous(),
      "logits: expected those of linear_score_kept");
  LinearHead head(features, weight, bias);
  return gradients(kind_of(score, temperature), head, grad, features, weight, value, for_features, for_weight,
                   for_bias && bias, logits.mutable_data_ptr());
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
  LinearHead head(features, weight, bias);
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
      put_real(head.wide, grad_grad.mutable_data_ptr(), part.row + i, kind.sign * sum[i]);
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
        for (int64_t i = 0; i < part.z.rows; ++i) sum[i] = real_of(head.wide, known.data(), i);
      }
      tile_engine().second(part.z, part.t, kind.reduce, reduced.data(), scale.data(), sum);
    });
    wanted.finish_bias(head.wide);
  }
  return {grad_grad, wanted.features.result, wanted.weight.result, wanted.bias};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("linear_score", TORCH_BOX(&oodkern::linear_score));
  m.impl("linear_score_backward", TORCH_BOX(&oodkern::linear_score_backward));
  m.impl("linear_score_kept", TORCH_BOX(&oodkern::linear_score_kept));
  m.impl("linear_score_backward_kept", TORCH_BOX(&oodkern::linear_score_backward_kept));
  m.impl("linear_score_double_backward", TORCH_BOX(&oodkern::linear_score_double_backward));
}
