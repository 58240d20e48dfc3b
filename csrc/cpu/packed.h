// Products of packed panels, by AVX-512: of float32 on AMD's processors, where they are faster than the BLAS (MKL), and
// of bfloat16 by the dot-product instruction (AVX-512 BF16), which PyTorch's BLAS does not use on every processor that
// has it.
#pragma once

#include "blas.h"

namespace oodkern {

bool has_bfloat16_dot_products();  // AVX-512 BF16
bool has_matrix_units();           // AMX of bfloat16
bool prefers_packed();             // to the BLAS, for float32
void multiply_float32(const Multiply& product);
void multiply_bfloat16(const Multiply& product);

}  // namespace oodkern
