// Distillation on a GPU: both rows are in registers, of 8 or 32 lanes to K = 1,024 and of a block beyond, for their two
// normalisers and then for the terms, which need these. What does not fit (K > 8,192) is read a second time, backwards:
// the last tile is still in registers, the one before it the likeliest to be in cache.
#pragma once

#include "../cpu/distill.h"
#include "row.cuh"

namespace oodkern::device {

// The two rows, seen in chunks: of as many elements as 16 bytes carry of the narrower type, the other's in two
// accesses.
template <class Student, class Teacher>
struct PairView {
  static constexpr int kOfStudent = Vector<Student>::kWidth, kOfTeacher = Vector<Teacher>::kWidth;
  static constexpr int kChunk = kOfStudent > kOfTeacher ? kOfStudent : kOfTeacher;

  const Student* s;
  const Teacher* t;
  int past;  // elements between a multiple of 16 bytes and the narrower type's row: chunks are counted from there
  bool s_alike, t_alike;  // whether chunks begin at multiples of 16 bytes
  int64_t first;          // element of the row, which s and t point to
  int begin, columns;     // from there: chunks are at begin, begin + kChunk, ... of so many elements

  // Part `part` of a row that is cut, as chunks are, into parts of `size` elements.
  static __device__ __forceinline__ PairView of(const DistillCall& call, int64_t row, int64_t part, int size) {
    PairView view{};
    view.s = static_cast<const Student*>(call.student) + row * call.student_stride;
    view.t = static_cast<const Teacher*>(call.teacher) + row * call.teacher_stride;
    const int s_past = elements_past_boundary(view.s), t_past = elements_past_boundary(view.t);
    view.past = kOfStudent >= kOfTeacher ? s_past : t_past;
    view.s_alike = s_past == view.past % kOfStudent;
    view.t_alike = t_past == view.past % kOfTeacher;
    view.first = part == 0 ? 0 : part * size - view.past;
    view.begin = part == 0 ? -view.past : 0;
    view.s += view.first, view.t += view.first;
    view.columns = int(call.columns - view.first < size ? call.columns - view.first : size);
    return view;
  }
};

// Chunks at, at + step, ... of a row, -inf where it has none. All whole vectors of both rows are asked for before an
// edge is looked at and before anything is widened (see load_vectors).
template <class Stored, int kChunks, int kChunk>
struct Chunks {
  static constexpr int kWidth = Vector<Stored>::kWidth, kCount = kChunks * kChunk / kWidth;
  const Stored* row;
  int at, step, columns;
  bool aligned;
  Vector<Stored> vectors[kCount];

  __device__ __forceinline__ int from(int j) const { return at + j * kWidth / kChunk * step + j * kWidth % kChunk; }
  __device__ __forceinline__ bool whole(int j) const { return aligned && from(j) >= 0 && from(j) + kWidth <= columns; }
  __device__ __forceinline__ void ask() {
    Stored nothing;
    narrow(std::conditional_t < sizeof(Stored) == 8, double, float > (-INFINITY), &nothing);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) vectors[j].elements[i] = nothing;
      if (whole(j)) vectors[j] = load_vector(row + from(j));
    }
  }
  template <class Real>
  __device__ __forceinline__ void widen_to(Real (&out)[kChunks][kChunk]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!whole(j) && from(j) < columns && from(j) + kWidth > 0) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (from(j) + i >= 0 && from(j) + i < columns) vectors[j].elements[i] = row[from(j) + i];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        out[j * kWidth / kChunk][j * kWidth % kChunk + i] = widen(vectors[j].elements[i]);
    }
  }
};

