// out [M, N] (+)= A B with float32 sums. Factors are packed in words of 32 bits along the depth, one float32 or two
// neighbouring bfloat16, whose two products one instruction adds to a sum: A in panels of 8 rows, B in panels of 48
// columns. 8 x 48 sums stay in registers (24 of 32) while the depth of a panel is gone through.
#include "products.h"

#if defined(OODKERN_X86_64)
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#define OODKERN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define OODKERN_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
// Which of the two an instruction set's template needs is its argument's affair: inlined, it takes the caller's.
#define OODKERN_INLINED inline __attribute__((always_inline))
#endif

namespace oodkern {

#if defined(OODKERN_X86_64)

namespace {

bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned out[4];
  return __get_cpuid_count(leaf, subleaf, &out[0], &out[1], &out[2], &out[3]) && ((out[reg] >> bit) & 1);
}
// The operating system's consent to the registers comes with the others of AVX-512.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

constexpr int kRows = 8, kColumns = 48;
// In words: a block of A (512 KiB) and one of B (240 KiB) stay in the second-level cache, a panel of A in the first.
constexpr int64_t kBlockM = 512, kBlockN = 240, kWords = 256;

template <class Number>
constexpr int64_t kPerWord = 4 / sizeof(Number);

// 16 x 16 words, transposed in registers.
OODKERN_AVX512 OODKERN_INLINED void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 16 numbers of a row that are within it, zero beyond: one a word, or the even and the odd row's paired.
OODKERN_AVX512 OODKERN_INLINED __m512i words(const float* row, __mmask16 mask, const float*, __mmask16) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, row));
}
OODKERN_AVX512 OODKERN_INLINED __m512i words(const uint16_t* row, __mmask16 mask, const uint16_t* odd,
                                             __mmask16 odd_mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_mask, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// Up to 16 words of neighbours along the depth, of which `left` numbers are there.
OODKERN_AVX512 OODKERN_INLINED __m512i along(const float* row, int64_t left) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(left >= 16 ? 0xffff : (1u << left) - 1, row));
}
OODKERN_AVX512 OODKERN_INLINED __m512i along(const uint16_t* row, int64_t left) {
  return _mm512_maskz_loadu_epi16(left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1, row);
}

// 16 neighbours' words at one place of the depth go to panels [width / panel][words][panel].
OODKERN_AVX512 OODKERN_INLINED void put(uint32_t* out, int64_t words, int panel, int64_t at, int64_t word,
                                        __m512i sixteen) {
  if (panel == kColumns) {
    _mm512_storeu_si512(out + (at / kColumns * words + word) * kColumns + at % kColumns, sixteen);
    return;
  }
  uint32_t* first = out + (at / kRows * words + word) * kRows;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(sixteen));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + words * kRows), _mm512_extracti64x4_epi64(sixteen, 1));
}

// Packs `width` rows (of A) or columns (of B) of `depth` numbers, in memory `stride` apart where neighbours along the
// depth are neighbours there, and else the other way round.
template <class Number>
OODKERN_AVX512 void pack(const Number* from, int64_t stride, bool neighbours, int64_t width, int64_t depth, int panel,
                         uint32_t* out) {
  constexpr int64_t per = kPerWord<Number>;
  const int64_t count = (depth + per - 1) / per, padded = (width + panel - 1) / panel * panel;
  for (int64_t at = 0; at < padded; at += 16) {
    const int64_t here = std::clamp<int64_t>(width - at, 0, 16);
    if (neighbours) {
      for (int64_t word = 0; word < count; word += 16) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) {
          v[i] = i < here ? along(from + (at + i) * stride + per * word, depth - per * word) : _mm512_setzero_si512();
        }
        transpose(v);
        for (int i = 0; i < 16 && word + i < count; ++i) put(out, count, panel, at, word + i, v[i]);
      }
      continue;
    }
    const __mmask16 mask = __mmask16((1u << here) - 1);
    for (int64_t word = 0; word < count; ++word) {
      const Number* row = from + per * word * stride + at;
      const bool paired = per * word + 1 < depth;
      put(out, count, panel, at, word, words(row, mask, paired ? row + stride : row, paired ? mask : __mmask16(0)));
    }
  }
}

