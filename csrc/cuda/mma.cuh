// Products of a warp's tensor cores on 16-bit numbers, and copies into shared memory that nobody waits for at once.
//
// mma_16x8x16 is mma.sync.m16n8k16: C [16, 8] += A [16, 16] B [16, 8], float32 sums of exact products of 16-bit
// numbers. A's rows and B's columns are dense in k ("row.col"). With lane = 4 g + t (g = 0..7, t = 0..3) the PTX ISA's
// tables "Matrix Fragments for mma.m16n8k16 with floating point type" give
//
//   a_i, i = 0..7   row  g      for i in {0, 1, 4, 5}, g + 8 elsewhere;   k = 2 t + (i & 1) + (8 for i >= 4)
//   b_i, i = 0..3   column  g;                                            k = 2 t + (i & 1) + (8 for i >= 2)
//   c_i, i = 0..3   row  g      for i in {0, 1}, g + 8 elsewhere;         column = 2 t + (i & 1)
//
// and two numbers a register, the lower half first. So registers of A are (g, k 2t..), (g + 8, k 2t..), (g, k 2t+8..),
// (g + 8, k 2t+8..), registers of B (k 2t..), (k 2t+8..).
//
// A sum over k does not care which k comes when, as long as A and B agree: engines let lane t of a quad own the eight
// consecutive k = 8 t..8 t + 7 of a slab of 32, 16 bytes in four registers w of a row of A or a column of B. Two mma
// make a slab: the first takes w[0] and w[1] for k = 2t.. and 2t+8.., the second w[2] and w[3].
#pragma once

#include "device.cuh"

namespace oodkern::device {

constexpr int kSlab = 32;  // k of two mma, of which a lane holds eight

// Eight numbers of 16 bits.
struct alignas(16) Words {
  uint32_t at[4];
};

// One of a word's two numbers.
template <class Stored>
__device__ __forceinline__ float number_of(uint32_t word, int i) {
  return widen(Stored{uint16_t(i ? word >> 16 : word)});
}

#if defined(__CUDACC__)
__device__ __forceinline__ Words load_words(const void* address) {
  const uint4 four = __ldg(static_cast<const uint4*>(address));
  return {{four.x, four.y, four.z, four.w}};
}
__device__ __forceinline__ Words load_words(const SharedArray<Words>& from, int i) {
  const uint4 four = *reinterpret_cast<const uint4*>(from.words + i);
  return {{four.x, four.y, four.z, four.w}};
}
__device__ __forceinline__ void mma_16x8x16(BFloat16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_16x8x16(Float16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// to[i] = *from some time before the thread's wait_for_copies; other threads see it behind a barrier after that.
__device__ __forceinline__ void copy_async(const SharedArray<Words>& to, int i, const Words* from) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to.words + i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
#else
inline Words load_words(const void* address) {
  emulator::check_alignment(address, "a load");
  return *static_cast<const Words*>(address);
}
inline Words load_words(const emulator::SharedArray<Words>& from, int i) {
  return from.load(i);
}
template <class Stored>
void mma_16x8x16(Stored, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulator::Fragments own;
  for (int i = 0; i < 8; ++i) own.a[i] = number_of<Stored>(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) own.b[i] = number_of<Stored>(b[i / 2], i % 2);
  emulator::multiply_16x8x16(c, own);
}
inline void copy_async(const emulator::SharedArray<Words>& to, int i, const Words* from) {
  emulator::check_alignment(from, "an asynchronous copy");
  to.copy_async(i, from);
}
inline void wait_for_copies() {
  emulator::land_copies();
}
#endif

}  // namespace oodkern::device
