// The vocabulary of row reductions, shared by every engine, host and device.
//
// A reducer says how one row of numbers becomes one number, and how that number moves with them:
//   State               what a partly read row has come to
//   init()              the state of a row of which nothing was read
//   absent()            an element that adds nothing, which engines read where a row has none
//   pivot(z, p)         the running pivot after z; kPivot says whether the reducer needs one at all
//   add(z, pivot)       what an element adds to the sum of a block that is read against `pivot`
//   merge(a, b)         the state of two parts of a row
//   value(state)        the reduction
//   slope(z, value)     d value / d z of one element
//   curvature(z, value, t, u)   sum_j t_j d^2 value / (dz dz_j), given u = sum_j t_j slope_j
//
// `Math` brings the types and the transcendental functions of the engine that instantiates the
// reducer: Real, in which elements are computed (a vectorisable polynomial on the CPU, an instruction
// on a GPU), and Sum, in which the parts of a row are added up. A million terms that are added in
// float32 one block after another lose two digits, so the CPU's Sum is double: once a block, for nothing.
#pragma once

#if defined(__CUDACC__)
#define OODKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OODKERN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace oodkern {

// T log sum_k exp(z_k / T).
// The pivot keeps exp in range; it is finite by construction (an infinite maximum is replaced by 0),
// so a row of all -inf sums to 0 and gives -inf, a row that holds +inf sums to +inf, and a NaN,
// which no comparison selects as the pivot, still reaches the sum.
template <class Math>
struct LogSumExp {
  using Real = typename Math::Real;
  using Arithmetic = Math;
  using Sum = typename Math::Sum;
  static constexpr bool kPivot = true;
  struct State {
    Real maximum;
    Sum sum;
  };

  Real temperature;
  Real inverse_temperature;
  Real scale;  // log2(e) / T: exp(x / T) = 2^(scale x) spares the kernels a multiplication

  explicit OODKERN_HOST_DEVICE LogSumExp(double t)
      : temperature(Real(t)), inverse_temperature(Real(1 / t)), scale(Real(1.4426950408889634 / t)) {}
  static OODKERN_HOST_DEVICE State init() { return {-Math::infinity(), Sum(0)}; }
  static OODKERN_HOST_DEVICE Real absent() { return -Math::infinity(); }
  static OODKERN_HOST_DEVICE Real pivot(Real z, Real running) { return z > running ? z : running; }
  static OODKERN_HOST_DEVICE Real finite(Real maximum) {
    return Math::absolute(maximum) == Math::infinity() ? Real(0) : maximum;
  }
  OODKERN_HOST_DEVICE Real add(Real z, Real maximum) const { return Math::exp2((z - finite(maximum)) * scale); }
  OODKERN_HOST_DEVICE State merge(State a, State b) const {
    const Real maximum = pivot(a.maximum, b.maximum);
    const Sum sum_a = a.sum == Sum(0) ? Sum(0) : a.sum * add(finite(a.maximum), maximum);
    const Sum sum_b = b.sum == Sum(0) ? Sum(0) : b.sum * add(finite(b.maximum), maximum);
    return {maximum, sum_a + sum_b};
  }
  OODKERN_HOST_DEVICE Real value(State s) const { return finite(s.maximum) + temperature * Real(Math::log(s.sum)); }
  // softmax_k = exp((z_k - value) / T); a row of all -inf has no slope.
  OODKERN_HOST_DEVICE Real slope(Real z, Real value) const {
    return value == -Math::infinity() ? Real(0) : Math::exp2((z - value) * scale);
  }
  // d^2 value / (dz_k dz_j) = p_k (delta_kj - p_j) / T
  OODKERN_HOST_DEVICE Real curvature(Real z, Real value, Real t, Real u) const {
    return slope(z, value) * (t - u) * inverse_temperature;
  }
};

