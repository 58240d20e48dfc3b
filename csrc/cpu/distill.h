// One call of distillation, as every device's engine takes it, and the CPU's: plain pointers and sizes, as in rows.h.
#pragma once

#include "rows.h"

namespace oodkern {

// N rows of K logits of a student and of a teacher, each with a storage of its own, both float64 or neither. `Real` is
// double for float64 and float elsewhere.
struct DistillCall {
  Storage student_storage;
  Storage teacher_storage;
  double temperature;
  int64_t columns;  // K

  const void* student;  // [N, K], rows student_stride apart
  int64_t student_stride;
  const void* teacher;  // [N, K], rows teacher_stride apart
  int64_t teacher_stride;

  void* value;   // [N] Real; null in the backward pass
  void* shares;  // [N, 4] Real, dense: the student's and the teacher's maximum and reciprocal sum (see Divergence)

  const void* grad_value;  // [N] Real, elements grad_value_stride apart
  int64_t grad_value_stride;
  void* grad_student;  // [N, K] dense, in the student's storage
};

// Rows [begin, end): value and shares where `value` is there, grad_student from shares elsewhere.
using DistillEngine = void (*)(const DistillCall&, int64_t begin, int64_t end);

}  // namespace oodkern
