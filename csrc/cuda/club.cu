// Room `contrast`'s CLUB on a GPU: see club.cuh.
#include <algorithm>

#include "../club.h"
#include "club.cuh"
#include "row_launch.h"

namespace oodkern {
namespace {

using namespace device;

template <class Stored, class Data>
ClubMatrix<Stored> matrix_of(Data* data, int64_t stride) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * int64_t(sizeof(Stored)) % 16 == 0;
  return {static_cast<Stored*>(data), stride, aligned};
}

// Rows are shared out among as many slices as keep the device busy, within what a warp adds up.
template <class Stored>
ClubInputs<Stored> inputs_of(const Club& club, int64_t multiprocessors) {
  const ClubCall& call = club.call;
  ClubInputs<Stored> in{matrix_of<const Stored>(call.mean, call.mean_stride),
                        matrix_of<const Stored>(call.log_variance, call.log_variance_stride),
                        matrix_of<const Stored>(call.target, call.target_stride),
                        club.N,
                        club.D,
                        0,
                        0,
                        0};
  const int64_t tile = 32 * Vector<Stored>::kWidth;
  in.tiles = (club.D + tile - 1) / tile;
  const int64_t wanted = std::max<int64_t>(1, kBlocksAtOnce * multiprocessors / std::max<int64_t>(in.tiles, 1));
  const int64_t share = (club.N + wanted * kWarps - 1) / (wanted * kWarps);
  in.slice_rows = kWarps * std::clamp(share, kFewestRows, kMostRows);
  in.slices = (club.N + in.slice_rows - 1) / in.slice_rows;
  return in;
}

struct CudaClub {
  template <class Stored>
  static void forward_of(const Club& club, const Tensor& mean, Tensor& value, Tensor& columns) {
    using Real = typename ClubReal<Stored>::Type;
    const CudaStream stream(mean);
    const ClubInputs<Stored> in = inputs_of<Stored>(club, stream.multiprocessors());
    const int64_t groups = (in.D + kClubGroup - 1) / kClubGroup;
    const Tensor sums = empty_of(mean, {in.slices, kClubSums, in.D}, value.scalar_type());
    const Tensor bounds = empty_of(mean, {groups}, ScalarType::Double);
    Real* partials = static_cast<Real*>(sums.mutable_data_ptr());
    double* bound = static_cast<double*>(bounds.mutable_data_ptr());
    if (in.items() > 0) {
      stream.launch("club_slices", club_slices<Stored>, blocks_for(in.items(), 1), kThreads, 0, in, partials);
    }
    if (groups > 0) {
      stream.launch("club_columns", club_columns<Real>, blocks_for(groups, 1), kThreads, 0, partials, in.slices,
                    in.slice_rows, in.N, in.D, static_cast<Real*>(columns.mutable_data_ptr()), bound);
    }
    stream.launch("club_value", club_value<Real>, 1, 32, 0, bound, groups, in.N,
                  static_cast<Real*>(value.mutable_data_ptr()));
  }
  static void forward(const Club& club, const Tensor& mean, Tensor& value, Tensor& columns) {
    switch (club.call.storage) {
      case Storage::kFloat64: return forward_of<double>(club, mean, value, columns);
      case Storage::kFloat32: return forward_of<float>(club, mean, value, columns);
      case Storage::kBFloat16: return forward_of<BFloat16>(club, mean, value, columns);
      case Storage::kFloat16: return forward_of<Float16>(club, mean, value, columns);
    }
  }

  template <class Stored>
  static void backward_of(const Club& club, const Tensor& mean, const Tensor& grad, const ClubColumns& columns,
                          const ClubGradients& gradients) {
    using Real = typename ClubReal<Stored>::Type;
    const CudaStream stream(mean);
    const ClubInputs<Stored> in = inputs_of<Stored>(club, stream.multiprocessors());
    if (in.items() == 0) return;
    const ClubOutputs<Stored> out{matrix_of<Stored>(gradients.mean, in.D),
                                  matrix_of<Stored>(gradients.log_variance, in.D),
                                  matrix_of<Stored>(gradients.target, in.D)};
    stream.launch("club_gradients", club_gradients<Stored>, blocks_for(in.items(), 1), kThreads, 0, in,
                  static_cast<const Real*>(grad.const_data_ptr()), static_cast<const Real*>(columns.center), out);
  }
  static void backward(const Club& club, const Tensor& mean, const Tensor& grad, const ClubColumns& columns,
                       const ClubGradients& out) {
    switch (club.call.storage) {
      case Storage::kFloat64: return backward_of<double>(club, mean, grad, columns, out);
      case Storage::kFloat32: return backward_of<float>(club, mean, grad, columns, out);
      case Storage::kBFloat16: return backward_of<BFloat16>(club, mean, grad, columns, out);
      case Storage::kFloat16: return backward_of<Float16>(club, mean, grad, columns, out);
    }
  }

  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_CLUB_OPS(m, oodkern::CudaClub);
}
