// The row engine of csrc/cuda in the emulator: one call of a room, as Python makes it.
#include "program.h"

#include "cuda/row_launch.h"

using namespace oodkern;

namespace {

struct Span {  // elements of a tensor [..., K], or [...], as they lie in memory
  void* data;
  int64_t elements;
  int64_t offset;  // in bytes, behind a multiple of 16
};

struct Call {  // what Python's `Call` declares
  int64_t reduction, pass, storage, rows, columns, multiprocessors, order, seed;
  double temperature, sign;
  Span logits, score, saved_score, grad_score, grad_logits, cotangent, grad_grad_score;
  int64_t logits_stride, saved_score_stride, grad_score_stride, cotangent_stride;
};

struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) const {
    // More blocks than these only repeat what these do; fewer also test that kernels walk over what is left.
    emulator::launch(name, kernel, unsigned(blocks < 24 ? blocks : 24), device::kThreads, 0, Parameters(arguments)...);
  }
};

void run(const Call& from) {
  emulator::settings = {emulator::Order(from.order), unsigned(from.seed)};
  RowCall call{};
  call.reduction = Reduction(from.reduction);
  call.pass = Pass(from.pass);
  call.storage = Storage(from.storage);
  call.temperature = from.temperature;
  call.sign = from.sign;
  call.columns = from.columns;
  const size_t bytes = size_t(device::bytes_of(call.storage));
  const size_t real = call.storage == Storage::kFloat64 ? 8 : 4;

  std::vector<std::unique_ptr<emulator::Buffer>> buffers;
  std::vector<void*> results;
  const auto buffer = [&](const char* name, const Span& span, size_t size, bool result) {
    buffers.push_back(std::make_unique<emulator::Buffer>(name, size_t(span.elements) * size, size_t(span.offset),
                                                         result ? nullptr : span.data));
    results.push_back(result ? span.data : nullptr);
    return static_cast<void*>(buffers.back()->data());
  };
  call.logits = buffer("logits", from.logits, bytes, false);
  call.logits_stride = from.logits_stride;
  call.score = buffer("score", from.score, real, true);
  call.saved_score = buffer("saved_score", from.saved_score, real, false);
  call.saved_score_stride = from.saved_score_stride;
  call.grad_score = buffer("grad_score", from.grad_score, real, false);
  call.grad_score_stride = from.grad_score_stride;
  call.grad_logits = buffer("grad_logits", from.grad_logits, bytes, true);
  call.cotangent = buffer("cotangent", from.cotangent, bytes, false);
  call.cotangent_stride = from.cotangent_stride;
  call.grad_grad_score = buffer("grad_grad_score", from.grad_grad_score, real, true);

  const int64_t splits = device::row_splits(call, from.rows, from.multiprocessors);
  const Span none{nullptr, splits > 1 ? from.rows * splits * 2 : 0, 0};
  void* partials = buffer("partials", none, real, false);
  if (call.reduction == Reduction::kLogSumExp) {
    device::run_rows<LogSumExp>(call, from.rows, splits, partials, Launch());
  } else {
    device::run_rows<SoftplusSum>(call, from.rows, splits, partials, Launch());
  }
  for (size_t i = 0; i < buffers.size(); ++i) buffers[i]->finish(results[i]);
}

}  // namespace

extern "C" const char* run_rows(const Call* call) {
  return emulator::guarded([&] { run(*call); });
}

namespace {

// For the sanitizers: every pass of every reducer and storage over rows of several lengths and alignments, all zeros,
// whose results are known.
void check(Call call, int64_t columns, int64_t offset) {
  const int64_t real = call.storage == 0 ? 8 : 4, bytes = device::bytes_of(Storage(call.storage));
  call.columns = columns;
  call.logits_stride = columns + 1;
  call.cotangent_stride = columns;
  call.saved_score_stride = call.grad_score_stride = 1;
  const int64_t elements = (call.rows - 1) * (columns + 1) + columns;
  std::vector<char> zeros(size_t(elements * 8)), saved(size_t(call.rows * 8)), score(size_t(call.rows * 8));
  const double expected = std::log(columns < 1 ? 1.0 : double(columns)) * (call.reduction ? 0 : -1) +
                          (call.reduction ? double(columns) * std::log(2.0) : 0);
  call.logits = {zeros.data(), elements, offset * bytes};
  call.cotangent = {zeros.data(), call.rows * columns, 0};
  call.grad_score = {saved.data(), call.rows, 0};
  call.saved_score = {saved.data(), call.rows, 0};
  call.score = {score.data(), call.rows, 0};
  std::vector<char> grad(size_t(call.rows * columns * 8)), grad_grad(size_t(call.rows * 8));
  call.grad_logits = {grad.data(), call.rows * columns, 0};
  call.grad_grad_score = {grad_grad.data(), call.rows, 0};
  run(call);
  for (int64_t row = 0; row < call.rows && call.pass == 0; ++row) {
    const double value =
        real == 8 ? reinterpret_cast<double*>(score.data())[row] : double(reinterpret_cast<float*>(score.data())[row]);
    if (!(std::fabs(value - expected) <= 1e-5 * std::fabs(expected))) throw emulator::Error("a wrong score");
  }
  for (const char byte : call.pass ? grad : std::vector<char>()) {
    if (byte & 0x7f) throw emulator::Error("a wrong gradient of an upstream of zeros");
  }
}

}  // namespace

int main() {
  const std::string said = emulator::guarded([] {
    for (int64_t i = 0; i < 24; ++i) {
      for (const int64_t columns : {1, 37, 200, 1000, 5000}) {
        Call call{};
        call.reduction = i % 2;
        call.pass = i / 2 % 3;
        call.storage = i / 6;
        call.rows = 3;
        call.multiprocessors = columns % 3 ? 1 : 4;
        call.order = i % 3;
        call.temperature = 1;
        call.sign = call.reduction ? 1 : -1;
        check(call, columns, columns % 2);
      }
    }
  });
  std::printf("%s\n", launched_kernels());
  if (!said.empty()) std::fprintf(stderr, "%s\n", said.c_str());
  return said.empty() ? 0 : 3;
}
