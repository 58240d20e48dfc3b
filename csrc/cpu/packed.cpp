// out [M, N] (+)= A B in units of 32 bits along the depth: a float32, or two neighbours of bfloat16, which one
// instruction multiplies and adds to a float32 sum. A is packed in panels of 8 rows, B in panels of 48 columns, and 8 x
// 48 sums stay in registers (24 of 32) while a panel's depth is gone through.
#include "packed.h"

#if defined(OODKERN_X86_64)
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

// Both precisions are compiled for the processors that have both: AMD's with AVX-512.
#define OODKERN_PACKED __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define OODKERN_ALWAYS inline __attribute__((always_inline))
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

OODKERN_ALWAYS __mmask16 mask_of(int64_t left) {
  return left >= 16 ? __mmask16(~0) : __mmask16((1u << left) - 1);
}

// 16 x 16 numbers of 32 bits, transposed in registers.
OODKERN_PACKED OODKERN_ALWAYS void transpose(__m512i (&v)[16]) {
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

constexpr int kRows = 8, kColumns = 48;
// Sizes of packed blocks. The panel of A (16 KiB) stays in the first-level cache; all else is read in order, fast
// enough from the second.
constexpr int64_t kBlockM = 512, kBlockN = 240, kUnits = 512;
// Panels a power of two long would share their cache sets.
constexpr int64_t kPad = 16;
constexpr int64_t kSizeA = kBlockM / kRows * (kRows * kUnits + kPad);
constexpr int64_t kSizeB = kBlockN / kColumns * (kColumns * kUnits + kPad);

struct Float32 {
  using Number = float;
  static constexpr int64_t kNumbers = 1;  // of a unit
  // Asking for the sums' memory before the depth is gone through: float32 gains by it, bfloat16 loses.
  static constexpr bool kPrefetch = true;

  // 16 units of neighbours along the depth, of which `left` numbers are there.
  OODKERN_PACKED static OODKERN_ALWAYS __m512i along(const float* from, int64_t left) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask_of(left), from));
  }
  // A unit of each of 16 neighbours across it.
  OODKERN_PACKED static OODKERN_ALWAYS __m512i across(const float* from, int64_t, int64_t, __mmask16 mask) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from));
  }
  OODKERN_PACKED static OODKERN_ALWAYS __m512 add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

struct BFloat16Pair {
  using Number = uint16_t;
  static constexpr int64_t kNumbers = 2;
  static constexpr bool kPrefetch = false;

  OODKERN_PACKED static OODKERN_ALWAYS __m512i along(const uint16_t* from, int64_t left) {
    return _mm512_maskz_loadu_epi16(left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1, from);
  }
  OODKERN_PACKED static OODKERN_ALWAYS __m512i across(const uint16_t* from, int64_t stride, int64_t left,
                                                      __mmask16 mask) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    if (left < 2) return even;
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + stride));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
  OODKERN_PACKED static OODKERN_ALWAYS __m512 add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
  }
};

template <int Panel>
int64_t panel_at(int64_t at, int64_t units) {
  return at / Panel * (Panel * units + kPad);
}

// A unit of 16 neighbours, the first of them at `to`.
template <int Panel>
OODKERN_PACKED OODKERN_ALWAYS void put(uint32_t* to, int64_t units, __m512i sixteen) {
  if constexpr (Panel == kColumns) {
    _mm512_storeu_si512(to, sixteen);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(sixteen));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + panel_at<Panel>(Panel, units)),
                        _mm512_extracti64x4_epi64(sixteen, 1));
  }
}

// Packs `width` rows (A) or columns (B) of `depth` numbers into panels [units][Panel]; `along`: neighbours along the
// depth are neighbours in memory, and the others `stride` apart. What is beyond either end is zero.
template <class Unit, int Panel>
OODKERN_PACKED void pack(const typename Unit::Number* from, int64_t stride, bool along, int64_t width, int64_t depth,
                         uint32_t* out) {
  const int64_t units = (depth + Unit::kNumbers - 1) / Unit::kNumbers, padded = (width + Panel - 1) / Panel * Panel;
  const auto place = [&](int64_t at) { return out + panel_at<Panel>(at, units) + at % Panel; };
  if (along) {
    for (int64_t at = 0; at < padded; at += 16) {
      const int64_t columns = std::clamp<int64_t>(width - at, 0, 16);
      for (int64_t unit = 0; unit < units; unit += 16) {
        const int64_t left = depth - Unit::kNumbers * unit;
        __m512i v[16];
        for (int i = 0; i < 16; ++i) {
          v[i] = i < columns ? Unit::along(from + (at + i) * stride + Unit::kNumbers * unit, left)
                             : _mm512_setzero_si512();
        }
        transpose(v);
        uint32_t* to = place(at) + unit * Panel;
        for (int i = 0; i < 16 && unit + i < units; ++i) put<Panel>(to + i * Panel, units, v[i]);
      }
    }
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t d = Unit::kNumbers * unit;
    for (int64_t at = 0; at < padded; at += 16) {
      const __mmask16 mask = mask_of(std::max<int64_t>(width - at, 0));
      put<Panel>(place(at) + unit * Panel, units, Unit::across(from + d * stride + at, stride, depth - d, mask));
    }
  }
}

