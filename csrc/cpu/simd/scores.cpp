// logsumexp, the sum of softplus, the maximum and its place of a tile's rows, of one exponential an element.
// Compiled once per instruction set.
//
// With m the largest element of a block, e_k = exp(z_k - m) is what logsumexp adds up, and exp(z_k) = e_k exp(m). For
// the sum of softplus the logarithm is taken of products of several 1 + exp(z_k), held as q = product - 1, so that
//
//     q <- q + t + q t,    t = exp(z_k),    sum_k softplus(z_k) = sum of log(1 + q)
//
// keeps all digits of logits that are so negative that 1 + t is 1. How many a product takes depends on m: it has to
// stay in range. What is not usual (m near the ends of the range of exp, infinite, or a NaN among the logits) is
// reduced as elsewhere.
#include "tile_rows.h"

namespace oodkern::OODKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = int32_t __attribute__((vector_size(4 * kLanes)));

constexpr float kLowest = -80, kHighest = 42;  // of m: two factors of 1 + exp(m) are in range

struct Block {
  float sum;       // of e_k
  float softplus;  // of softplus(z_k)
};

OODKERN_INLINE void read(const float* from, Lanes& to) {
  __builtin_memcpy(&to, from, sizeof to);
}
// The last ones, of which `left` are there; the others count as -inf.
OODKERN_INLINE void read_last(const float* from, int64_t left, Lanes& to) {
  Words place;
  for (int i = 0; i < kLanes; ++i) place[i] = i;
  read(from, to);
  to = place < int32_t(left) ? to : Lanes{} - Float::infinity();
}
OODKERN_INLINE float sum_of(const Lanes& lanes) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// A NaN is passed over.
OODKERN_INLINE float largest(const float* z, int64_t size) {
  constexpr int kChains = 4;
  Lanes running[kChains], next;
  for (Lanes& chain : running) chain = Lanes{} - Float::infinity();
  int64_t at = 0;
  for (; at + kChains * kLanes <= size; at += kChains * kLanes) {
    for (int i = 0; i < kChains; ++i) {
      read(z + at + i * kLanes, next);
      running[i] = next > running[i] ? next : running[i];
    }
  }
  for (; at < size; at += kLanes) {
    read_last(z + at, size - at, next);
    running[0] = next > running[0] ? next : running[0];
  }
  for (int i = 1; i < kChains; ++i) running[0] = running[i] > running[0] ? running[i] : running[0];
  float maximum = -Float::infinity();
#pragma omp simd reduction(max : maximum)
  for (int i = 0; i < kLanes; ++i) maximum = running[0][i] > maximum ? running[0][i] : maximum;
  return maximum;
}

// Float::exp2 of what is not positive.
OODKERN_INLINE void exp2_of_negative(Lanes& x) {
  const Lanes clamped = x < -127.0f ? Lanes{} - 127.0f : x;
  const Lanes shifted = clamped + Float::kRound;
  const Lanes r = clamped - (shifted - Float::kRound);
  Lanes q = r * 1.32646640e-03f + 9.67152705e-03f;
  q = q * r + 5.55073432e-02f;
  q = q * r + 2.40222420e-01f;
  q = q * r + 6.93146983e-01f;
  x = (q * r + 1.0f) * (Lanes)((Words)shifted << 23);
}

// log(1 + q) for q >= 0, to the rounding of its own: with 1 + q = 2^n (1 + f), |s| < 0.18 in 2 atanh(s) = log(1 + f),
// s = f / (2 + f), for which Float::log1p_unit has the series; f is q itself where n is 0.
OODKERN_INLINE void log1p(Lanes& q) {
  const Words bits = (Words)(q + 1.0f);
  const Words n = (bits - 0x3f3504f3) >> 23;  // 1 + f in [0.7071, 1.4142)
  const Lanes f = n == 0 ? q : (Lanes)(bits - (n << 23)) - 1.0f;
  const Lanes s = f / (f + 2.0f), s2 = s * s;
  Lanes p = s2 * 1.4006333e-1f + 1.4000839e-1f;
  p = p * s2 + 2.0010767e-1f;
  p = p * s2 + 3.3333208e-1f;
  q = __builtin_convertvector(n, Lanes) * 0.693147181f + 2.0f * (s + s * s2 * p);
}