// The numbers of a group of lanes, each brought together with the others' of its place. A block's warps meet in
// `words`.
template <int kLanes, class Real, int kCount, class Words, class Combine>
__device__ __forceinline__ void over_group(Real (&numbers)[kCount], const Words& words, const Combine& combine) {
#pragma unroll
  for (int bits = (kLanes < 32 ? kLanes : 32) / 2; bits > 0; bits /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers[i] = combine(numbers[i], __shfl_xor_sync(kAll, numbers[i], bits));
  }
  if constexpr (kLanes > 32) {
    const int warp = int(threadIdx.x) / 32;
    __syncthreads();  // before what was brought together last is written over
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) words.store(warp * kCount + i, numbers[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      numbers[i] = words.load(i);
      for (int other = 1; other < kWarps; ++other) numbers[i] = combine(numbers[i], words.load(other * kCount + i));
    }
  }
}

// What both passes know of a row.
template <class Math>
struct Shares {
  using Real = typename Math::Real;
  Softmax<Math> student, teacher;
  Real log_sums;

  // p_k of the teacher, q_k of the student and u_k = log(p_k / q_k).
  template <class Use>
  __device__ __forceinline__ Real of(const Divergence<Math>& divergence, Real s, Real t, const Use& use) const {
    const Real p = teacher.probability(t, divergence.scale), q = student.probability(s, divergence.scale);
    return use(p, q, divergence.log_ratio(t, s, teacher, student, log_sums));
  }
};

// Value and shares of a row by kLanes lanes, or by a block; each lane holds kChunks chunks of it.
template <class Math, class Student, class Teacher, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads, 2) distillation_rows(const DistillCall call, const LogSumExp<Math> reducer,
                                                                 const Divergence<Math> divergence, int64_t rows) {
  using Real = typename Math::Real;
  using View = PairView<Student, Teacher>;
  constexpr int kChunk = View::kChunk;
  constexpr int kGroups = kThreads / kLanes;
  constexpr int kPart = kLanes * kChunks * kChunk;
  OODKERN_SHARED(Real, words, 2 * kWarps);
  const auto sum = [](Real a, Real b) { return a + b; };
  const auto larger = [](Real a, Real b) { return Math::larger(a, b); };
  const int lane = int(threadIdx.x) % kLanes;
  for (int64_t first = int64_t(blockIdx.x) * kGroups; first < rows; first += int64_t(gridDim.x) * kGroups) {
    // Lanes behind the last row take part in the shuffles, with that row once more.
    const bool real = first + int(threadIdx.x) / kLanes < rows;
    const int64_t row = real ? first + int(threadIdx.x) / kLanes : rows - 1;
    int at = 0, columns = 0;  // of this lane's first chunk in the part that it holds, and of the part
    Real s[kChunks][kChunk], t[kChunks][kChunk];
    const auto load = [&](int64_t part) {
      const View view = View::of(call, row, part, kPart);
      at = view.begin + lane * kChunk;
      columns = view.columns;
      Chunks<Student, kChunks, kChunk> of_s{view.s, at, kLanes * kChunk, columns, view.s_alike, {}};
      Chunks<Teacher, kChunks, kChunk> of_t{view.t, at, kLanes * kChunk, columns, view.t_alike, {}};
      of_s.ask(), of_t.ask();
      of_s.widen_to(s), of_t.widen_to(t);
    };
    const auto state_of = [&](const Real(&z)[kChunks][kChunk]) {
      auto state = LogSumExp<Math>::init();
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) state.maximum = Math::larger(z[j][i], state.maximum);
      }
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (at + j * kLanes * kChunk >= columns) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) state.sum += reducer.add(z[j][i], state.maximum);
      }
      return state;
    };
    int64_t parts = 1;
    if constexpr (kLanes > 32) parts = (call.columns + View::of(call, row, 0, kPart).past + kPart - 1) / kPart;
    auto s_state = LogSumExp<Math>::init(), t_state = LogSumExp<Math>::init();
    for (int64_t part = 0; part < parts; ++part) {
      load(part);
      s_state = reducer.merge(s_state, state_of(s));
      t_state = reducer.merge(t_state, state_of(t));
    }
    Real maxima[2] = {s_state.maximum, t_state.maximum};
    over_group<kLanes>(maxima, words, larger);
    Real sums[2] = {reducer.merge(s_state, {maxima[0], Real(0)}).sum, reducer.merge(t_state, {maxima[1], Real(0)}).sum};
    over_group<kLanes>(sums, words, sum);

    Shares<Math> shares{Softmax<Math>::of({maxima[0], sums[0]}), Softmax<Math>::of({maxima[1], sums[1]}), Real(0)};
    if (sums[1] == Real(0)) shares.student.reciprocal = Real(0);
    shares.log_sums = Divergence<Math>::log_sums(shares.teacher, shares.student);
    double terms = 0;  // of parts that may be many: there is no logarithm to forgive it
    for (int64_t part = parts - 1; part >= 0; --part) {
      if (part < parts - 1) load(part);
      Real of_part = 0;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (at + j * kLanes * kChunk >= columns) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) of_part += shares.of(divergence, s[j][i], t[j][i], Divergence<Math>::term);
      }
      terms += double(of_part);
    }
    Real total[1] = {Real(terms)};
    over_group<kLanes>(total, words, sum);
    if (real && lane == 0) {
      static_cast<Real*>(call.value)[row] = Real(call.temperature * call.temperature * double(total[0]));
      Real* saved = static_cast<Real*>(call.shares) + 4 * row;
      saved[0] = shares.student.maximum, saved[1] = shares.student.reciprocal;
      saved[2] = shares.teacher.maximum, saved[3] = shares.teacher.reciprocal;
    }
  }
}

