// out [M, N] (+)= A B with bfloat16 factors and float32 sums. One instruction adds, to each of 16 sums, two products of
// neighbours along the depth; so both factors are packed as pairs of them, A in panels of 8 rows, B in panels of 48
// columns, and 8 x 48 sums stay in registers (24 of 32) while a panel's depth is gone through.
#include "bfloat16.h"

#if defined(OODKERN_X86_64)
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#define OODKERN_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
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
// A block of A (512 KiB) and one of B (240 KiB) stay in the second-level cache, the panel of A in the first.
constexpr int64_t kBlockM = 512, kBlockN = 240, kBlockDepth = 512, kPairs = kBlockDepth / 2;

// 16 x 16 numbers of 32 bits, transposed in registers.
OODKERN_BF16 inline __attribute__((always_inline)) void transpose(__m512i (&v)[16]) {
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

// Pairs of 16 neighbours [.., 16] of 32 bits go to panels [width / panel][pairs][panel].
OODKERN_BF16 inline __attribute__((always_inline)) void put(uint32_t* out, int64_t pairs, int panel, int64_t at,
                                                            int64_t pair, __m512i sixteen) {
  if (panel == kColumns) {
    _mm512_storeu_si512(out + (at / kColumns * pairs + pair) * kColumns + at % kColumns, sixteen);
    return;
  }
  uint32_t* first = out + (at / kRows * pairs + pair) * kRows;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(sixteen));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + pairs * kRows), _mm512_extracti64x4_epi64(sixteen, 1));
}

// Packs `width` rows (A) or columns (B) of `depth` numbers; `along`: neighbours along the depth are neighbours in
// memory, and the others `stride` apart. What is beyond either end is zero.
OODKERN_BF16 void pack(const uint16_t* from, int64_t stride, bool along, int64_t width, int64_t depth, int panel,
                       uint32_t* out) {
  const int64_t pairs = (depth + 1) / 2, padded = (width + panel - 1) / panel * panel;
  for (int64_t at = 0; at < padded; at += 16) {
    const int64_t columns = std::clamp<int64_t>(width - at, 0, 16);
    if (along) {
      for (int64_t pair = 0; pair < pairs; pair += 16) {
        const int64_t left = std::min<int64_t>(depth - 2 * pair, 32);
        const __mmask32 mask = left == 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        __m512i v[16];
        for (int i = 0; i < 16; ++i) {
          v[i] = i < columns ? _mm512_maskz_loadu_epi16(mask, from + (at + i) * stride + 2 * pair)
                             : _mm512_setzero_si512();
        }
        transpose(v);
        for (int i = 0; i < 16 && pair + i < pairs; ++i) put(out, pairs, panel, at, pair + i, v[i]);
      }
      continue;
    }
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const uint16_t* row = from + 2 * pair * stride + at;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
      const __mmask16 odd_mask = 2 * pair + 1 < depth ? mask : __mmask16(0);
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_mask, row + (odd_mask ? stride : 0)));
      put(out, pairs, panel, at, pair, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

template <int Rows>
OODKERN_BF16 void kernel(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out, int64_t stride,
                         int64_t columns, bool accumulate) {
  __m512 sum[Rows][3];
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair, a += kRows, b += kColumns) {
    const __m512bh b0 = __builtin_bit_cast(__m512bh, _mm512_loadu_si512(b)),
                   b1 = __builtin_bit_cast(__m512bh, _mm512_loadu_si512(b + 16)),
                   b2 = __builtin_bit_cast(__m512bh, _mm512_loadu_si512(b + 32));
    for (int r = 0; r < Rows; ++r) {
      const __m512bh one = __builtin_bit_cast(__m512bh, _mm512_set1_epi32(int(a[r])));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], one, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], one, b1);
      sum[r][2] = _mm512_dpbf16_ps(sum[r][2], one, b2);
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

using Kernel = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int64_t, bool);
const Kernel kKernels[] = {nullptr,   kernel<1>, kernel<2>, kernel<3>, kernel<4>,
                           kernel<5>, kernel<6>, kernel<7>, kernel<8>};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

bool has_bfloat16_dot_products() {
  return has_avx512() && cpuid_bit(7, 1, 0, 5);
}
bool has_matrix_units() {
  return has_avx512() && cpuid_bit(7, 0, 3, 22);
}

void multiply_bfloat16(const Multiply& p) {
  // Packed blocks, kept by each thread that ever multiplies.
  thread_local std::unique_ptr<uint32_t, Free> packed;
  constexpr int64_t kSizeA = kBlockM * kPairs, kSizeB = kBlockN * kPairs;
  if (!packed) packed.reset(static_cast<uint32_t*>(std::aligned_alloc(64, (kSizeA + kSizeB) * 4)));
  uint32_t *packed_a = packed.get(), *packed_b = packed_a + kSizeA;
  const auto* a = static_cast<const uint16_t*>(p.a.data);
  const auto* b = static_cast<const uint16_t*>(p.b.data);
  auto* out = static_cast<float*>(p.out);
  const int64_t blocks = std::max<int64_t>(1, (p.depth + kBlockDepth - 1) / kBlockDepth);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t d = block * kBlockDepth, depth = std::min(kBlockDepth, p.depth - d), pairs = (depth + 1) / 2;
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
            kKernels[std::min<int64_t>(kRows, rows - i)](packed_a + i * pairs, packed_b + j * pairs, pairs,
                                                         out + (m + i) * p.out_stride + n + j, p.out_stride,
                                                         columns - j, p.accumulate || block > 0);
          }
        }
      }
    }
  }
}

#else

bool has_bfloat16_dot_products() {
  return false;
}
bool has_matrix_units() {
  return false;
}
void multiply_bfloat16(const Multiply&) {}

#endif

}  // namespace oodkern