// sum_k log(1 + exp(z_k)), as max(z, 0) + log1p(exp(-|z|)): finite wherever z is, and relatively
// exact where log(1 + exp(z)) would round to 0, down to the smallest normal number (z > -87 in float32).
template <class Math>
struct SoftplusSum {
  using Real = typename Math::Real;
  using Arithmetic = Math;
  using Sum = typename Math::Sum;
  static constexpr bool kPivot = false;
  struct State {
    Real maximum;  // unused: one layout for every reducer keeps the engine free of special cases
    Sum sum;
  };

  explicit OODKERN_HOST_DEVICE SoftplusSum(double) {}
  static OODKERN_HOST_DEVICE State init() { return {Real(0), Sum(0)}; }
  static OODKERN_HOST_DEVICE Real absent() { return -Math::infinity(); }
  static OODKERN_HOST_DEVICE Real pivot(Real, Real) { return Real(0); }
  OODKERN_HOST_DEVICE Real add(Real z, Real) const {
    const Real positive = z < Real(0) ? Real(0) : z;  // a NaN stays
    return positive + Math::log1p_unit(Math::exp_of_negative(-Math::absolute(z)));
  }
  OODKERN_HOST_DEVICE State merge(State a, State b) const { return {Real(0), a.sum + b.sum}; }
  OODKERN_HOST_DEVICE Real value(State s) const { return Real(s.sum); }
  // sigmoid(z); both branches of the usual split share the one exponential of -|z|.
  OODKERN_HOST_DEVICE Real slope(Real z, Real) const {
    const Real e = Math::exp_of_negative(-Math::absolute(z));
    return (z < Real(0) ? e : Real(1)) / (Real(1) + e);
  }
  // sigmoid (1 - sigmoid) = e / (1 + e)^2, which does not cancel at either end; rows are diagonal.
  OODKERN_HOST_DEVICE Real curvature(Real z, Real, Real t, Real) const {
    const Real e = Math::exp_of_negative(-Math::absolute(z));
    return t * e / ((Real(1) + e) * (Real(1) + e));
  }
};

// sqrt(sum_k z_k^2), 0 slope and curvature where that is 0.
//
// Squares leave the range of numbers where their root does not. So what is squared is z_k over 2^n, the power of 2 at
// or below the largest element (kept where its inverse is a normal number, too): exact but for elements too small to
// count. The slope z / value is likewise a product of numbers near 1, though 1 / value may be none that is normal.
template <class Math>
struct Norm {
  using Real = typename Math::Real;
  using Sum = typename Math::Sum;
  static constexpr bool kPivot = true;
  struct State {
    Real maximum;  // of |z_k|
    Sum sum;       // of (z_k / 2^n)^2
  };

  explicit OODKERN_HOST_DEVICE Norm(double) {}

  static OODKERN_HOST_DEVICE State init() { return {Real(0), Sum(0)}; }
  static OODKERN_HOST_DEVICE Real absent() { return Real(0); }
  static OODKERN_HOST_DEVICE Real pivot(Real z, Real running) {
    const Real size = Math::absolute(z);
    return size > running ? size : running;
  }
  OODKERN_HOST_DEVICE Real add(Real z, Real maximum) const {
    const Real scaled = z * Math::inverse_power(maximum);
    return scaled * scaled;
  }
  OODKERN_HOST_DEVICE State merge(State a, State b) const {
    const Real maximum = pivot(a.maximum, b.maximum);
    const Real inverse = Math::inverse_power(maximum);
    const Real to_a = Math::power(a.maximum) * inverse, to_b = Math::power(b.maximum) * inverse;
    return {maximum, a.sum * (to_a * to_a) + b.sum * (to_b * to_b)};
  }
  OODKERN_HOST_DEVICE Real value(State s) const { return Math::root(s.sum) * Math::power(s.maximum); }
  // 2^n / value; with it and 2^-n every number in between is in range.
  static OODKERN_HOST_DEVICE Real reciprocal(Real value) {
    return value == Real(0) ? Real(0) : Real(1) / (value * Math::inverse_power(value));
  }
  OODKERN_HOST_DEVICE Real slope(Real z, Real value) const {
    return z * Math::inverse_power(value) * reciprocal(value);
  }
  // d^2 value / (dz_k dz_j) = (delta_kj - slope_k slope_j) / value
  OODKERN_HOST_DEVICE Real curvature(Real z, Real value, Real t, Real u) const {
    return (t - slope(z, value) * u) * reciprocal(value) * Math::inverse_power(value);
  }
};

