// Room `heads` on a GPU: losses of given logits whose slopes are known with their values.
#include "../heads.h"

#include "binary_head.cuh"
#include "host.h"
#include "row_launch.h"

namespace oodkern {
namespace {

// The columns that a row seems to have when it is read from the multiple of 16 bytes before it.
int64_t columns_read(const HeadCall& call, int64_t rows) {
  RowCall row{};
  row.storage = call.storage;
  row.columns = call.columns;
  row.logits = call.logits;
  row.logits_stride = call.logits_stride;
  return device::columns_from_boundary(row, rows);
}

template <class Math, class Stored>
void run_binary(const CudaStream& stream, const HeadCall& call, int64_t rows, int64_t columns) {
  using namespace device;
  constexpr int kWidth = Vector<Stored>::kWidth;
  const int lanes = columns <= 8 * 4 * kWidth ? 8 : columns <= 32 * 8 * kWidth ? 32 : kThreads;
  stream.launch("binary_rows", binary_rows<Math, Stored>, blocks_for(rows, kThreads / lanes), kThreads, 0, call, rows,
                lanes);
}

template <class Math, class Stored>
void run_softmax(const CudaStream& stream, const HeadCall& call, int64_t rows, int64_t columns) {
  using namespace device;
  constexpr int kWidth = Vector<Stored>::kWidth;
  constexpr int kEach = sizeof(Stored) == 8 ? 4 : 8;  // elements of a short row in a lane
  if (columns <= 8 * kEach) {
    return stream.launch("head_lanes", head_lanes<Math, Stored, 8, kEach / kWidth>, blocks_for(rows, 4 * kWarps),
                         kThreads, 0, call, rows);
  }
  if (columns <= 32 * kEach) {
    return stream.launch("head_lanes", head_lanes<Math, Stored, 32, kEach / kWidth>, blocks_for(rows, kWarps), kThreads,
                         0, call, rows);
  }
  if constexpr (sizeof(Stored) < 8) {
    if (columns <= columns_of_warp(call.storage)) {
      return stream.launch("head_lanes", head_lanes<Math, Stored, 32, 32 / kWidth>, blocks_for(rows, kWarps), kThreads,
                           0, call, rows);
    }
  }
  constexpr int kVectors = sizeof(Stored) == 2 ? 4 : 8;
  constexpr int64_t kChunk = int64_t(kThreads) * kVectors * kWidth;
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  stream.launch("head_blocks", head_blocks<Math, Stored, kVectors>, blocks_for(rows * (call.value ? 1 : chunks), 1),
                kThreads, 0, call, rows, chunks);
}

struct CudaHeads {
  template <class Math, class Stored>
  static void run_storage(const HeadCall& call, int64_t rows, const Tensor& logits) {
    const CudaStream stream(logits);
    const int64_t columns = columns_read(call, rows);
    if (call.head == Head::kBinary) return run_binary<Math, Stored>(stream, call, rows, columns);
    run_softmax<Math, Stored>(stream, call, rows, columns);
  }
  static void run(const HeadCall& call, int64_t rows, const Tensor& logits) {
    switch (call.storage) {
      case Storage::kFloat64: return run_storage<device::Double, double>(call, rows, logits);
      case Storage::kFloat32: return run_storage<device::Float, float>(call, rows, logits);
      case Storage::kBFloat16: return run_storage<device::Float, device::BFloat16>(call, rows, logits);
      case Storage::kFloat16: return run_storage<device::Float, device::Float16>(call, rows, logits);
    }
  }
  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_HEAD_OPS(m, oodkern::CudaHeads);
}
