// Every raw op, one line each. Raw ops know no autograd: oodkern.ops wraps them in differentiable functions.
#include "stable.h"

STABLE_TORCH_LIBRARY(oodkern, m) {
  // Room `energy`: reductions of given logits [..., K].
  m.def("energy(Tensor logits, float temperature) -> Tensor");
  m.def("energy_backward(Tensor grad, Tensor logits, Tensor energy, float temperature) -> Tensor");
  m.def(
      "energy_double_backward(Tensor cotangent, Tensor grad, Tensor logits, Tensor energy, float temperature) -> "
      "(Tensor, Tensor)");
  m.def("joint_energy(Tensor logits) -> Tensor");
  m.def("joint_energy_backward(Tensor grad, Tensor logits) -> Tensor");
  m.def("joint_energy_double_backward(Tensor cotangent, Tensor grad, Tensor logits) -> (Tensor, Tensor)");

  // Room `heads`: `head` is "oe", "energy_in", "energy_out" (of a margin) or "bce" (of targets [..., K], any dtype);
  // the loss, [..., 3] what the gradient needs of a row ([..., 0] for "bce"), and the gradient for an `upstream` that
  // is there already, [..., 0] elsewhere.
  m.def("head(str head, Tensor logits, Tensor? target, float margin, Tensor? upstream) -> (Tensor, Tensor, Tensor)");
  m.def("head_backward(str head, Tensor grad, Tensor logits, Tensor? target, float margin, Tensor rows) -> Tensor");
  // Forms anew the rows of a gradient whose upstream is not the foreseen one, to two roundings.
  m.def(
      "head_mend(str head, Tensor(a!) gradient, Tensor grad, Tensor foreseen, Tensor logits, Tensor? target, "
      "float margin, Tensor rows) -> ()");

  // Room `norm`: the L2 norm of each row of x [..., K], where a row is a sample.
  m.def("sample_norm(Tensor x) -> Tensor");
  m.def("sample_norm_backward(Tensor grad, Tensor x, Tensor norm) -> Tensor");
  m.def("sample_norm_double_backward(Tensor cotangent, Tensor grad, Tensor x, Tensor norm) -> (Tensor, Tensor)");

  // Rooms whose heart is a product features @ weight.T that is never stored. An output that was not asked for
  // (`for_...` false) is a tensor without elements.

  // Room `linear_energy`: `score` is "energy" or "joint_energy"; `value` is what linear_score gave.
  m.def("linear_score(str score, Tensor features, Tensor weight, Tensor? bias, float temperature) -> Tensor");
  m.def(
      "linear_score_backward(str score, Tensor grad, Tensor features, Tensor weight, Tensor? bias, Tensor value, "
      "float temperature, bool for_features, bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_score_kept(str score, Tensor features, Tensor weight, Tensor? bias, float temperature) -> "
      "(Tensor, Tensor)");
  m.def(
      "linear_score_backward_kept(str score, Tensor grad, Tensor(a!) logits, Tensor features, Tensor weight, "
      "Tensor? bias, Tensor value, float temperature, bool for_features, bool for_weight, bool for_bias) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "linear_score_double_backward(str score, Tensor? features_cotangent, Tensor? weight_cotangent, "
      "Tensor? bias_cotangent, Tensor grad, Tensor features, Tensor weight, Tensor? bias, Tensor value, "
      "float temperature, bool for_features, bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_score_foreseen(str score, Tensor features, Tensor weight, Tensor? bias, float temperature, "
      "Tensor? linear, Tensor? hinge, Tensor? margin, bool for_features, bool for_weight, bool for_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_scores(Tensor features, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Room `subspace`.
  m.def("alignment(Tensor features, Tensor weight) -> Tensor");
  m.def("alignment_foreseen(Tensor features, Tensor weight) -> (Tensor, Tensor)");
  m.def(
      "alignment_backward(Tensor grad, Tensor features, Tensor weight, bool for_features, bool for_weight) -> "
      "(Tensor, Tensor)");
  m.def("subspace_energy(Tensor features, Tensor basis) -> (Tensor, Tensor)");
  m.def(
      "subspace_energy_backward(Tensor grad_inside, Tensor grad_outside, Tensor features, Tensor basis, "
      "bool for_features, bool for_basis) -> (Tensor, Tensor)");
  m.def(
      "subspace_energy_double_backward(Tensor? features_cotangent, Tensor? basis_cotangent, Tensor grad_inside, "
      "Tensor grad_outside, Tensor features, Tensor basis, bool for_features, bool for_basis) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  // Room `contrast`: the loss and the logsumexp of each query's row and, where `symmetric`, each key's column.
  m.def(
      "info_nce(Tensor queries, Tensor keys, Tensor? target, Tensor? query_labels, Tensor? key_labels, "
      "Tensor temperature, bool normalize, bool symmetric) -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_foreseen(Tensor queries, Tensor keys, Tensor? target, Tensor? query_labels, Tensor? key_labels, "
      "Tensor temperature, bool normalize, bool for_queries, bool for_keys) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_backward(Tensor grad, Tensor queries, Tensor keys, Tensor? target, Tensor? query_labels, "
      "Tensor? key_labels, Tensor temperature, Tensor query_lse, Tensor key_lse, bool normalize, bool symmetric, "
      "bool for_queries, bool for_keys) -> (Tensor, Tensor, Tensor)");
  // CLUB, and of each column what its gradients need.
  m.def("club(Tensor mean, Tensor log_variance, Tensor target) -> (Tensor, Tensor)");
  m.def(
      "club_backward(Tensor grad, Tensor mean, Tensor log_variance, Tensor target, Tensor columns, bool for_mean, "
      "bool for_log_variance, bool for_target) -> (Tensor, Tensor, Tensor)");

  // The pairwise hinge, and its slope in each of the two sets of scores.
  m.def("pairwise_hinge(Tensor id_score, Tensor ood_score, float margin) -> (Tensor, Tensor, Tensor)");

  // Room `distill`: the loss and, [..., 4], what the gradient needs of a row; only the student has a gradient.
  m.def("distillation(Tensor student_logits, Tensor teacher_logits, float temperature) -> (Tensor, Tensor)");
  m.def(
      "distillation_backward(Tensor grad, Tensor student_logits, Tensor teacher_logits, Tensor shares, "
      "float temperature) -> Tensor");

  // matrix[index_n] += rows_n, rounded once a row of the matrix.
  m.def("add_rows_(Tensor(a!) matrix, Tensor rows, Tensor index) -> ()");

  // Room `select`.
  m.def("nearest_center(Tensor features, Tensor centers, bool normalize=False) -> (Tensor, Tensor)");
  m.def("cluster_extremes(Tensor score, Tensor cluster, int clusters, int per_side) -> (Tensor, Tensor)");
  // Seeds [R, k] of k-means from distances [N, N] and random numbers [k, R, candidates].
  m.def("kmeans_seeds(Tensor distance, Tensor uniform) -> Tensor");
  // `values` and `indices` hold candidates; `state`: how many, whether number k - 1 is the worst of k, NaN so far.
  m.def(
      "top_k_update(Tensor scores, int offset, int k, bool largest, Tensor(a!) values, Tensor(b!) indices, "
      "Tensor(c!) state) -> ()");

  // Multiply-adds that this process's CPU products have done so far.
  m.def("multiplications() -> int");

  // The CPU instruction sets that were built and that this processor has, worst first, between spaces; the one
  // in use (the best, unless another was chosen).
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
}
