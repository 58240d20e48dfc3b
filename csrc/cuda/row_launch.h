// Which kernels of row.cuh a call takes, and on how many blocks.
#pragma once

#include "host.h"
#include "row.cuh"

namespace oodkern::device {

constexpr int64_t kMostBlocks = 1 << 30;  // kernels walk over what is left
constexpr int64_t kBlocksAtOnce = 4;      // blocks that a multiprocessor runs, at the kernels' registers

inline int64_t blocks_for(int64_t items, int64_t each) {
  const int64_t blocks = (items + each - 1) / each;
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

// Rows up to here are held in the registers of a warp. Two rows of 1,024 doubles do not fit there (double backward of
// SoftplusSum: 2,632 bytes spilled), and float64 is for checking gradients.
inline int64_t columns_of_warp(Storage storage) {
  return storage == Storage::kFloat64 ? 128 : 1024;
}

inline int64_t bytes_of(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

// The columns that a row seems to have when it is read from the multiple of 16 bytes before it.
inline int64_t columns_from_boundary(const RowCall& call, int64_t rows) {
  const int64_t bytes = bytes_of(call.storage);
  const bool aligned =
      reinterpret_cast<uintptr_t>(call.logits) % 16 == 0 && (rows == 1 || call.logits_stride * bytes % 16 == 0);
  return call.columns + (aligned ? 0 : 16 / bytes - 1);
}

// The blocks that share a row's reduction; 1 where rows are many, or are reduced by warps. Several write their states
// to partials [rows, splits, 2] of the scores' dtype.
inline int64_t row_splits(const RowCall& call, int64_t rows, int64_t multiprocessors) {
  const int64_t columns = columns_from_boundary(call, rows);
  if (call.pass == Pass::kBackward || columns <= columns_of_warp(call.storage) || rows == 0) return 1;
  const int64_t block = kThreads * kUnroll * 16 / bytes_of(call.storage);  // columns that a block reads at once
  const int64_t most = (columns + block - 1) / block;
  // Not one block more than run at once: a second wave of a few would take as long as the first.
  const int64_t wanted = kBlocksAtOnce * multiprocessors / rows;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

template <class Reducer, class Stored, Pass kPass>
void run_pass(const CudaStream& stream, const RowCall& call, const Reducer& reducer, int64_t rows, int64_t splits,
              void* partials) {
  const auto launch = [&](const char* name, auto kernel, int64_t blocks, auto... arguments) {
    stream.launch(name, kernel, blocks, kThreads, 0, call, reducer, rows, arguments...);
  };
  constexpr int kWidth = Vector<Stored>::kWidth;
  constexpr int kEach = sizeof(Stored) == 8 ? 4 : 8;  // elements of a short row in a lane
  const int64_t columns = columns_from_boundary(call, rows);
  if (columns <= 8 * kEach) {
    launch("warp_rows", warp_rows<Reducer, Stored, kPass, 8, kEach / kWidth>, blocks_for(rows, 4 * kWarps));
  } else if (columns <= 32 * kEach) {
    launch("warp_rows", warp_rows<Reducer, Stored, kPass, 32, kEach / kWidth>, blocks_for(rows, kWarps));
  } else if (columns <= columns_of_warp(call.storage)) {
    if constexpr (sizeof(Stored) < 8) {
      launch("warp_rows", warp_rows<Reducer, Stored, kPass, 32, 32 / kWidth>, blocks_for(rows, kWarps));
    }
  } else {
    if constexpr (kPass != Pass::kBackward) {
      const auto states = static_cast<typename Reducer::State*>(partials);
      launch("reduce_rows", reduce_rows<Reducer, Stored, kPass>, blocks_for(rows * splits, 1), splits, states);
      if (splits > 1) {
        launch("finish_rows", finish_rows<Reducer, kPass>, blocks_for(rows, kWarps), splits,
               static_cast<const typename Reducer::State*>(states));
      }
    }
    if constexpr (kPass != Pass::kForward) {
      const int64_t part = kThreads * kUnroll * kWidth;
      const int64_t parts = (columns + part - 1) / part;
      launch("map_rows", map_rows<Reducer, Stored, kPass>, blocks_for(rows * parts, 1), parts);
    }
  }
}

template <template <class> class Reducer, class Math, class Stored>
void run_storage(const CudaStream& stream, const RowCall& call, int64_t rows, int64_t splits, void* partials) {
  const Reducer<Math> reducer{call.temperature};
  switch (call.pass) {
    case Pass::kForward:
      return run_pass<Reducer<Math>, Stored, Pass::kForward>(stream, call, reducer, rows, splits, partials);
    case Pass::kBackward:
      return run_pass<Reducer<Math>, Stored, Pass::kBackward>(stream, call, reducer, rows, splits, partials);
    case Pass::kDoubleBackward:
      return run_pass<Reducer<Math>, Stored, Pass::kDoubleBackward>(stream, call, reducer, rows, splits, partials);
  }
}

// `splits` is row_splits' answer, `partials` memory for as many states a row, or null for 1.
template <template <class> class Reducer>
void run_rows(const CudaStream& stream, const RowCall& call, int64_t rows, int64_t splits, void* partials) {
  if (rows == 0) return;
  switch (call.storage) {
    case Storage::kFloat64: return run_storage<Reducer, Double, double>(stream, call, rows, splits, partials);
    case Storage::kFloat32: return run_storage<Reducer, Float, float>(stream, call, rows, splits, partials);
    case Storage::kBFloat16: return run_storage<Reducer, Float, BFloat16>(stream, call, rows, splits, partials);
    case Storage::kFloat16: return run_storage<Reducer, Float, Float16>(stream, call, rows, splits, partials);
  }
}

// A room's call on the current stream.
template <template <class> class Reducer>
void reduce(const RowCall& call, int64_t rows, const Tensor& logits) {
  const CudaStream stream(logits);
  const int64_t splits = row_splits(call, rows, stream.multiprocessors());
  const Tensor partials = empty_of(logits, {splits > 1 ? rows * splits * 2 : 0}, score_dtype(logits));
  run_rows<Reducer>(stream, call, rows, splits, partials.mutable_data_ptr());
}

}  // namespace oodkern::device
