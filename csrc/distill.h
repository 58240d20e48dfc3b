// Room `distill` on any device: arguments checked, results allocated, one DistillCall made of both. An Engine brings
//   run(call, rows, student)   computes it
//   prepare(data, bytes)       is told of large results before they are written
#pragma once

#include "check.h"
#include "cpu/distill.h"

namespace oodkern {

template <class Engine>
struct DistillOps {
  static void check_pair(const Tensor& student, const Tensor& teacher) {
    check_logits(student, "student_logits");
    check_logits(teacher, "teacher_logits");
    STD_TORCH_CHECK(sizes_of(student) == sizes_of(teacher) && score_dtype(student) == score_dtype(teacher),
                    "teacher_logits: expected the shape of student_logits, and float64 where these are");
    check_same_device(teacher, "teacher_logits", student, "student_logits");
  }

  static DistillCall call_of(const Tensor& student, const Tensor& teacher, const Rows& s, const Rows& t,
                             double temperature) {
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

  static std::vector<int64_t> shape_of_shares(const Tensor& logits) {
    std::vector<int64_t> sizes = sizes_of(logits);
    sizes.back() = 4;
    return sizes;
  }

  static std::tuple<Tensor, Tensor> distillation(const Tensor& student, const Tensor& teacher, double temperature) {
    check_pair(student, teacher);
    const Rows s = as_rows(student), t = as_rows(teacher);
    std::vector<int64_t> sizes = sizes_of(student);
    sizes.pop_back();
    Tensor value = empty_of(student, sizes, score_dtype(student));
    Tensor shares = empty_of(student, shape_of_shares(student), score_dtype(student));
    DistillCall call = call_of(student, teacher, s, t, temperature);
    call.value = value.mutable_data_ptr();
    call.shares = shares.mutable_data_ptr();
    if (s.rows) Engine::run(call, s.rows, student);
    return {value, shares};
  }

  static Tensor distillation_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                      const Tensor& shares, double temperature) {
    check_pair(student, teacher);
    check_per_row(grad, "grad", student);
    check_same_device(grad, "grad", student);
    STD_TORCH_CHECK(sizes_of(shares) == shape_of_shares(student) && shares.scalar_type() == score_dtype(student),
                    "shares: expected four numbers per row of logits, in the dtype of the scores");
    check_same_device(shares, "shares", student);
    const Rows s = as_rows(student), t = as_rows(teacher);
    const Column upstream = as_column(grad);
    const Tensor dense = torch::stable::contiguous(shares);
    Tensor result = empty_of(student, sizes_of(student), student.scalar_type());
    DistillCall call = call_of(student, teacher, s, t, temperature);
    call.shares = const_cast<void*>(dense.const_data_ptr());
    call.grad_value = upstream.data();
    call.grad_value_stride = upstream.stride;
    call.grad_student = result.mutable_data_ptr();
    Engine::prepare(call.grad_student, result.numel() * int64_t(result.element_size()));
    if (s.rows) Engine::run(call, s.rows, student);
    return result;
  }
};

}  // namespace oodkern

#define OODKERN_DISTILL_OPS(m, Engine)                                           \
  m.impl("distillation", TORCH_BOX(&oodkern::DistillOps<Engine>::distillation)); \
  m.impl("distillation_backward", TORCH_BOX(&oodkern::DistillOps<Engine>::distillation_backward))