// Of a block whose largest element is `maximum`, within the usual.
template <int kFactors>
OODKERN_INLINE Block reduced(const float* z, int64_t size, float maximum) {
  constexpr float kScale = 1.4426950408889634f;
  const float power = Float::exp(maximum);
  Lanes sum{}, softplus{}, e, q{};
  const auto add = [&]() __attribute__((always_inline)) {
    e = (e - maximum) * kScale;
    exp2_of_negative(e);
    sum += e;
    const Lanes t = e * power;
    q = q * t + (q + t);
  };
  int64_t at = 0;
  for (; at + kFactors * kLanes <= size; at += kFactors * kLanes) {
    q = Lanes{};
#pragma GCC unroll 8
    for (int i = 0; i < kFactors; ++i) {
      read(z + at + i * kLanes, e);
      add();
    }
    log1p(q);
    softplus += q;
  }
  if (at < size) {
    q = Lanes{};
    for (; at < size; at += kLanes) {
      read_last(z + at, size - at, e);
      add();
    }
    log1p(q);
    softplus += q;
  }
  return {sum_of(sum), sum_of(softplus)};
}

// The first place of a number that is there.
OODKERN_INLINE int64_t place_of(float number, const float* z) {
  int64_t at = 0;
#if defined(__AVX512F__)
  for (;; at += kLanes) {
    const unsigned equal = _mm512_cmp_ps_mask(_mm512_loadu_ps(z + at), _mm512_set1_ps(number), _CMP_EQ_OQ);
    if (equal) return at + __builtin_ctz(equal);
  }
#else
  while (z[at] != number) ++at;
  return at;
#endif
}

}  // namespace

void scores(const Tile& tile, int64_t first_column, RowState* lse, RowState* softplus, Best* best) {
  const LogSumExp<Float> of_lse{1.0};
  const SoftplusSum<Float> of_softplus{0.0};
  if (tile.wide) {
    reduce(tile, {Reduction::kLogSumExp, 1.0}, lse);
    reduce(tile, {Reduction::kSoftplusSum, 1.0}, softplus);
    oodkern::OODKERN_ISA::best(tile, first_column, best);
    return;
  }
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t at = 0; at < tile.columns; at += kBlock) {
      const float* z = row_of<float>(tile, row) + at;
      const int64_t size = block_size(tile.columns, at);
      const float maximum = largest(z, size);
      if (maximum > kLowest && maximum < kHighest) {
        const Block block = maximum < 10   ? reduced<8>(z, size, maximum)
                            : maximum < 21 ? reduced<4>(z, size, maximum)
                                           : reduced<2>(z, size, maximum);
        if (block.sum == block.sum) {
          const bool first = lse[row].sum == 0;
          lse[row] = first ? RowState{maximum, block.sum} : merged(of_lse, lse[row], {maximum, block.sum});
          softplus[row].sum += block.softplus;
          if (best[row].index < 0 || maximum > best[row].maximum) {
            best[row] = {maximum, first_column + at + place_of(maximum, z)};
          }
          continue;
        }
      }
      lse[row] = merged(of_lse, lse[row], reduce_block(of_lse, z, size));
      softplus[row] = merged(of_softplus, softplus[row], reduce_block(of_softplus, z, size));
      const Tile block{false, 1, size, const_cast<float*>(z), tile.stride};
      best_of_row(Float{}, block, 0, first_column + at, best + row);
    }
  }
}

}  // namespace oodkern::OODKERN_ISA
