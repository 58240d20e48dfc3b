// Our own products of matrices, for processors on which PyTorch's BLAS leaves half of their speed.
#pragma once

#include "blas.h"

namespace oodkern {

bool has_bfloat16_dot_products();  // AVX-512 BF16
bool has_matrix_units();           // AMX of bfloat16

void multiply_bfloat16(const Multiply& product);
void multiply_float32(const Multiply& product);

}  // namespace oodkern
