// The CPU engine of norms, seen from its callers: pieces of rows, summed in double whatever they are stored in, so that
// no square of a 32-bit number leaves the range and a norm is exact to the rounding of its own.
#pragma once

#include "rows.h"

namespace oodkern {

struct NormEngine {
  // sum_k (scale x_k)^2
  double (*square_sum)(Storage, const void* x, int64_t count, double scale);
  // sum_k t_k (inverse x_k)
  double (*dot)(Storage, const void* x, const void* t, int64_t count, double inverse);
  // max_k |x_k|; a NaN is passed over
  double (*largest)(Storage, const void* x, int64_t count);
  // out_k = scale (inverse x_k)
  void (*scaled)(Storage, const void* x, int64_t count, double inverse, double scale, void* out);
  // out_k = scale (t_k - along (inverse x_k))
  void (*projected)(Storage, const void* x, const void* t, int64_t count, double inverse, double along, double scale,
                    void* out);
};

}  // namespace oodkern
