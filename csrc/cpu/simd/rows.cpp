// The CPU row engine: a row is read from memory once, in blocks that stay in the first-level cache,
// and is reduced, or turned into a gradient, on the way. The double backward goes over a row twice and
// finds it in cache the second time, unless it is longer than that. Compiled once per instruction set.
#include "../rows.h"
#include "blocks.h"

namespace oodkern::OODKERN_ISA {
namespace {

template <class Reducer, class Stored>
void forward(const Reducer& reducer, const RowCall& call, int64_t begin, int64_t end) {
  using Real = typename Reducer::Real;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* z = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    auto state = Reducer::init();
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      if constexpr (kCostlyLoad<Stored>) {
        alignas(64) Real buffer[kBlock];
        state = reducer.merge(state, reduce_block(reducer, widen(z + at, size, buffer), size));
      } else {
        state = reducer.merge(state, reduce_block(reducer, z + at, size));
      }
    }
    static_cast<Real*>(call.score)[row] = Real(call.sign) * reducer.value(state);
  }
}

template <class Reducer, class Stored>
void backward(const Reducer& reducer, const RowCall& call, int64_t begin, int64_t end) {
  using Real = typename Reducer::Real;
  alignas(64) Real z_buffer[kBlock];
  alignas(64) Real grad_buffer[kBlock];
  const Real sign = Real(call.sign);
  for (int64_t row = begin; row < end; ++row) {
    const Stored* z_row = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    Stored* grad_row = static_cast<Stored*>(call.grad_logits) + row * call.columns;
    const Real value = sign * static_cast<const Real*>(call.saved_score)[row * call.saved_score_stride];
    const Real scale = sign * static_cast<const Real*>(call.grad_score)[row * call.grad_score_stride];
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      const Real* z = widen(z_row + at, size, z_buffer);
      Real* grad = target(grad_row + at, grad_buffer);
      slopes(reducer, z, size, value, scale, grad);
      narrow(grad, size, grad_row + at);
    }
  }
}

// The backward pass is grad = sign g slope(z). For a cotangent t of it:
//   d/dg   sum_k t_k grad_k = sign u,  u = sum_k t_k slope_k
//   d/dz_k sum_j t_j grad_j = sign g curvature_k
// u must be complete before the first curvature is written.
template <class Reducer, class Stored>
void double_backward(const Reducer& reducer, const RowCall& call, int64_t begin, int64_t end) {
  using Real = typename Reducer::Real;
  alignas(64) Real z_buffer[kBlock];
  alignas(64) Real t_buffer[kBlock];
  alignas(64) Real grad_buffer[kBlock];
  const Real sign = Real(call.sign);
  for (int64_t row = begin; row < end; ++row) {
    const Stored* z_row = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    const Stored* t_row = static_cast<const Stored*>(call.cotangent) + row * call.cotangent_stride;
    Stored* grad_row = static_cast<Stored*>(call.grad_logits) + row * call.columns;
    const Real value = sign * static_cast<const Real*>(call.saved_score)[row * call.saved_score_stride];
    const Real scale = sign * static_cast<const Real*>(call.grad_score)[row * call.grad_score_stride];
    typename Reducer::Sum total = 0;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      const Real* z = widen(z_row + at, size, z_buffer);
      const Real* t = widen(t_row + at, size, t_buffer);
      Real part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t k = 0; k < size; ++k) part += t[k] * reducer.slope(z[k], value);
      total += part;
    }
    const Real u = Real(total);
    static_cast<Real*>(call.grad_grad_score)[row] = sign * u;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = call.columns - at < kBlock ? call.columns - at : kBlock;
      const Real* z = widen(z_row + at, size, z_buffer);
      const Real* t = widen(t_row + at, size, t_buffer);
      Real* grad = target(grad_row + at, grad_buffer);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) grad[k] = scale * reducer.curvature(z[k], value, t[k], u);
      narrow(grad, size, grad_row + at);
    }
  }
}

template <template <class> class Reducer, class Math, class Stored>
void run(const RowCall& call, int64_t begin, int64_t end) {
  const Reducer<Math> reducer{call.temperature};
  switch (call.pass) {
    case Pass::kForward: return forward<Reducer<Math>, Stored>(reducer, call, begin, end);
    case Pass::kBackward: return backward<Reducer<Math>, Stored>(reducer, call, begin, end);
    case Pass::kDoubleBackward: return double_backward<Reducer<Math>, Stored>(reducer, call, begin, end);
  }
}

template <template <class> class Reducer>
void run(const RowCall& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kFloat64: return run<Reducer, Double, double>(call, begin, end);
    case Storage::kFloat32: return run<Reducer, Float, float>(call, begin, end);
    case Storage::kBFloat16: return run<Reducer, Float, BFloat16>(call, begin, end);
    case Storage::kFloat16: return run<Reducer, Float, Float16>(call, begin, end);
  }
}

}  // namespace

void run_rows(const RowCall& call, int64_t begin, int64_t end) {
  switch (call.reduction) {
    case Reduction::kLogSumExp: return run<LogSumExp>(call, begin, end);
    case Reduction::kSoftplusSum: return run<SoftplusSum>(call, begin, end);
    case Reduction::kAbsSum: return run<AbsSum>(call, begin, end);
    case Reduction::kNorm: return;  // has an engine of its own (cpu/norm.h)
  }
}

}  // namespace oodkern::OODKERN_ISA
