// Fibers: functions that run on stacks of their own and hand control back to the scheduler where they like.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

constexpr size_t kStack = size_t(256) << 10;

// A stack of its own. ucontext changes the signal mask with every switch, which is two calls of the system, so it
// serves to get onto the stack the first time and setjmp from then on; AddressSanitizer knows swapcontext alone.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's

  Fiber() = default;
  explicit Fiber(void (*entry)()) : stack(std::make_unique_for_overwrite<char[]>(kStack)) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
inline Fiber scheduler;

#if defined(__SANITIZE_ADDRESS__)
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline void arrived(Fiber& self) {
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_size);
}
inline void enter(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler.context, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
}
inline void leave(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&fiber.context, &scheduler.context);
  arrived(fiber);
}
#else
inline void arrived(Fiber&) {}
inline void enter(Fiber& fiber) {
  if (_setjmp(scheduler.place)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
inline void leave(Fiber& fiber) {
  if (!_setjmp(fiber.place)) _longjmp(scheduler.place, 1);
}
#endif

}  // namespace emulator
