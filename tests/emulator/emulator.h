// Runs CUDA kernels on the CPU: g++ compiles the same headers that nvcc does, with cuda_words.h in the place of the
// CUDA runtime. Every thread of a block is a fiber; barriers and warp operations are rendezvous of fibers, and a
// rendezvous that cannot complete is an error that says who waits where. Threads run in an order that the caller
// chooses, so that what depends on it shows; shared memory (memory.h) reports races whatever the order. Nothing here is
// thread-safe.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulator {

constexpr unsigned kWarp = 32;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class Order { kAscending, kDescending, kShuffled };

// Where a fiber waits. Two fibers meet only at the same operation of the same line.
struct Rendezvous {
  const char* operation = nullptr;
  const char* file = nullptr;
  int line = 0;
  uint32_t mask = 0;  // of a warp's lanes
  bool of_block = false;

  bool operator==(const Rendezvous& other) const {
    return std::strcmp(operation, other.operation) == 0 && line == other.line && std::strcmp(file, other.file) == 0 &&
           mask == other.mask && of_block == other.of_block;
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(operation) + " of " + (slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// A lane's numbers of a product A [16, 16] B [16, 8], in the order of csrc/cuda/mma.cuh.
struct Fragments {
  float a[8], b[4];
};

struct Thread {
  enum class State { kReady, kWaiting, kExited };
  Fiber fiber;
  unsigned index = 0;
  State state = State::kReady;
  Rendezvous at;
  uint64_t given = 0;                   // to the warp operation
  std::array<uint64_t, kWarp> taken{};  // of every lane, when it completed
  unsigned barriers = 0;                // __syncthreads passed
  std::array<unsigned, kWarp> known{};  // lane -> the last of its epochs that is ordered before this thread
  // Of the last two products: a lane may be at the next one while others still read what it gave to this one.
  std::array<Fragments, 2> fragments{};
  unsigned products = 0;
  std::vector<std::function<void()>> copies;  // asynchronous ones, which land when they are waited for
  unsigned lane() const { return index % kWarp; }

  Thread() : fiber(live) {}
  void begin() {
    state = State::kReady;
    barriers = 0;
    known.fill(0);
    known[lane()] = 1;
    products = 0;
    copies.clear();
  }
  static void live();  // one kernel after another
};

class Block;
inline Block* current = nullptr;
inline std::set<std::string> launched;  // names of kernels

class Block {
 public:
  Index index, grid;
  unsigned size;
  size_t dynamic_bytes;
  std::map<const void*, std::shared_ptr<void>> shared;  // by place of declaration
  size_t declared_bytes = 0;                            // of it, beside the launch's
  Thread* running = nullptr;

  Block(unsigned threads, size_t dynamic) : size(threads), dynamic_bytes(dynamic) {
    while (threads_.size() < threads) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->index = unsigned(threads_.size()) - 1;
    }
  }

  void run(const std::function<void()>& kernel, const std::vector<unsigned>& order) {
    kernel_ = &kernel;
    error_.clear();
    shared.clear();
    declared_bytes = 0;
    for (unsigned i = 0; i < size; ++i) threads_[i]->begin();
    for (bool moved = true; moved && error_.empty();) {
      moved = false;
      for (unsigned i : order) {
        if (threads_[i]->state != Thread::State::kReady) continue;
        moved = true;
        running = threads_[i].get();
        enter(running->fiber);
        if (!error_.empty()) break;
      }
    }
    if (error_.empty()) explain_deadlock();
    if (error_.empty()) return;
    threads_.clear();  // some are left in the middle of the kernel
    throw Error("block " + std::to_string(index.x) + ", " + error_);
  }

  // Waits until every thread of the group is at the same rendezvous.
  void meet(const Rendezvous& place) {
    Thread& self = *running;
    if (!place.of_block && !(place.mask >> self.lane() & 1)) {
      fail(place.text() + ": the mask leaves out lane " + std::to_string(self.lane()) + ", which takes part");
    }
    self.at = place;
    self.state = Thread::State::kWaiting;
    const std::vector<Thread*> group = members(place, self);
    for (Thread* thread : group) {
      if (thread->state != Thread::State::kWaiting || !(thread->at == place)) return leave(self.fiber);
    }
    complete(place, group);
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = (running ? "thread " + std::to_string(running->index) + ": " : "") + what;
    leave(running->fiber);
    __builtin_unreachable();
  }

 private:
  friend struct Thread;
  inline static std::vector<std::unique_ptr<Thread>> threads_;  // of every block, one after another
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;

  std::vector<Thread*> members(const Rendezvous& place, const Thread& self) {
    std::vector<Thread*> group;
    const unsigned first = place.of_block ? 0 : self.index - self.lane();
    for (unsigned i = 0; i < (place.of_block ? size : kWarp); ++i) {
      if (!place.of_block && !(place.mask >> i & 1)) continue;
      if (first + i >= size) fail(place.text() + ": the mask names lane " + std::to_string(i) + ", which is not there");
      group.push_back(threads_[first + i].get());
    }
    return group;
  }

  void complete(const Rendezvous& place, const std::vector<Thread*>& group) {
    const bool orders_memory = std::strcmp(place.operation, "__syncwarp") == 0;  // shuffles promise nothing of memory
    std::array<unsigned, kWarp> known{};
    for (Thread* thread : group) {
      for (unsigned i = 0; orders_memory && i < kWarp; ++i) known[i] = std::max(known[i], thread->known[i]);
    }
    for (Thread* thread : group) {
      thread->state = Thread::State::kReady;
      thread->barriers += place.of_block;
      if (place.of_block) continue;
      for (Thread* other : group) thread->taken[other->lane()] = other->given;
      if (orders_memory) {
        thread->known = known;
        ++thread->known[thread->lane()];
      }
    }
  }

  void explain_deadlock() {
    std::map<std::string, std::vector<unsigned>> places;
    bool waiting = false;
    for (unsigned i = 0; i < size; ++i) {
      const Thread& thread = *threads_[i];
      const bool exited = thread.state == Thread::State::kExited;
      waiting |= !exited;
      places[exited ? "have exited" : "wait at " + thread.at.text()].push_back(thread.index);
    }
    if (!waiting) return;
    error_ = "threads diverge:";
    for (const auto& [place, who] : places) {
      error_ += " " + std::to_string(who.size()) + " (first " + std::to_string(who[0]) + ") " + place + ";";
    }
    error_.pop_back();
  }
};

inline void Thread::live() {
  Thread& self = *current->running;
  arrived(self.fiber);
  for (;;) {
    (*current->kernel_)();
    self.state = State::kExited;
    leave(self.fiber);
  }
}

// How the next launches are run.
struct Settings {
  Order order = Order::kAscending;
  unsigned seed = 0;
};
inline Settings settings;

inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Order::kDescending) std::reverse(order.begin(), order.end());
  if (settings.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), std::mt19937(settings.seed));
  return order;
}

// kernel<<<blocks, threads, dynamic_bytes>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t dynamic_bytes,
            Arguments... arguments) {
  launched.insert(name);
  if (!blocks || !threads || threads > 1024)
    throw Error(std::string(name) + ": an invalid number of blocks or threads");
  const std::function<void()> body = [&] { kernel(arguments...); };
  Block block(threads, dynamic_bytes);
  block.grid = {blocks, 1, 1};
  current = &block;
  for (unsigned i : in_order(blocks)) {
    block.index = {i, 0, 0};
    try {
      block.run(body, in_order(threads));
    } catch (const Error& error) {
      current = nullptr;
      throw Error(std::string(name) + ": " + error.what());
    }
  }
  current = nullptr;
}

}  // namespace emulator