// softplus(z) - y z of a logit and its label y in [0, 1], given e = exp(-|z|): max(z, 0) - y z is |z| times 1 - y or y,
// so that labels of 0 and 1 leave nothing to cancel, in the value or in the slope sigmoid(z) - y, and an infinite logit
// on its label's side counts 0.
template <class Math>
struct BinaryEntropy {
  using Real = typename Math::Real;

  static OODKERN_HOST_DEVICE Real exponential(Real z) { return Math::exp_of_negative(-Math::absolute(z)); }
  static OODKERN_HOST_DEVICE Real term(Real z, Real y, Real e) {
    const Real weight = z > Real(0) ? Real(1) - y : y;
    const Real linear = weight == Real(0) ? Real(0) : Math::absolute(z) * weight;
    return linear + Math::log1p_unit(e);
  }
  static OODKERN_HOST_DEVICE Real slope(Real z, Real y, Real e) {
    const bool positive = z > Real(0);
    const Real above = positive ? Real(1) : e;  // sigmoid(z) (1 + e)
    const Real below = positive ? e : Real(1);  // sigmoid(-z) (1 + e)
    return ((Real(1) - y) * above - y * below) / (Real(1) + e);
  }
};

// Whether an upstream is what was foreseen, up to a rounding on each side, such as that of weight / N.
template <class Real>
OODKERN_HOST_DEVICE bool is_foreseen(Real upstream, Real foreseen) {
  constexpr Real kRoundings = sizeof(Real) == 8 ? Real(0x1p-51) : Real(0x1p-22);
  const Real off = upstream - foreseen, allowed = kRoundings * (foreseen < Real(0) ? -foreseen : foreseen);
  return off <= allowed && -off <= allowed;
}

// sum_k |z_k|; the slope at 0 is 0.
template <class Math>
struct AbsSum {
  using Real = typename Math::Real;
  using Arithmetic = Math;
  using Sum = typename Math::Sum;
  static constexpr bool kPivot = false;
  struct State {
    Real maximum;  // unused, as in SoftplusSum
    Sum sum;
  };

  explicit OODKERN_HOST_DEVICE AbsSum(double) {}
  static OODKERN_HOST_DEVICE State init() { return {Real(0), Sum(0)}; }
  static OODKERN_HOST_DEVICE Real pivot(Real, Real) { return Real(0); }
  OODKERN_HOST_DEVICE Real add(Real z, Real) const { return Math::absolute(z); }
  OODKERN_HOST_DEVICE State merge(State a, State b) const { return {Real(0), a.sum + b.sum}; }
  OODKERN_HOST_DEVICE Real value(State s) const { return Real(s.sum); }
  OODKERN_HOST_DEVICE Real slope(Real z, Real) const { return z > Real(0) ? Real(1) : z < Real(0) ? Real(-1) : z; }
  OODKERN_HOST_DEVICE Real curvature(Real, Real, Real, Real) const { return Real(0); }
};

// A row's softmax by two numbers: p_k = exp((z_k - maximum) / T) reciprocal, where exp((z_k - logsumexp) / T) would err
// by the rounding of a logsumexp as large as the logits. A row of all -inf has p = 0.
template <class Math>
struct Softmax {
  using Real = typename Math::Real;

  Real maximum;
  Real reciprocal;

  static OODKERN_HOST_DEVICE Softmax of(typename LogSumExp<Math>::State state) {
    return {LogSumExp<Math>::finite(state.maximum), state.sum == 0 ? Real(0) : Real(1 / state.sum)};
  }
  // scale is log2(e) / T.
  OODKERN_HOST_DEVICE Real probability(Real z, Real scale) const {
    return Math::exp2((z - maximum) * scale) * reciprocal;
  }
};

