// Fibers for cuda_emulation.h: a few instructions on x86-64, ucontext elsewhere, and what each sanitizer has to know.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// Whoever switches fibers must not be instrumented: the shadow call stack would not balance.
#define NO_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define NO_TSAN
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

// The emulator's own reads and writes, of which TSan is to know nothing.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unseen() {}
#endif
};

#if defined(__SANITIZE_THREAD__)
inline void tsan_release(void* p) { __tsan_release(p); }
inline void tsan_acquire(void* p) { __tsan_acquire(p); }
#else
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

// What TSan takes for a few more threads, in turn: making one for each use takes it a millisecond.
class Engines {
 public:
  Engines() {
#if defined(__SANITIZE_THREAD__)
    for (void*& e : engines_) e = __tsan_create_fiber(0);
#endif
  }
  ~Engines() {
#if defined(__SANITIZE_THREAD__)
    for (void* e : engines_) __tsan_destroy_fiber(e);
#endif
  }
  Engines(const Engines&) = delete;
  Engines& operator=(const Engines&) = delete;

  // Runs `work` as the next of them; it must not switch fibers.
  template <class Work>
  NO_TSAN void run(const Work& work) {
#if defined(__SANITIZE_THREAD__)
    void* before = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(engines_[next_++ % 4], __tsan_switch_to_fiber_no_sync);
    work();
    __tsan_switch_to_fiber(before, __tsan_switch_to_fiber_no_sync);
#else
    work();
#endif
  }

 private:
#if defined(__SANITIZE_THREAD__)
  void* engines_[4];
  unsigned next_ = 0;
#endif
};

struct Stack {
  static constexpr size_t kBytes = 128 << 10;
  std::unique_ptr<char[]> memory{new char[kBytes]};
  void* tsan = nullptr;  // what TSan takes for the thread that runs on it: kept, because making one takes it long
};

struct Fiber {
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  const char* stack = nullptr;  // nullptr: the OS thread's own
  void* tsan = nullptr;
};

#if defined(__x86_64__)
extern "C" void exeunt_emu_switch(void** from, void* to);
asm(R"(.text
.weak exeunt_emu_switch
.type exeunt_emu_switch,@function
exeunt_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size exeunt_emu_switch,.-exeunt_emu_switch)");
#endif

NO_TSAN inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  // The OS thread's stack is known to ASan already; it needs bounds only where a fiber is entered.
  __sanitizer_start_switch_fiber(&fake, to.stack, to.stack ? Stack::kBytes : 0);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  exeunt_emu_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// The first thing that a new fiber does.
inline void fiber_started() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

NO_TSAN inline void make_fiber(Fiber& fiber, Stack& stack, void (*main)()) {
  char* memory = stack.memory.get();
  fiber.stack = memory;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, Stack::kBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  if (!stack.tsan) stack.tsan = __tsan_create_fiber(0);
  fiber.tsan = stack.tsan;
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + Stack::kBytes) & ~uintptr_t{63});
  *--top = nullptr;  // where main would return to; it never does
  *--top = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six registers that a switch restores
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {memory, 0, Stack::kBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, main, 0);
#endif
}

// Marks the running OS thread as the fiber that others return to; TSan sees nothing of what it does meanwhile.
struct FiberScope {
  explicit FiberScope(Fiber& main) {
#if defined(__SANITIZE_THREAD__)
    main.tsan = __tsan_get_current_fiber();
#else
    (void)main;
#endif
  }
  Unseen unseen;
};

}  // namespace emu
