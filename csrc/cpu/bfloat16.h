// Products of bfloat16 matrices by the processor's dot-product instruction (AVX-512 BF16), which PyTorch's BLAS does
// not use on every processor that has it.
#pragma once

#include "blas.h"

namespace oodkern {

bool has_bfloat16_dot_products();  // AVX-512 BF16
bool has_matrix_units();           // AMX of bfloat16
void multiply_bfloat16(const Multiply& product);

}  // namespace oodkern
