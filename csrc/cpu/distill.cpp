// Room `distill` on the CPU: T^2 KL(softmax(teacher / T) || softmax(student / T)) of given logits.
#include "distill.h"

#include "../check.h"
#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

void run(const DistillCall& call, int64_t rows) {
  over_rows(engines().distillation, call, rows, 2 * call.columns);
}

void check_pair(const Tensor& student, const Tensor& teacher) {
  check_logits(student);
  check_logits(teacher);
  STD_TORCH_CHECK(sizes_of(student) == sizes_of(teacher) && score_dtype(student) == score_dtype(teacher),
                  "teacher_logits: expected the shape of student_logits, and float64 where these are");
}

DistillCall call_of(const Tensor& student, const Tensor& teacher, const Rows& s, const Rows& t, double temperature) {
  DistillCall call{};
  call.student_storage = storage_of(student);
  call.teacher_storage = storage_of(teacher);
  call.temperature = temperature;
  call.columns = s.columns;
  call.student = s.data();
  call.student_stride = s.stride;
  call.teacher = t.data();
  call.teacher_stride = t.stride;
  return call;
}

std::vector<int64_t> shape_of_shares(const Tensor& logits) {
  std::vector<int64_t> sizes = sizes_of(logits);
  sizes.back() = 4;
  return sizes;
}

std::tuple<Tensor, Tensor> distillation(const Tensor& student, const Tensor& teacher, double temperature) {
  check_pair(student, teacher);
  const Rows s = as_rows(student), t = as_rows(teacher);
  std::vector<int64_t> sizes = sizes_of(student);
  sizes.pop_back();
  Tensor value = empty_of(student, sizes, score_dtype(student));
  Tensor shares = empty_of(student, shape_of_shares(student), score_dtype(student));
  DistillCall call = call_of(student, teacher, s, t, temperature);
  call.value = value.mutable_data_ptr();
  call.shares = shares.mutable_data_ptr();
  if (s.rows) run(call, s.rows);
  return {value, shares};
}

Tensor distillation_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& shares,
                             double temperature) {
  check_pair(student, teacher);
  check_per_row(grad, "grad", student);
  STD_TORCH_CHECK(sizes_of(shares) == shape_of_shares(student) && shares.scalar_type() == score_dtype(student),
                  "shares: expected four numbers per row of logits, in the dtype of the scores");
  const Rows s = as_rows(student), t = as_rows(teacher);
  const Column upstream = as_column(grad);
  const Tensor dense = torch::stable::contiguous(shares);
  Tensor result = empty_of(student, sizes_of(student), student.scalar_type());
  DistillCall call = call_of(student, teacher, s, t, temperature);
  call.shares = const_cast<void*>(dense.const_data_ptr());
  call.grad_value = upstream.data();
  call.grad_value_stride = upstream.stride;
  call.grad_student = result.mutable_data_ptr();
  prefer_large_pages(call.grad_student, result.numel() * int64_t(result.element_size()));
  if (s.rows) run(call, s.rows);
  return result;
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("distillation", TORCH_BOX(&oodkern::distillation));
  m.impl("distillation_backward", TORCH_BOX(&oodkern::distillation_backward));
}
