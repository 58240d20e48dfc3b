// Forward passes on a GPU, for 16-bit features and K <= 192: the scores of a linear head, `alignment`,
// `subspace_energy` and `nearest_center`.
#include "../check.h"
#include "host.h"
#include "stream_pack.cuh"
#include "stream_subspace.cuh"

#include <string>

namespace oodkern {
namespace {

using device::Stream;
using device::StreamCall;
using device::Words;

void check_features(const Tensor& features) {
  check_matrix(features, "features");
  STD_TORCH_CHECK(features.scalar_type() == ScalarType::BFloat16 || features.scalar_type() == ScalarType::Half,
                  "features: the CUDA kernels take bfloat16 and float16");
  STD_TORCH_CHECK(features.size(1) >= 1 && features.size(1) <= 1 << 20,
                  "features: the CUDA kernels take 1 to 1,048,576 columns, got ", features.size(1));
}

void check_streams(const Tensor& features, const Tensor& weight, const char* name) {
  check_features(features);
  check_same_columns(weight, name, features);
  check_same_device(weight, name, features, "features");
  STD_TORCH_CHECK(weight.size(0) >= 1 && weight.size(0) <= device::kMostClasses, name,
                  ": the CUDA kernels take 1 to 192 rows, got ", weight.size(0));
}

// From the first multiple of 16 bytes on.
Words* aligned_words(const Tensor& workspace) {
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  return reinterpret_cast<Words*>(memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16);
}

bool aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data()) % 16 == 0 && (rows.rows == 1 || rows.stride % 8 == 0);
}

template <class Stored, int kBlocks>
void run_blocks(const CudaStream& stream, StreamCall call, device::PackCall pack, const Tensor& like) {
  using Shape = device::StreamShape<kBlocks>;
  const int64_t slabs = (call.columns + device::kSlab - 1) / device::kSlab;
  const int64_t words = slabs * kBlocks * 32;
  // The packed classes from a multiple of 16 bytes on, and the constants behind them.
  const Tensor workspace = empty_of(like, {4 * words + 16 * kBlocks + 3}, ScalarType::Float);
  pack.blocks = kBlocks;
  pack.packed = aligned_words(workspace);
  pack.constants = reinterpret_cast<float*>(pack.packed + words);
  stream.launch("pack_classes", device::pack_classes<Stored>, kBlocks, device::kThreads, 0, pack);
  call.weight = pack.packed;
  call.constants = pack.constants;

  const int64_t tiles = (call.rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t blocks = tiles < stream.multiprocessors() ? tiles : stream.multiprocessors();
  const int64_t constants = 16 * kBlocks * int64_t(sizeof(float));
  call.resident = 16 * words + constants <= stream.shared_bytes();
  stream.launch("stream_rows", device::stream_rows<Stored, kBlocks>, blocks, device::kThreads,
                16 * (call.resident ? words : 2 * Shape::kGroup), call);
}

template <class Stored>
void run_stored(const CudaStream& stream, const StreamCall& call, const device::PackCall& pack, const Tensor& like) {
  if (call.classes <= 16) return run_blocks<Stored, 2>(stream, call, pack, like);
  if (call.classes <= 64) return run_blocks<Stored, 8>(stream, call, pack, like);
  if (call.classes <= 104) return run_blocks<Stored, 13>(stream, call, pack, like);
  return run_blocks<Stored, 24>(stream, call, pack, like);
}

// `call` has the reduction, its temperature and results.
void run(StreamCall call, const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (features.size(0) == 0) return;
  const CudaStream stream(features);
  const Rows x = as_rows(features), w = as_rows(weight);
  call.features = x.data();
  call.features_stride = x.stride;
  call.rows = x.rows;
  call.columns = int(x.columns);
  call.classes = int(w.rows);
  call.aligned = aligned(x);
  device::PackCall pack{};
  pack.reduction = call.reduction;
  pack.weight = w.data();
  pack.weight_stride = w.stride;
  pack.columns = call.columns;
  pack.classes = call.classes;
  pack.aligned = aligned(w);
  if (bias) {
    pack.bias = bias->const_data_ptr();
    pack.bias_stride = bias->stride(0);
  }
  if (features.scalar_type() == ScalarType::BFloat16) {
    run_stored<device::BFloat16>(stream, call, pack, features);
  } else {
    run_stored<device::Float16>(stream, call, pack, features);
  }
}

Tensor per_row(const Tensor& features, ScalarType dtype = ScalarType::Float) {
  return empty_of(features, {features.size(0)}, dtype);
}
float* floats_of(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}
int64_t* indices_of(const Tensor& tensor) {
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& features, const Tensor& weight) {
  if (!bias) return;
  check_same_device(*bias, "bias", features, "features");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == features.scalar_type(),
                  "bias: expected [K] in the dtype of features");
}

