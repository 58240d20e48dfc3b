// The engine of distillation: both rows are read from memory once, in blocks, for their two online sums, and a second
// time, out of cache unless they are longer than that, for terms that do not cancel. Compiled once per instruction set.
#include "../distill.h"
#include "blocks.h"

namespace oodkern::OODKERN_ISA {
namespace {

template <class Math>
void forward(const DistillCall& call, int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  using Sum = typename Math::Sum;
  const LogSumExp<Math> reducer{call.temperature};
  const Divergence<Math> divergence{call.temperature};
  alignas(64) Real s_buffer[kBlock];
  alignas(64) Real t_buffer[kBlock];
  // Of one row: the exponentials of both, and the largest logits of each block.
  const Scratch<Real> kept(2 * call.columns), pivots(2 * (call.columns / kBlock + 1));
  Real *s_kept = kept.data, *t_kept = s_kept + call.columns;
  for (int64_t row = begin; row < end; ++row) {
    const void* student = row_at(call.student, call.student_storage, row * call.student_stride);
    const void* teacher = row_at(call.teacher, call.teacher_storage, row * call.teacher_stride);
    auto s_state = LogSumExp<Math>::init(), t_state = LogSumExp<Math>::init();
    const Real *s = nullptr, *t = nullptr;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      s = read(call.student_storage, student, at, size, s_buffer);
      t = read(call.teacher_storage, teacher, at, size, t_buffer);
      const auto s_block = keep_block(reducer, s, size, s_kept + at),
                 t_block = keep_block(reducer, t, size, t_kept + at);
      pivots.data[2 * (at / kBlock)] = s_block.maximum, pivots.data[2 * (at / kBlock) + 1] = t_block.maximum;
      s_state = reducer.merge(s_state, s_block);
      t_state = reducer.merge(t_state, t_block);
    }
    auto of_student = Softmax<Math>::of(s_state), of_teacher = Softmax<Math>::of(t_state);
    if (t_state.sum == 0) of_student.reciprocal = 0;
    Real* shares = static_cast<Real*>(call.shares) + 4 * row;
    shares[0] = of_student.maximum, shares[1] = of_student.reciprocal;
    shares[2] = of_teacher.maximum, shares[3] = of_teacher.reciprocal;
    const Real log_sums = Divergence<Math>::log_sums(of_teacher, of_student);
    Sum total = 0;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      if (call.columns > kBlock) {  // else the one block is still there
        s = read(call.student_storage, student, at, size, s_buffer);
        t = read(call.teacher_storage, teacher, at, size, t_buffer);
      }
      const Real s_share = share_of(reducer, pivots.data[2 * (at / kBlock)], of_student);
      const Real t_share = share_of(reducer, pivots.data[2 * (at / kBlock) + 1], of_teacher);
      Real part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t k = 0; k < size; ++k) {
        const Real p = t_kept[at + k] * t_share, q = s_kept[at + k] * s_share;
        part += Divergence<Math>::term(p, q, divergence.log_ratio(t[k], s[k], of_teacher, of_student, log_sums));
      }
      total += part;
    }
    static_cast<Real*>(call.value)[row] = Real(call.temperature * call.temperature * total);
  }
}

template <class Math, class Stored>
void backward(const DistillCall& call, int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  const Divergence<Math> divergence{call.temperature};
  alignas(64) Real s_buffer[kBlock];
  alignas(64) Real t_buffer[kBlock];
  alignas(64) Real grad_buffer[kBlock];
  alignas(64) Real p[kBlock];
  alignas(64) Real q[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const void* student = row_at(call.student, call.student_storage, row * call.student_stride);
    const void* teacher = row_at(call.teacher, call.teacher_storage, row * call.teacher_stride);
    const Real* shares = static_cast<const Real*>(call.shares) + 4 * row;
    const Softmax<Math> of_student{shares[0], shares[1]}, of_teacher{shares[2], shares[3]};
    Stored* grad_row = static_cast<Stored*>(call.grad_student) + row * call.columns;
    const Real log_sums = Divergence<Math>::log_sums(of_teacher, of_student);
    const Real upstream = static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride];
    const Real scale = Real(call.temperature) * upstream;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      const Real* s = read(call.student_storage, student, at, size, s_buffer);
      const Real* t = read(call.teacher_storage, teacher, at, size, t_buffer);
      Real* grad = target(grad_row + at, grad_buffer);
      exponentials<Math>(t, size, of_teacher.maximum, divergence.scale, of_teacher.reciprocal, p);
      exponentials<Math>(s, size, of_student.maximum, divergence.scale, of_student.reciprocal, q);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) {
        const Real u = divergence.log_ratio(t[k], s[k], of_teacher, of_student, log_sums);
        grad[k] = scale * Divergence<Math>::slope(p[k], q[k], u);
      }
      narrow(grad, size, grad_row + at);
    }
  }
}

}  // namespace

void run_distillation(const DistillCall& call, int64_t begin, int64_t end) {
  const bool wide = call.student_storage == Storage::kFloat64;
  if (call.value) return wide ? forward<Double>(call, begin, end) : forward<Float>(call, begin, end);
  switch (call.student_storage) {
    case Storage::kFloat64: return backward<Double, double>(call, begin, end);
    case Storage::kFloat32: return backward<Float, float>(call, begin, end);
    case Storage::kBFloat16: return backward<Float, BFloat16>(call, begin, end);
    case Storage::kFloat16: return backward<Float, Float16>(call, begin, end);
  }
}

}  // namespace oodkern::OODKERN_ISA
