// What Python asks of the library that csrc/cuda/*.cu become when g++ compiles them: see emulated.py.
#include "cuda/host.h"
#include "program.h"

#pragma GCC visibility push(default)
extern "C" {

void set_up(int64_t order, int64_t seed, int64_t multiprocessors, int64_t shared_bytes, int64_t offset) {
  emulator::settings = {emulator::Order(order), unsigned(seed)};
  emulator::device.multiprocessors = multiprocessors;
  emulator::device.shared_bytes = shared_bytes;
  emulator::most_shared_bytes = size_t(shared_bytes);
  emulator::arena.offset = size_t(offset);
}

// `content`, copied to memory between guards, as far behind a multiple of 16 bytes as it lies itself.
void* place(const char* name, const void* content, int64_t bytes) {
  return emulator::arena.place(name, size_t(bytes), reinterpret_cast<uintptr_t>(content) % 16, content);
}

const char* check() {
  return emulator::guarded([] { emulator::arena.check(); });
}
void clear() {
  emulator::arena.clear();
}
}
#pragma GCC visibility pop