Tensor linear_score(std::string score, const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                    double temperature) {
  STD_TORCH_CHECK(score == "energy" || score == "joint_energy", "score: expected energy or joint_energy, got ", score);
  check_streams(features, weight, "weight");
  check_bias(bias, features, weight);
  Tensor value = per_row(features);
  StreamCall call{};
  call.reduction = score == "energy" ? Stream::kEnergy : Stream::kJointEnergy;
  call.temperature = float(temperature);
  call.value = floats_of(value);
  run(call, features, weight, bias);
  return value;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_scores(const Tensor& features, const Tensor& weight,
                                                                 const std::optional<Tensor>& bias) {
  check_streams(features, weight, "weight");
  check_bias(bias, features, weight);
  Tensor energy = per_row(features), joint_energy = per_row(features), max_logit = per_row(features);
  Tensor argmax = per_row(features, ScalarType::Long), msp = per_row(features);
  StreamCall call{};
  call.reduction = Stream::kScores;
  call.temperature = 1;
  call.value = floats_of(energy);
  call.joint_energy = floats_of(joint_energy);
  call.max_logit = floats_of(max_logit);
  call.msp = floats_of(msp);
  call.index = indices_of(argmax);
  run(call, features, weight, bias);
  return {energy, joint_energy, max_logit, argmax, msp};
}

Tensor alignment(const Tensor& features, const Tensor& weight) {
  check_streams(features, weight, "weight");
  Tensor value = per_row(features);
  StreamCall call{};
  call.reduction = Stream::kAlignment;
  call.value = floats_of(value);
  run(call, features, weight, std::nullopt);
  return value;
}

std::tuple<Tensor, Tensor> nearest_center(const Tensor& features, const Tensor& centers, bool normalize) {
  STD_TORCH_CHECK(!normalize, "normalize: expected rows that are normalised already");
  check_streams(features, centers, "centers");
  Tensor index = per_row(features, ScalarType::Long), distance = per_row(features);
  StreamCall call{};
  call.reduction = Stream::kNearest;
  call.value = floats_of(distance);
  call.index = indices_of(index);
  run(call, features, centers, std::nullopt);
  return {index, distance};
}

template <class Stored, class BasisStored, int kBlocks>
void run_subspace(const CudaStream& stream, device::SubspaceCall call, device::PackBasisCall pack, const Tensor& like) {
  using Shape = device::SubspaceShape<kBlocks>;
  const int64_t slabs = (call.columns + device::kSlab - 1) / device::kSlab;
  const int64_t words = 2 * slabs * call.parts * kBlocks * 32;
  const Tensor workspace = empty_of(like, {4 * words + 3}, ScalarType::Float);
  pack.blocks = kBlocks;
  pack.packed = aligned_words(workspace);
  call.packed = pack.packed;
  const int64_t pack_blocks = (words + device::kThreads - 1) / device::kThreads;
  stream.launch("pack_basis", device::pack_basis<BasisStored>, pack_blocks < 1024 ? pack_blocks : 1024,
                device::kThreads, 0, pack);
  const int64_t tiles = (call.rows + Shape::kRows - 1) / Shape::kRows;
  stream.launch("subspace_rows", device::subspace_rows<Stored, kBlocks>,
                tiles < stream.multiprocessors() ? tiles : stream.multiprocessors(), device::kThreads,
                2 * 16 * Shape::kGroup, call);
}

template <class Stored, class BasisStored>
void run_subspace_stored(const CudaStream& stream, const device::SubspaceCall& call, const device::PackBasisCall& pack,
                         const Tensor& like) {
  if (call.rank <= 16) return run_subspace<Stored, BasisStored, 2>(stream, call, pack, like);
  if (call.rank <= 64) return run_subspace<Stored, BasisStored, 8>(stream, call, pack, like);
  if (call.rank <= 112) return run_subspace<Stored, BasisStored, 14>(stream, call, pack, like);
  return run_subspace<Stored, BasisStored, 24>(stream, call, pack, like);
}

std::tuple<Tensor, Tensor> subspace_energy(const Tensor& features, const Tensor& basis) {
  check_features(features);
  check_matrix(basis, "basis");
  check_same_device(basis, "basis", features, "features");
  STD_TORCH_CHECK(basis.size(0) == features.size(1), "basis: expected [D, r] for features [N, D]");
  const bool wide = basis.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || basis.scalar_type() == features.scalar_type(),
                  "basis: expected float32 or the dtype of features");
  STD_TORCH_CHECK(basis.size(1) >= 1 && basis.size(1) <= device::kMostClasses,
                  "basis: the CUDA kernels take 1 to 192 columns, got ", basis.size(1));
  Tensor inside = per_row(features), outside = per_row(features);
  if (features.size(0) == 0) return {inside, outside};
  const CudaStream stream(features);
  const Rows x = as_rows(features);
  device::SubspaceCall call{};
  call.features = x.data();
  call.features_stride = x.stride;
  call.rows = x.rows;
  call.columns = int(x.columns);
  call.rank = int(basis.size(1));
  call.aligned = aligned(x);
  call.inside = floats_of(inside);
  call.outside = floats_of(outside);
  device::PackBasisCall pack{};
  pack.basis = basis.const_data_ptr();
  pack.row_stride = basis.stride(0);
  pack.column_stride = basis.stride(1);
  pack.columns = call.columns;
  pack.rank = call.rank;
  const bool brain = features.scalar_type() == ScalarType::BFloat16;
  pack.parts = call.parts = wide ? 3 : brain ? 1 : 2;
  if (brain) {
    if (wide) {
      run_subspace_stored<device::BFloat16, float>(stream, call, pack, features);
    } else {
      run_subspace_stored<device::BFloat16, device::BFloat16>(stream, call, pack, features);
    }
  } else if (wide) {
    run_subspace_stored<device::Float16, float>(stream, call, pack, features);
  } else {
    run_subspace_stored<device::Float16, device::Float16>(stream, call, pack, features);
  }
  return {inside, outside};
}

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  m.impl("linear_score", TORCH_BOX(&oodkern::linear_score));
  m.impl("linear_scores", TORCH_BOX(&oodkern::linear_scores));
  m.impl("alignment", TORCH_BOX(&oodkern::alignment));
  m.impl("subspace_energy", TORCH_BOX(&oodkern::subspace_energy));
  m.impl("nearest_center", TORCH_BOX(&oodkern::nearest_center));
}
