// Room `heads` on any device: arguments checked, results allocated, one HeadCall made of both. An Engine brings
//   run(call, rows, logits)   computes it
//   prepare(data, bytes)      is told of large results before they are written
#pragma once

#include <optional>
#include <string>

#include "check.h"
#include "cpu/heads.h"

namespace oodkern {

inline Head head_of(const std::string& name) {
  if (name == "oe") return Head::kUniform;
  if (name == "energy_in") return Head::kEnergyIn;
  if (name == "energy_out") return Head::kEnergyOut;
  STD_TORCH_CHECK(name == "bce", "head: expected oe, energy_in, energy_out or bce, got ", name);
  return Head::kBinary;
}

inline Target target_of(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Double: return Target::kFloat64;
    case ScalarType::Float: return Target::kFloat32;
    case ScalarType::BFloat16: return Target::kBFloat16;
    case ScalarType::Half: return Target::kFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Target::kUint8;
    case ScalarType::Char: return Target::kInt8;
    case ScalarType::Short: return Target::kInt16;
    case ScalarType::Int: return Target::kInt32;
    case ScalarType::Long: return Target::kInt64;
    default: STD_TORCH_CHECK(false, "target: expected bool, integers or a floating dtype");
  }
  return Target::kFloat32;
}

// The tensors of a call, which own what it points to.
struct GivenHead {
  Head head;
  Rows logits;
  std::optional<Rows> target;
};

inline GivenHead given_head(const std::string& name, const Tensor& logits, const std::optional<Tensor>& target) {
  check_logits(logits);
  GivenHead all{head_of(name), as_rows(logits), std::nullopt};
  STD_TORCH_CHECK(target.has_value() == (all.head == Head::kBinary), "target: goes with head bce, and with no other");
  if (target) {
    STD_TORCH_CHECK(sizes_of(*target) == sizes_of(logits), "target: expected the shape of logits");
    check_same_device(*target, "target", logits);
    all.target = as_rows(*target);
  }
  return all;
}

inline HeadCall call_of(const GivenHead& all, const Tensor& logits, double margin) {
  HeadCall call{};
  call.head = all.head;
  call.storage = storage_of(logits);
  call.margin = margin;
  call.columns = all.logits.columns;
  call.logits = all.logits.data();
  call.logits_stride = all.logits.stride;
  if (all.target) {
    call.target_storage = target_of(all.target->tensor);
    call.target = all.target->data();
    call.target_stride = all.target->stride;
  }
  return call;
}

// [..., count] of logits [..., K].
inline std::vector<int64_t> per_row(const Tensor& logits, int64_t count) {
  std::vector<int64_t> sizes = sizes_of(logits);
  sizes.back() = count;
  return sizes;
}

template <class Engine>
struct HeadOps {
  static void ask_for(HeadCall& call, const Column& upstream, Tensor& gradient) {
    call.grad_value = upstream.data();
    call.grad_value_stride = upstream.stride;
    call.grad_logits = gradient.mutable_data_ptr();
    Engine::prepare(call.grad_logits, gradient.numel() * int64_t(gradient.element_size()));
  }

  static std::tuple<Tensor, Tensor, Tensor> head(std::string name, const Tensor& logits, std::optional<Tensor> target,
                                                 double margin, std::optional<Tensor> upstream) {
    const GivenHead all = given_head(name, logits, target);
    std::optional<Column> foreseen;
    if (upstream) {
      check_per_row(*upstream, "upstream", logits);
      check_same_device(*upstream, "upstream", logits);
      foreseen = as_column(*upstream);
    }
    std::vector<int64_t> sizes = sizes_of(logits);
    sizes.pop_back();
    Tensor value = empty_of(logits, sizes, score_dtype(logits));
    Tensor rows = empty_of(logits, per_row(logits, all.target ? 0 : 3), score_dtype(logits));
    Tensor gradient = empty_of(logits, per_row(logits, upstream ? all.logits.columns : 0), logits.scalar_type());
    HeadCall call = call_of(all, logits, margin);
    call.value = value.mutable_data_ptr();
    call.rows = rows.mutable_data_ptr();
    if (foreseen) ask_for(call, *foreseen, gradient);
    if (all.logits.rows) Engine::run(call, all.logits.rows, logits);
    return {value, rows, gradient};
  }

  // `foreseen` is what `gradient` is formed for; null where nothing is formed.
  static void differentiate(const std::string& name, const Tensor& grad, const Tensor* foreseen, const Tensor& logits,
                            const std::optional<Tensor>& target, double margin, const Tensor& rows, Tensor& gradient) {
    const GivenHead all = given_head(name, logits, target);
    check_per_row(grad, "grad", logits);
    check_same_device(grad, "grad", logits);
    STD_TORCH_CHECK(sizes_of(rows) == per_row(logits, all.target ? 0 : 3) && rows.scalar_type() == score_dtype(logits),
                    "rows: expected what the head gave for these logits");
    check_same_device(rows, "rows", logits);
    const Column upstream = as_column(grad);
    const Tensor dense = torch::stable::contiguous(rows);
    if (gradient.numel() == 0) return;
    HeadCall call = call_of(all, logits, margin);
    call.rows = const_cast<void*>(dense.const_data_ptr());
    ask_for(call, upstream, gradient);
    std::optional<Column> formed_for;
    if (foreseen) {
      check_per_row(*foreseen, "foreseen", logits);
      check_same_device(*foreseen, "foreseen", logits);
      formed_for = as_column(*foreseen);
      call.foreseen = formed_for->data();
      call.foreseen_stride = formed_for->stride;
    }
    Engine::run(call, all.logits.rows, logits);
  }

  static Tensor head_backward(std::string name, const Tensor& grad, const Tensor& logits, std::optional<Tensor> target,
                              double margin, const Tensor& rows) {
    check_logits(logits);
    Tensor gradient = empty_of(logits, sizes_of(logits), logits.scalar_type());
    differentiate(name, grad, nullptr, logits, target, margin, rows, gradient);
    return gradient;
  }

  static void head_mend(std::string name, Tensor gradient, const Tensor& grad, const Tensor& foreseen,
                        const Tensor& logits, std::optional<Tensor> target, double margin, const Tensor& rows) {
    check_same_shape(gradient, "gradient", logits);
    check_same_device(gradient, "gradient", logits);
    STD_TORCH_CHECK(gradient.is_contiguous(), "gradient: expected what the head gave, dense");
    differentiate(name, grad, &foreseen, logits, target, margin, rows, gradient);
  }
};

}  // namespace oodkern

// The room's raw ops in a registration.
#define OODKERN_HEAD_OPS(m, Engine)                                             \
  m.impl("head", TORCH_BOX(&oodkern::HeadOps<Engine>::head));                   \
  m.impl("head_backward", TORCH_BOX(&oodkern::HeadOps<Engine>::head_backward)); \
  m.impl("head_mend", TORCH_BOX(&oodkern::HeadOps<Engine>::head_mend))
