// How kernels of the binary head see a row's labels: of any dtype, beside logits that are read in vectors of 16 bytes.
#pragma once

#include <type_traits>

#include "../cpu/heads.h"
#include "row_view.cuh"

namespace oodkern::device {

struct LabelRow {
  const void* y;
  Target storage;
  bool alike;  // whether y may be read in words where the logits are

  static __device__ __forceinline__ int bytes_of(Target storage) {
    switch (storage) {
      case Target::kUint8:
      case Target::kInt8: return 1;
      case Target::kBFloat16:
      case Target::kFloat16:
      case Target::kInt16: return 2;
      case Target::kFloat32:
      case Target::kInt32: return 4;
      case Target::kFloat64:
      case Target::kInt64: return 8;
    }
    return 8;
  }
  // Vectors of kWidth logits begin `past` elements before the row.
  template <int kWidth>
  static __device__ __forceinline__ LabelRow of(const HeadCall& call, int64_t row, int past) {
    const int bytes = bytes_of(call.target_storage);
    const uintptr_t word = uintptr_t(kWidth * bytes < 16 ? kWidth * bytes : 16);
    const void* y = static_cast<const char*>(call.target) + row * call.target_stride * bytes;
    return {y, call.target_storage, (reinterpret_cast<uintptr_t>(y) - uintptr_t(past * bytes)) % word == 0};
  }
};

template <class Real, class Label>
__device__ __forceinline__ Real number_of(Label label) {
  if constexpr (std::is_same_v<Label, BFloat16> || std::is_same_v<Label, Float16>) {
    return Real(widen(label));
  } else {
    return Real(label);
  }
}

// Labels [at, at + kWidth); 0 for those that a row of `columns` has not.
template <class Label, class Real, int kWidth>
__device__ __forceinline__ void read_labels_as(const LabelRow& row, int64_t at, int64_t columns, Real (&out)[kWidth]) {
  const Label* y = static_cast<const Label*>(row.y);
  Label labels[kWidth];
  if (row.alike && at >= 0 && at + kWidth <= columns) {
    load_words<kWidth* int(sizeof(Label))>(y + at, labels);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) labels[i] = at + i >= 0 && at + i < columns ? y[at + i] : Label{};
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = number_of<Real>(labels[i]);
}

template <class Real, int kWidth>
__device__ __forceinline__ void read_labels(const LabelRow& row, int64_t at, int64_t columns, Real (&out)[kWidth]) {
  switch (row.storage) {
    case Target::kFloat64: return read_labels_as<double>(row, at, columns, out);
    case Target::kFloat32: return read_labels_as<float>(row, at, columns, out);
    case Target::kBFloat16: return read_labels_as<BFloat16>(row, at, columns, out);
    case Target::kFloat16: return read_labels_as<Float16>(row, at, columns, out);
    case Target::kUint8: return read_labels_as<uint8_t>(row, at, columns, out);
    case Target::kInt8: return read_labels_as<int8_t>(row, at, columns, out);
    case Target::kInt16: return read_labels_as<int16_t>(row, at, columns, out);
    case Target::kInt32: return read_labels_as<int32_t>(row, at, columns, out);
    case Target::kInt64: return read_labels_as<int64_t>(row, at, columns, out);
  }
}

}  // namespace oodkern::device
