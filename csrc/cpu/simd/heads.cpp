// The engine of the training heads: a row's loss, and its slope while the row is in cache. Compiled once per
// instruction set.
#include "../heads.h"
#include "blocks.h"

namespace oodkern::OODKERN_ISA {
namespace {

OODKERN_INLINE int64_t block_size(const HeadCall& call, int64_t at) {
  return call.columns - at < kBlock ? call.columns - at : kBlock;
}

template <class Stored, class Real>
OODKERN_INLINE void convert(const void* row, int64_t at, int64_t size, Real* buffer) {
  const Stored* y = static_cast<const Stored*>(row) + at;
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) buffer[k] = Real(y[k]);
}

// Row `row` of the targets, a block of it as Real.
template <class Real>
OODKERN_INLINE const Real* read_target(const HeadCall& call, int64_t row, int64_t at, int64_t size, Real* buffer) {
  const int64_t first = row * call.target_stride + at;
  const void* y = call.target;
  switch (call.target_storage) {
    case Target::kFloat64: convert<double>(y, first, size, buffer); break;
    case Target::kFloat32: convert<float>(y, first, size, buffer); break;
    case Target::kBFloat16:
      for (int64_t k = 0; k < size; ++k) buffer[k] = Real(load(static_cast<const BFloat16*>(y)[first + k]));
      break;
    case Target::kFloat16:
      for (int64_t k = 0; k < size; ++k) buffer[k] = Real(load(static_cast<const Float16*>(y)[first + k]));
      break;
    case Target::kUint8: convert<uint8_t>(y, first, size, buffer); break;
    case Target::kInt8: convert<int8_t>(y, first, size, buffer); break;
    case Target::kInt16: convert<int16_t>(y, first, size, buffer); break;
    case Target::kInt32: convert<int32_t>(y, first, size, buffer); break;
    case Target::kInt64: convert<int64_t>(y, first, size, buffer); break;
  }
  return buffer;
}

// Whether a row of a gradient that is mended is left as it is.
template <class Real>
OODKERN_INLINE bool is_formed(const HeadCall& call, int64_t row) {
  return call.foreseen && is_foreseen(static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride],
                                      static_cast<const Real*>(call.foreseen)[row * call.foreseen_stride]);
}

// What turns a row's exponentials exp(z_k - maximum) into its gradient, upstream (scale p_k - 1 / K for the uniform
// head, scale p_k for the others): the same numbers whether they were kept or are formed anew.
template <class Real>
struct Slope {
  Real share, shift;

  OODKERN_INLINE Slope(const HeadCall& call, int64_t row, const Real* rows) {
    const Real upstream = static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride];
    share = upstream * rows[2] * rows[1];
    shift = call.head == Head::kUniform ? upstream / Real(call.columns < 1 ? 1 : call.columns) : Real(0);
  }
  OODKERN_INLINE Real operator()(Real e) const { return share * e - shift; }
};

// The heads of a softmax.
template <class Math, class Stored>
void forward(const HeadCall& call, int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  using Reducer = LogSumExp<Math>;
  const Reducer reducer{1.0};
  const double classes = call.columns < 1 ? 1.0 : double(call.columns);
  alignas(64) Real grad_buffer[kBlock];
  const Scratch<Real> kept(call.columns);  // a row's logits as Real, then its exponentials
  for (int64_t row = begin; row < end; ++row) {
    const Stored* z_row = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    const Real* z = widen(z_row, call.columns, kept.data);
    const Real maximum = largest<Math>(z, call.columns);
    typename Reducer::State state{maximum, 0};
    const Real pivot = Reducer::finite(maximum);
    double linear = 0;  // sum of z - pivot
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t end_of_block = at + block_size(call, at);
      Real part = 0;
      if (call.head == Head::kUniform) {
#pragma omp simd reduction(+ : part)
        for (int64_t k = at; k < end_of_block; ++k) part += z[k] - pivot;
      }
      linear += double(part);
      state.sum += exponentials<Math>(z + at, end_of_block - at, pivot, reducer.scale, 1, kept.data + at);
    }
    const auto softmax = Softmax<Math>::of(state);
    const bool none = state.sum == 0;  // a row of all -inf has E = +inf and slope 0
    const double log_sum = none ? 0.0 : double(Math::log(state.sum));
    double value, scale = 1;
    if (call.head == Head::kUniform) {
      value = log_sum - linear / classes;
    } else {
      const double energy = none ? double(Math::infinity()) : -(double(softmax.maximum) + log_sum);
      const double sign = call.head == Head::kEnergyIn ? 1.0 : -1.0;
      const double over = sign * (energy - call.margin);
      const double hinge = over < 0 ? 0.0 : over;  // a NaN stays
      value = hinge * hinge;
      scale = none ? 0.0 : -2.0 * sign * hinge;
    }
    static_cast<Real*>(call.value)[row] = Real(value);
    Real* rows = static_cast<Real*>(call.rows) + 3 * row;
    rows[0] = softmax.maximum, rows[1] = softmax.reciprocal, rows[2] = Real(scale);
    if (!call.grad_logits) continue;
    const Slope<Real> slope(call, row, rows);
    Stored* grad_row = static_cast<Stored*>(call.grad_logits) + row * call.columns;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = block_size(call, at);
      const Real* e = kept.data + at;
      Real* grad = target(grad_row + at, grad_buffer);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) grad[k] = slope(e[k]);
      narrow(grad, size, grad_row + at);
    }
  }
}

