// Room `pairwise_hinge` on any device: arguments checked, results allocated. An Engine brings
//   check(N, M)              that it can count so many
//   run(id, ood, pairs)      the loss and its slopes, of float32 or float64 by pairs.wide
#pragma once

#include "check.h"

namespace oodkern {

// Dense sets of scores and what is made of them, all Real: double where `wide`, float elsewhere.
struct HingePairs {
  bool wide;
  const void* id;   // [N]
  const void* ood;  // [M]
  int64_t N, M;
  double margin;
  void* value;
  void* id_slope;   // [N]
  void* ood_slope;  // [M]
};

template <class Engine>
std::tuple<Tensor, Tensor, Tensor> pairwise_hinge(const Tensor& id_score, const Tensor& ood_score, double margin) {
  const ScalarType dtype = id_score.scalar_type();
  STD_TORCH_CHECK(id_score.dim() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                  "id_score: expected [N] float64 or float32");
  STD_TORCH_CHECK(ood_score.dim() == 1 && ood_score.scalar_type() == dtype,
                  "ood_score: expected [M] in the dtype of id_score");
  check_same_device(ood_score, "ood_score", id_score, "id_score");
  const int64_t N = id_score.size(0), M = ood_score.size(0);
  Engine::check(N, M);
  const Tensor id = torch::stable::contiguous(id_score), ood = torch::stable::contiguous(ood_score);
  Tensor value = empty_of(id, {}, dtype), id_slope = empty_of(id, {N}, dtype), ood_slope = empty_of(id, {M}, dtype);
  Engine::run(id, ood,
              {dtype == ScalarType::Double, id.const_data_ptr(), ood.const_data_ptr(), N, M, margin,
               value.mutable_data_ptr(), id_slope.mutable_data_ptr(), ood_slope.mutable_data_ptr()});
  return {value, id_slope, ood_slope};
}

}  // namespace oodkern

// The raw op in a library's implementation.
#define OODKERN_PAIRWISE_HINGE_OPS(m, Engine) m.impl("pairwise_hinge", TORCH_BOX(&oodkern::pairwise_hinge<Engine>))
