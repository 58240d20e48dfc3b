// The BLAS is PyTorch's own (MKL, OpenBLAS, ...): it is in the process already and tuned for the processor. Found by
// name, since it is no part of the stable ABI; without one, plain loops.
#include "blas.h"

#include <dlfcn.h>

#include <atomic>

#include "../stable.h"
#include "dispatch.h"
#include "packed.h"

namespace oodkern {
namespace {

// Fortran's GEMM, which every BLAS has: matrices column by column, integers of 32 bits.
template <class Real>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const Real*, const Real*,
                      const int*, const Real*, const int*, const Real*, Real*, const int*);
// MKL's, row by row: layout, transpositions, M, N, depth, alpha, A, lda, B, ldb, beta, C, ldc.
using GemmBFloat16 = void (*)(int, int, int, int, int, int, float, const uint16_t*, int, const uint16_t*, int, float,
                              float*, int);

void* symbol(const char* name) {
  static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, name) : nullptr;
  return found ? found : dlsym(RTLD_DEFAULT, name);
}

std::atomic<int64_t> done{0};

int64_t multiplications() {
  return done;
}

template <class Real>
void plain(const Multiply& p) {
  const Real* a = static_cast<const Real*>(p.a.data);
  const Real* b = static_cast<const Real*>(p.b.data);
  Real* out = static_cast<Real*>(p.out);
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t n = 0; n < p.N; ++n) {
      Real sum = p.accumulate ? out[m * p.out_stride + n] : Real(0);
      for (int64_t d = 0; d < p.depth; ++d) {
        sum += (p.transpose_a ? a[d * p.a.stride + m] : a[m * p.a.stride + d]) *
               (p.transpose_b ? b[n * p.b.stride + d] : b[d * p.b.stride + n]);
      }
      out[m * p.out_stride + n] = sum;
    }
  }
}

// Row by row is column by column of the transposed: out^T = B^T A^T.
template <class Real>
void fortran(Gemm<Real> gemm, const Multiply& p) {
  const int M = int(p.M), N = int(p.N), depth = int(p.depth);
  const int lda = int(p.a.stride), ldb = int(p.b.stride), ldc = int(p.out_stride);
  const Real one = 1, keep = p.accumulate ? Real(1) : Real(0);
  gemm(p.transpose_b ? "T" : "N", p.transpose_a ? "T" : "N", &N, &M, &depth, &one, static_cast<const Real*>(p.b.data),
       &ldb, static_cast<const Real*>(p.a.data), &lda, &keep, static_cast<Real*>(p.out), &ldc);
}

void add_bias(const Multiply& p) {
  const Tile out{p.storage == Storage::kFloat64, p.M, p.N, p.out, p.out_stride};
  if (p.bias) tile_engine().affine(out, nullptr, nullptr, p.bias);
}

GemmBFloat16 gemm_bfloat16() {
  static const auto found = reinterpret_cast<GemmBFloat16>(symbol("cblas_gemm_bf16bf16f32"));
  return found;
}

void bfloat16(const Multiply& p) {
  constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112;
  gemm_bfloat16()(kRowMajor, p.transpose_a ? kTransposed : kPlain, p.transpose_b ? kTransposed : kPlain, int(p.M),
                  int(p.N), int(p.depth), 1.0f, static_cast<const uint16_t*>(p.a.data), int(p.a.stride),
                  static_cast<const uint16_t*>(p.b.data), int(p.b.stride), p.accumulate ? 1.0f : 0.0f,
                  static_cast<float*>(p.out), int(p.out_stride));
  add_bias(p);
}

}  // namespace

// MKL's product uses the matrix units (AMX), and without them is no faster than float32's.
Product bfloat16_product_of_blas() {
  return has_matrix_units() && gemm_bfloat16() ? bfloat16 : nullptr;
}

bool has_bfloat16_products() {
  return product_of(Storage::kBFloat16) != nullptr;
}

void multiply(const Multiply& p) {
  if (p.M == 0 || p.N == 0) return;
  done += p.M * p.N * p.depth;
  if (const Product own = product_of(p.storage)) return own(p);
  static const auto single = reinterpret_cast<Gemm<float>>(symbol("sgemm_"));
  static const auto twice = reinterpret_cast<Gemm<double>>(symbol("dgemm_"));
  if (p.storage == Storage::kFloat64) {
    twice&& p.depth ? fortran(twice, p) : plain<double>(p);
  } else {
    single&& p.depth ? fortran(single, p) : plain<float>(p);
  }
  add_bias(p);
}

}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CompositeExplicitAutograd, m) {
  m.impl("multiplications", TORCH_BOX(&oodkern::multiplications));
}