template <class Math, class Stored>
void backward(const HeadCall& call, int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  const LogSumExp<Math> reducer{1.0};
  alignas(64) Real z_buffer[kBlock];
  alignas(64) Real grad_buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    if (is_formed<Real>(call, row)) continue;
    const Real* rows = static_cast<const Real*>(call.rows) + 3 * row;
    const Slope<Real> slope(call, row, rows);
    const Stored* z_row = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    Stored* grad_row = static_cast<Stored*>(call.grad_logits) + row * call.columns;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = block_size(call, at);
      const Real* z = widen(z_row + at, size, z_buffer);
      Real* grad = target(grad_row + at, grad_buffer);
      exponentials<Math>(z, size, rows[0], reducer.scale, 1, grad);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) grad[k] = slope(grad[k]);
      narrow(grad, size, grad_row + at);
    }
  }
}

template <class Math, class Stored>
void binary(const HeadCall& call, int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  using Entropy = BinaryEntropy<Math>;
  const Real classes = call.columns < 1 ? Real(1) : Real(call.columns);
  alignas(64) Real z_buffer[kBlock];
  alignas(64) Real y_buffer[kBlock];
  alignas(64) Real e[kBlock];
  alignas(64) Real grad_buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    if (is_formed<Real>(call, row)) continue;
    const Stored* z_row = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    Stored* grad_row = call.grad_logits ? static_cast<Stored*>(call.grad_logits) + row * call.columns : nullptr;
    const Real* upstream = static_cast<const Real*>(call.grad_value);
    const Real scale = grad_row ? upstream[row * call.grad_value_stride] / classes : Real(0);
    double total = 0;
    for (int64_t at = 0; at < call.columns; at += kBlock) {
      const int64_t size = block_size(call, at);
      const Real* z = widen(z_row + at, size, z_buffer);
      const Real* y = read_target(call, row, at, size, y_buffer);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) e[k] = Entropy::exponential(z[k]);
      if (call.value) {
        Real part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t k = 0; k < size; ++k) part += Entropy::term(z[k], y[k], e[k]);
        total += double(part);
      }
      if (grad_row) {
        Real* grad = target(grad_row + at, grad_buffer);
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) grad[k] = scale * Entropy::slope(z[k], y[k], e[k]);
        narrow(grad, size, grad_row + at);
      }
    }
    if (call.value) static_cast<Real*>(call.value)[row] = Real(total / double(classes));
  }
}

template <class Math, class Stored>
void run(const HeadCall& call, int64_t begin, int64_t end) {
  if (call.head == Head::kBinary) return binary<Math, Stored>(call, begin, end);
  return call.value ? forward<Math, Stored>(call, begin, end) : backward<Math, Stored>(call, begin, end);
}

}  // namespace

void run_heads(const HeadCall& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kFloat64: return run<Double, double>(call, begin, end);
    case Storage::kFloat32: return run<Float, float>(call, begin, end);
    case Storage::kBFloat16: return run<Float, BFloat16>(call, begin, end);
    case Storage::kFloat16: return run<Float, Float16>(call, begin, end);
  }
}

}  // namespace oodkern::OODKERN_ISA
