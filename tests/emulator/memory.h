// Memory of the emulator: shared arrays that know who touched each word when, and buffers between guards.
#pragma once

#include "cuda_words.h"

namespace emulator {

// One access to a shared word, and whether a thread may rely on it.
struct Access {
  unsigned thread = 0, barriers = 0, epoch = 0;

  static Access now() {
    const Thread& self = *current->running;
    return {self.index, self.barriers, self.known[self.lane()]};
  }
  // Ordered before what the running thread does now: by program order, by a __syncthreads that both passed since, or
  // by a __syncwarp that carried it here.
  bool is_ordered() const {
    const Thread& self = *current->running;
    return thread == self.index || barriers < self.barriers ||
           (thread / kWarp == self.index / kWarp && self.known[thread % kWarp] >= epoch);
  }
};

struct Word {
  bool written = false;
  bool awaited = false;  // an asynchronous copy to it is under way
  Access writer;
  std::vector<Access> readers;    // since it was written
  std::vector<Access> atomics{};  // likewise: by atomic operations, which do not race with one another
};

template <class T>
struct SharedWords {
  std::vector<T> values;
  std::vector<Word> words;
  explicit SharedWords(size_t count) : values(count), words(count) {}
};

// An array in shared memory. Every access is checked: in bounds, after a write, and ordered with every other thread's.
template <class T>
class SharedArray {
 public:
  explicit SharedArray(SharedWords<T>* words) : words_(words) {}

  T load(int64_t i) const {
    Word& word = at(i);
    if (word.awaited) current->fail(place(i) + " is read while an asynchronous copy to it is under way");
    if (!word.written) current->fail(place(i) + " is read before anything was written to it");
    if (!word.writer.is_ordered()) race(i, "is read", "wrote it", word.writer);
    check_ordered(word.atomics, i, "is read", "had an atomic operation on it");
    note(word.readers);
    return words_->values[size_t(i)];
  }

  void store(int64_t i, T value) const {
    Word& word = at(i);
    if (word.awaited) current->fail(place(i) + " is written while an asynchronous copy to it is under way");
    if (word.written && !word.writer.is_ordered()) race(i, "is written", "wrote it", word.writer);
    check_ordered(word.readers, i, "is written", "read it");
    check_ordered(word.atomics, i, "is written", "had an atomic operation on it");
    word = {true, false, Access::now(), {}};
    words_->values[size_t(i)] = value;
  }

  // Written from now on, for whoever may still read the word; there when the thread has waited for it. `words` outlive
  // the block's threads.
  void copy_async(int64_t i, const T* from) const {
    store(i, T());
    at(i).awaited = true;
    current->running->copies.push_back([self = *this, i, from] {
      self.at(i).awaited = false;
      self.store(i, *from);
    });
  }

  // An atomic operation, one that `changes` the value or a read beside such. Returns the value before.
  template <class Change>
  T atomically(int64_t i, bool changes, Change change) const {
    Word& word = at(i);
    if (word.awaited) current->fail(place(i) + " has an atomic operation while an asynchronous copy is under way");
    if (!word.written) current->fail(place(i) + " is read before anything was written to it");
    if (!word.writer.is_ordered()) race(i, "has an atomic operation on it", "wrote it", word.writer);
    if (changes) check_ordered(word.readers, i, "has an atomic operation on it", "read it");
    note(word.atomics);
    const T before = words_->values[size_t(i)];
    words_->values[size_t(i)] = change(before);
    return before;
  }

 private:
  SharedWords<T>* words_;