// (exp(x) - 1 - x) / x^2 for |x| <= 1, where the difference as written keeps nothing of a small x. Minimax fit with
// relative error 4.3e-9; in float64 its Taylor series, whose next term is 2e-17 of it.
OODKERN_HOST_DEVICE float exponential_remainder(float x) {
  float q = 2.77228355e-06f;
  q = q * x + 2.53548296e-05f;
  q = q * x + 1.98440233e-04f;
  q = q * x + 1.38854515e-03f;
  q = q * x + 8.33331048e-03f;
  q = q * x + 4.16667350e-02f;
  q = q * x + 1.66666672e-01f;
  return q * x + 0.5f;
}
OODKERN_HOST_DEVICE double exponential_remainder(double x) {
  double q = 1.0;
  for (int n = 19; n > 2; --n) q = 1.0 + q * x / n;
  return 0.5 * q;
}

// T^2 KL(p || q) of p = softmax(t / T) and q = softmax(s / T), the softmaxes of a teacher's and of a student's row.
//
// With u_k = log(p_k / q_k) it is the sum of p_k u_k, whose terms have both signs and cancel: near p = q it is of
// second order in u, and they are of first. The shares sum to 1, so that sum_k (q_k - p_k + p_k u_k) is the same
// number. There no term is negative, each is p_k u_k^2 / 2 for small u_k, and the derivative in log q_k is q_k - p_k,
// which sums to 0: an error in a normaliser, common to a row, counts to second order. Equal rows give exactly 0.
//
// p_k = 0 leaves q_k whatever u_k is, p_k > 0 = q_k gives +inf. A teacher's row of all -inf teaches nothing: all shares
// of both rows count as 0, and so do the value and the gradient.
template <class Math>
struct Divergence {
  using Real = typename Math::Real;
  using Sum = typename Math::Sum;
  using Row = Softmax<Math>;

  Real inverse_temperature;
  Real scale;  // log2(e) / T

  explicit OODKERN_HOST_DEVICE Divergence(double t)
      : inverse_temperature(Real(1 / t)), scale(Real(1.4426950408889634 / t)) {}

  // The logarithm of the teacher's sum over the student's; 0 where there is none.
  static OODKERN_HOST_DEVICE Real log_sums(Row teacher, Row student) {
    if (teacher.reciprocal == student.reciprocal || teacher.reciprocal == 0 || student.reciprocal == 0) return Real(0);
    return Real(Math::log(Sum(student.reciprocal)) - Math::log(Sum(teacher.reciprocal)));
  }
  // u_k
  OODKERN_HOST_DEVICE Real log_ratio(Real t, Real s, Row teacher, Row student, Real log_sums) const {
    return ((t - teacher.maximum) - (s - student.maximum)) * inverse_temperature - log_sums;
  }
  static OODKERN_HOST_DEVICE Real term(Real p, Real q, Real u) {
    const Real near = p * (u * u) * exponential_remainder(-u);
    const Real far = q - p + p * u;
    const Real finite = Math::absolute(u) < Real(1) ? near : far;
    return p == Real(0) ? q : finite;
  }
  // d (T^2 KL) / d s_k, over T: q - p, as p (exp(-u) - 1) where that cancels.
  static OODKERN_HOST_DEVICE Real slope(Real p, Real q, Real u) {
    const Real near = -p * (u - u * u * exponential_remainder(-u));
    return Math::absolute(u) < Real(1) ? near : q - p;
  }
};

// The largest element and its place, the first of equals: a block's two steps, since the place is needed once a block.
template <class Real>
struct ArgMax {
  struct State {
    Real maximum;
    long long index;  // -1: nothing read yet
  };
  static OODKERN_HOST_DEVICE State init(Real lowest) { return {lowest, -1}; }
  static OODKERN_HOST_DEVICE Real pivot(Real z, Real running) { return z > running ? z : running; }
  // `b` was read after `a`, so it wins by being larger, not by being equal.
  static OODKERN_HOST_DEVICE State merge(State a, State b) {
    return a.index < 0 || (b.index >= 0 && b.maximum > a.maximum) ? b : a;
  }
};

}  // namespace oodkern
