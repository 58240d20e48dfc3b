// Room `distill` on a GPU: T^2 KL(softmax(teacher / T) || softmax(student / T)) of given logits.
#include "../distill.h"

#include "distill.cuh"
#include "row_launch.h"

namespace oodkern {
namespace {

using namespace device;

// The columns that a row seems to have when its chunks are counted from a multiple of 16 bytes.
template <class Stored>
int64_t columns_seen(const void* rows_at, int64_t stride, int64_t columns, int64_t rows) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows_at) % 16 == 0 && (rows == 1 || stride * int64_t(sizeof(Stored)) % 16 == 0);
  return columns + (aligned ? 0 : Vector<Stored>::kWidth - 1);
}

template <class Math, class Student, class Teacher>
void run(const CudaStream& stream, const DistillCall& call, int64_t rows) {
  using View = PairView<Student, Teacher>;
  constexpr int kChunk = View::kChunk;
  constexpr int kMost = sizeof(Student) == 8 ? 8 : 32;  // elements of each row in a lane
  constexpr int kFew = sizeof(Student) == 8 ? 8 : 16;   // where a gradient is formed of them
  constexpr int kShort =
      sizeof(Student) == 8 ? 0 : 64;  // columns of a row that takes 8 lanes; mixed pairs have no such
  constexpr bool kAlike = std::is_same_v<Student, Teacher>;
  const int64_t columns = View::kOfStudent >= View::kOfTeacher
                              ? columns_seen<Student>(call.student, call.student_stride, call.columns, rows)
                              : columns_seen<Teacher>(call.teacher, call.teacher_stride, call.columns, rows);
  const Divergence<Math> divergence{call.temperature};
  const auto forward = [&](auto kernel, int lanes) {
    stream.launch("distillation_rows", kernel, blocks_for(rows, kThreads / lanes), kThreads, 0, call,
                  LogSumExp<Math>{call.temperature}, divergence, rows);
  };
  const auto backward = [&](auto kernel, int lanes, int64_t parts) {
    stream.launch("distillation_gradient", kernel, blocks_for(rows * parts, kThreads / lanes), kThreads, 0, call,
                  divergence, rows, parts);
  };
  if constexpr (kAlike && kShort > 0) {
    constexpr int kChunks = kShort / 8 / kChunk;
    if (columns <= kShort && call.value) return forward(distillation_rows<Math, Student, Teacher, 8, kChunks>, 8);
    if (columns <= kShort) return backward(distillation_gradient<Math, Student, Teacher, 8, kChunks>, 8, 1);
  }
  if (!call.value) {
    constexpr int kPart = 32 * kFew;
    const int64_t parts = columns > kPart ? (columns + kPart - 1) / kPart : 1;
    return backward(distillation_gradient<Math, Student, Teacher, 32, kFew / kChunk>, 32, parts);
  }
  if (columns <= 32 * kMost) return forward(distillation_rows<Math, Student, Teacher, 32, kMost / kChunk>, 32);
  forward(distillation_rows<Math, Student, Teacher, kThreads, kMost / kChunk>, kThreads);
}

template <class Student>
void run_student(const CudaStream& stream, const DistillCall& call, int64_t rows) {
  switch (call.teacher_storage) {
    case Storage::kFloat32: return run<Float, Student, float>(stream, call, rows);
    case Storage::kBFloat16: return run<Float, Student, BFloat16>(stream, call, rows);
    case Storage::kFloat16: return run<Float, Student, Float16>(stream, call, rows);
    case Storage::kFloat64: return;  // goes with float64 alone
  }
}

struct CudaDistill {
  static void run(const DistillCall& call, int64_t rows, const Tensor& student) {
    const CudaStream stream(student);
    switch (call.student_storage) {
      case Storage::kFloat64: return oodkern::run<Double, double, double>(stream, call, rows);
      case Storage::kFloat32: return run_student<float>(stream, call, rows);
      case Storage::kBFloat16: return run_student<BFloat16>(stream, call, rows);
      case Storage::kFloat16: return run_student<Float16>(stream, call, rows);
    }
  }
  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_DISTILL_OPS(m, oodkern::CudaDistill);
}