OODKERN_BF16 OODKERN_INLINED __m512 add_product(__m512 sum, __m512i a, __m512i b, uint16_t) {
  return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
}
OODKERN_AVX512 OODKERN_INLINED __m512 add_product(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

template <class Number, int Rows>
OODKERN_BF16 void kernel(const uint32_t* a, const uint32_t* b, int64_t words, float* out, int64_t stride,
                         int64_t columns, bool accumulate) {
  __m512 sum[Rows][3];
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_setzero_ps();
  for (int64_t word = 0; word < words; ++word, a += kRows, b += kColumns) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 16), b2 = _mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i one = _mm512_set1_epi32(int(a[r]));
      sum[r][0] = add_product(sum[r][0], one, b0, Number{});
      sum[r][1] = add_product(sum[r][1], one, b1, Number{});
      sum[r][2] = add_product(sum[r][2], one, b2, Number{});
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < 3; ++j) {
      const int64_t left = std::clamp<int64_t>(columns - 16 * j, 0, 16);
      const __mmask16 mask = __mmask16((1u << left) - 1);
      float* to = out + r * stride + 16 * j;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, sum[r][j]));
    }
  }
}

template <class Number>
void panel_product(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t words, float* out, int64_t stride,
                   int64_t columns, bool accumulate) {
  switch (rows) {
    case 1: return kernel<Number, 1>(a, b, words, out, stride, columns, accumulate);
    case 2: return kernel<Number, 2>(a, b, words, out, stride, columns, accumulate);
    case 3: return kernel<Number, 3>(a, b, words, out, stride, columns, accumulate);
    case 4: return kernel<Number, 4>(a, b, words, out, stride, columns, accumulate);
    case 5: return kernel<Number, 5>(a, b, words, out, stride, columns, accumulate);
    case 6: return kernel<Number, 6>(a, b, words, out, stride, columns, accumulate);
    case 7: return kernel<Number, 7>(a, b, words, out, stride, columns, accumulate);
    default: return kernel<Number, 8>(a, b, words, out, stride, columns, accumulate);
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class Number>
void blocked(const Multiply& p) {
  // Packed blocks, kept by each thread that ever multiplies.
  thread_local std::unique_ptr<uint32_t, Free> packed;
  constexpr int64_t kSizeA = kBlockM * kWords, kSizeB = kBlockN * kWords, kDepth = kWords * kPerWord<Number>;
  if (!packed) packed.reset(static_cast<uint32_t*>(std::aligned_alloc(64, (kSizeA + kSizeB) * 4)));
  uint32_t *packed_a = packed.get(), *packed_b = packed_a + kSizeA;
  const auto* a = static_cast<const Number*>(p.a.data);
  const auto* b = static_cast<const Number*>(p.b.data);
  auto* out = static_cast<float*>(p.out);
  const int64_t blocks = std::max<int64_t>(1, (p.depth + kDepth - 1) / kDepth);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t d = block * kDepth, depth = std::min(kDepth, p.depth - d);
    const int64_t count = (depth + kPerWord<Number> - 1) / kPerWord<Number>;
    for (int64_t m = 0; m < p.M; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, p.M - m);
      pack(a + (p.transpose_a ? d * p.a.stride + m : m * p.a.stride + d), p.a.stride, !p.transpose_a, rows, depth,
           kRows, packed_a);
      for (int64_t n = 0; n < p.N; n += kBlockN) {
        const int64_t columns = std::min(kBlockN, p.N - n);
        pack(b + (p.transpose_b ? n * p.b.stride + d : d * p.b.stride + n), p.b.stride, p.transpose_b, columns, depth,
             kColumns, packed_b);
        for (int64_t j = 0; j < columns; j += kColumns) {
          for (int64_t i = 0; i < rows; i += kRows) {
            panel_product<Number>(rows - i, packed_a + i * count, packed_b + j * count, count,
                                  out + (m + i) * p.out_stride + n + j, p.out_stride, columns - j,
                                  p.accumulate || block > 0);
          }
        }
      }
    }
  }
}

}  // namespace

bool has_bfloat16_dot_products() {
  return has_avx512() && cpuid_bit(7, 1, 0, 5);
}
bool has_matrix_units() {
  return has_avx512() && cpuid_bit(7, 0, 3, 22);
}

void multiply_bfloat16(const Multiply& product) {
  blocked<uint16_t>(product);
}
void multiply_float32(const Multiply& product) {
  blocked<float>(product);
}

#else

bool has_bfloat16_dot_products() {
  return false;
}
bool has_matrix_units() {
  return false;
}
void multiply_bfloat16(const Multiply&) {}
void multiply_float32(const Multiply&) {}

#endif

}  // namespace oodkern