// Of a panel of B the first 16 * Vectors columns.
template <class Unit, int Rows, int Vectors>
OODKERN_PACKED void kernel(const uint32_t* a, const uint32_t* b, int64_t units, float* out, int64_t stride,
                           int64_t columns, const float* bias, bool accumulate) {
  __m512 sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Vectors; ++j) {
      if (Unit::kPrefetch) _mm_prefetch(reinterpret_cast<const char*>(out + r * stride + 16 * j), _MM_HINT_T0);
      sum[r][j] = _mm512_setzero_ps();
    }
  }
  for (int64_t unit = 0; unit < units; ++unit, a += kRows, b += kColumns) {
    __m512i column[Vectors];
    for (int j = 0; j < Vectors; ++j) column[j] = _mm512_loadu_si512(b + 16 * j);
    for (int r = 0; r < Rows; ++r) {
      const __m512i one = _mm512_set1_epi32(int(a[r]));
      for (int j = 0; j < Vectors; ++j) sum[r][j] = Unit::add(sum[r][j], one, column[j]);
    }
  }
  for (int j = 0; j < Vectors; ++j) {
    const __mmask16 mask = mask_of(std::max<int64_t>(columns - 16 * j, 0));
    const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + 16 * j) : _mm512_setzero_ps();
    for (int r = 0; r < Rows; ++r) {
      float* to = out + r * stride + 16 * j;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, _mm512_add_ps(sum[r][j], added)));
    }
  }
}

using Kernel = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int64_t, const float*, bool);
template <class Unit, int Vectors>
constexpr Kernel kOfRows[] = {kernel<Unit, 1, Vectors>, kernel<Unit, 2, Vectors>, kernel<Unit, 3, Vectors>,
                              kernel<Unit, 4, Vectors>, kernel<Unit, 5, Vectors>, kernel<Unit, 6, Vectors>,
                              kernel<Unit, 7, Vectors>, kernel<Unit, 8, Vectors>};
template <class Unit>
Kernel kernel_of(int64_t rows, int64_t columns) {
  const int64_t r = std::min<int64_t>(kRows, rows) - 1;
  return columns > 32 ? kOfRows<Unit, 3>[r] : columns > 16 ? kOfRows<Unit, 2>[r] : kOfRows<Unit, 1>[r];
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Packed blocks: 1.5 MiB, kept by each thread that ever multiplies.
uint32_t* packed_blocks() {
  thread_local std::unique_ptr<uint32_t, Free> packed;
  if (!packed) packed.reset(static_cast<uint32_t*>(std::aligned_alloc(64, (kSizeA + kSizeB) * 4)));
  if (!packed) throw std::bad_alloc();
  return packed.get();
}

template <class Unit>
void multiply_packed(const Multiply& p) {
  using Number = typename Unit::Number;
  constexpr int64_t kBlockDepth = kUnits * Unit::kNumbers;
  uint32_t *packed_a = packed_blocks(), *packed_b = packed_a + kSizeA;
  const auto* a = static_cast<const Number*>(p.a.data);
  const auto* b = static_cast<const Number*>(p.b.data);
  const auto* bias = static_cast<const float*>(p.bias);
  auto* out = static_cast<float*>(p.out);
  const int64_t blocks = std::max<int64_t>(1, (p.depth + kBlockDepth - 1) / kBlockDepth);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t d = block * kBlockDepth, depth = std::min(kBlockDepth, p.depth - d);
    const int64_t units = (depth + Unit::kNumbers - 1) / Unit::kNumbers;
    for (int64_t m = 0; m < p.M; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, p.M - m);
      pack<Unit, kRows>(a + (p.transpose_a ? d * p.a.stride + m : m * p.a.stride + d), p.a.stride, !p.transpose_a, rows,
                        depth, packed_a);
      for (int64_t n = 0; n < p.N; n += kBlockN) {
        const int64_t columns = std::min(kBlockN, p.N - n);
        pack<Unit, kColumns>(b + (p.transpose_b ? n * p.b.stride + d : d * p.b.stride + n), p.b.stride, p.transpose_b,
                             columns, depth, packed_b);
        for (int64_t j = 0; j < columns; j += kColumns) {
          for (int64_t i = 0; i < rows; i += kRows) {
            kernel_of<Unit>(rows - i, columns - j)(
                packed_a + panel_at<kRows>(i, units), packed_b + panel_at<kColumns>(j, units), units,
                out + (m + i) * p.out_stride + n + j, p.out_stride, columns - j,
                bias && block == 0 ? bias + n + j : nullptr, p.accumulate || block > 0);
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

bool prefers_packed() {
  return __builtin_cpu_is("amd") && has_bfloat16_dot_products();
}

void multiply_float32(const Multiply& p) {
  multiply_packed<Float32>(p);
}
void multiply_bfloat16(const Multiply& p) {
  multiply_packed<BFloat16Pair>(p);
}

#else

bool has_bfloat16_dot_products() {
  return false;
}
bool has_matrix_units() {
  return false;
}
bool prefers_packed() {
  return false;
}
void multiply_float32(const Multiply&) {}
void multiply_bfloat16(const Multiply&) {}

#endif

}  // namespace oodkern