// The student's gradient, both rows read once: `parts` of kLanes * kChunks chunks a row, each by kLanes lanes.
template <class Math, class Student, class Teacher, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    distillation_gradient(const DistillCall call, const Divergence<Math> divergence, int64_t rows, int64_t parts) {
  using Real = typename Math::Real;
  using View = PairView<Student, Teacher>;
  constexpr int kChunk = View::kChunk;
  constexpr int kGroups = kThreads / kLanes;
  const int64_t step = int64_t(gridDim.x) * kGroups;
  for (int64_t item = int64_t(blockIdx.x) * kGroups + int(threadIdx.x) / kLanes; item < rows * parts; item += step) {
    const int64_t row = parts == 1 ? item : item / parts;  // a division of 64 bits costs as much as a chunk
    const View view = View::of(call, row, item - row * parts, kLanes * kChunks * kChunk);
    Student* grad = static_cast<Student*>(call.grad_student) + row * call.columns;
    const bool grad_alike = elements_past_boundary(grad) == view.past % View::kOfStudent;
    grad += view.first;
    const int begin = view.begin + int(threadIdx.x) % kLanes * kChunk;

    Real s[kChunks][kChunk], t[kChunks][kChunk];
    Chunks<Student, kChunks, kChunk> of_s{view.s, begin, kLanes * kChunk, view.columns, view.s_alike, {}};
    Chunks<Teacher, kChunks, kChunk> of_t{view.t, begin, kLanes * kChunk, view.columns, view.t_alike, {}};
    of_s.ask(), of_t.ask();
    of_s.widen_to(s), of_t.widen_to(t);
    const Real* saved = static_cast<const Real*>(call.shares) + 4 * row;
    Shares<Math> shares{{saved[0], saved[1]}, {saved[2], saved[3]}, Real(0)};
    shares.log_sums = Divergence<Math>::log_sums(shares.teacher, shares.student);
    const Real scale = Real(call.temperature) * static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int at = begin + j * kLanes * kChunk;
      if (at >= view.columns) continue;
#pragma unroll
      for (int within = 0; within < kChunk; within += View::kOfStudent) {
        Real slopes[View::kOfStudent];
#pragma unroll
        for (int i = 0; i < View::kOfStudent; ++i) {
          slopes[i] = scale * shares.of(divergence, s[j][within + i], t[j][within + i], Divergence<Math>::slope);
        }
        store_elements(grad, at + within, view.columns, grad_alike, slopes);
      }
    }
  }
}

}  // namespace oodkern::device
