// Room `contrast`'s CLUB on any device: arguments checked, results allocated. An Engine brings
//   forward(club, mean, value, columns)              the bound, and what its gradients need of columns, [5, D]
//   backward(club, mean, grad, columns, gradients)   the gradients that were asked for
//   prepare(data, bytes)                             is told of large results before they are written
#pragma once

#include "check.h"
#include "cpu/club.h"

namespace oodkern {

struct Club {
  Rows mean, log_variance, target;
  ClubCall call;
  int64_t N, D;

  Club(const Tensor& mu, const Tensor& log, const Tensor& y)
      : mean(as_rows(mu)), log_variance(as_rows(log)), target(as_rows(y)), N(mu.size(0)), D(mu.size(1)) {
    call = {storage_of(mu), mean.data(),         log_variance.data(), target.data(),
            mean.stride,    log_variance.stride, target.stride};
  }
};

template <class Engine>
struct ClubOps {
  static void check(const Tensor& mean, const Tensor& log_variance, const Tensor& target) {
    check_matrix(mean, "mean");
    check_same_shape(log_variance, "log_variance", mean, "mean");
    check_same_shape(target, "target", mean, "mean");
    check_same_device(log_variance, "log_variance", mean, "mean");
    check_same_device(target, "target", mean, "mean");
  }

  static std::tuple<Tensor, Tensor> club(const Tensor& mean, const Tensor& log_variance, const Tensor& target) {
    check(mean, log_variance, target);
    const ScalarType dtype = score_dtype(mean);
    Tensor value = empty_of(mean, {}, dtype), columns = empty_of(mean, {5, mean.size(1)}, dtype);
    Engine::forward(Club(mean, log_variance, target), mean, value, columns);
    return {value, columns};
  }

  static std::tuple<Tensor, Tensor, Tensor> club_backward(const Tensor& grad, const Tensor& mean,
                                                          const Tensor& log_variance, const Tensor& target,
                                                          const Tensor& columns, bool for_mean, bool for_log_variance,
                                                          bool for_target) {
    check(mean, log_variance, target);
    STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == score_dtype(mean),
                    "grad: expected one number in the dtype of scores");
    STD_TORCH_CHECK(
        sizes_of(columns) == (std::vector<int64_t>{5, mean.size(1)}) && columns.scalar_type() == score_dtype(mean),
        "columns: expected what club gave");
    check_same_device(grad, "grad", mean, "mean");
    check_same_device(columns, "columns", mean, "mean");
    const Club club(mean, log_variance, target);
    const Tensor dense = torch::stable::contiguous(columns);
    const char* row = static_cast<const char*>(dense.const_data_ptr());
    const int64_t bytes = club.D * int64_t(dense.element_size());
    const ClubColumns of{row, row + bytes, row + 2 * bytes, row + 3 * bytes, row + 4 * bytes};
    Tensor results[] = {gradient_of(mean, for_mean), gradient_of(log_variance, for_log_variance),
                        gradient_of(target, for_target)};
    const auto memory = [&](int i, bool asked) {
      void* data = asked ? results[i].mutable_data_ptr() : nullptr;
      Engine::prepare(data, results[i].numel() * int64_t(results[i].element_size()));
      return data;
    };
    const ClubGradients out{club.D, memory(0, for_mean), memory(1, for_log_variance), memory(2, for_target)};
    Engine::backward(club, mean, grad, of, out);
    return {results[0], results[1], results[2]};
  }
};

}  // namespace oodkern

// The raw ops in a library's implementation.
#define OODKERN_CLUB_OPS(m, Engine)                           \
  m.impl("club", TORCH_BOX(&oodkern::ClubOps<Engine>::club)); \
  m.impl("club_backward", TORCH_BOX(&oodkern::ClubOps<Engine>::club_backward))