  static std::string place(int64_t i) { return "shared word " + std::to_string(i); }
  Word& at(int64_t i) const {
    if (i < 0 || size_t(i) >= words_->words.size()) {
      current->fail(place(i) + " is outside an array of " + std::to_string(words_->words.size()));
    }
    return words_->words[size_t(i)];
  }
  static void check_ordered(const std::vector<Access>& others, int64_t i, const char* now, const char* then) {
    for (const Access& other : others) {
      if (!other.is_ordered()) race(i, now, then, other);
    }
  }
  static void note(std::vector<Access>& accesses) {
    const Access access = Access::now();
    const bool known = std::any_of(accesses.begin(), accesses.end(), [&](const Access& one) {
      return one.thread == access.thread && one.barriers == access.barriers && one.epoch == access.epoch;
    });
    if (!known) accesses.push_back(access);
  }
  static void race(int64_t i, const char* now, const char* then, const Access& other) {
    current->fail("race: " + place(i) + " " + now + " and thread " + std::to_string(other.thread) + " " + then +
                  ", with no barrier between");
  }
};

// The shared memory that a block can have. Of it 48 KB come without asking, which csrc/cuda/host.h does for dynamic
// memory beyond 40 KB: what is declared beside that has to be under 8 KB.
inline size_t most_shared_bytes = size_t(227) << 10;

template <class T>
SharedArray<T> shared_array(const void* declaration, size_t count, bool dynamic) {
  std::shared_ptr<void>& slot = current->shared[declaration];
  if (!slot) {
    slot = std::make_shared<SharedWords<T>>(count);
    if (!dynamic) current->declared_bytes += count * sizeof(T);
    const size_t bytes = current->declared_bytes + current->dynamic_bytes;
    const size_t free_of_asking = size_t(current->dynamic_bytes ? 8 : 48) << 10;
    if (current->declared_bytes > free_of_asking || bytes > most_shared_bytes) current->fail("too much shared memory");
  }
  return SharedArray<T>(static_cast<SharedWords<T>*>(slot.get()));
}

// Atomic operations on integers, in shared memory and in device memory (where nothing looks for races).
template <class T>
T relaxed(const SharedArray<T>& words, int64_t i) {
  return words.atomically(i, false, [](T before) { return before; });
}
template <class T>
void atomic_largest(const SharedArray<T>& words, int64_t i, T value) {
  words.atomically(i, true, [=](T before) { return std::max(before, value); });
}
template <class T>
T atomic_sum(const SharedArray<T>& words, int64_t i, T value) {
  return words.atomically(i, true, [=](T before) { return T(before + value); });
}
template <class T>
T relaxed(const T* address) {
  return *address;
}
template <class T>
void atomic_largest(T* address, T value) {
  *address = std::max(*address, value);
}
template <class T>
T atomic_sum(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline void check_alignment(const void* address, const char* what, size_t bytes = 16) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    const std::string number = std::to_string(bytes);
    current->fail(std::string(what) + " of " + number + " bytes at an address that is no multiple of " + number);
  }
}

// Device memory: `bytes` that begin `offset` bytes after a multiple of 16, between two guards. What lies outside is
// poison for AddressSanitizer; without it a store there is found afterwards, and a load finds NaN.
class Buffer {
 public:
  static constexpr size_t kGuard = 512;
  static constexpr unsigned char kPoison = 0xff;  // a NaN of every floating type

  Buffer(std::string name, size_t bytes, size_t offset, const void* content = nullptr)
      : name_(std::move(name)), bytes_(bytes), memory_(bytes + 2 * kGuard + 32, kPoison) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    data_ = memory_.data() + kGuard + (16 - begin % 16) % 16 + offset % 16;
    if (content && bytes) std::memcpy(data_, content, bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory_.data(), size_t(data_ - memory_.data()));
    __asan_poison_memory_region(data_ + bytes, size_t(memory_.data() + memory_.size() - data_) - bytes);
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { lift(); }

  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(data_);
  }

  // Throws where a guard was written to; copies the content out.
  void finish(void* content = nullptr) {
    lift();
    for (const unsigned char& byte : memory_) {
      if ((&byte < data_ || &byte >= data_ + bytes_) && byte != kPoison) {
        throw Error("out of bounds: a store " + std::to_string(&byte - data_) + " bytes from the beginning of `" +
                    name_ + "`, which has " + std::to_string(bytes_));
      }
    }
    if (content && bytes_) std::memcpy(content, data_, bytes_);
  }

 private:
  std::string name_;
  size_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* data_;

  void lift() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
#endif
  }
};

}  // namespace emulator
