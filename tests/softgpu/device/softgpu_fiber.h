// One fiber per CUDA thread. Fibers of a block take turns on one OS thread and change only where a thread waits: in a
// barrier, in a warp operation, in a spin loop. When no fiber can run, the block is in a deadlock, and it is known who
// waits where. Hand-written switch for x86-64 and aarch64 System V.
#pragma once

namespace softgpu {
enum { MAX_THREADS = 1024, STACK = 64 * 1024, MAX_PAYLOAD = 64, MAX_MASKS = 8, SMEM_BYTES = 256 * 1024 };

// What the lanes of a warp have posted, and what the last of them has made of it for all.
struct Table {
  alignas(32) unsigned char posted[32][MAX_PAYLOAD];
  alignas(32) float product[16][8];
};
// One meeting place per warp and participation mask. Two tables: a lane may post for the next meeting while a slower
// one still reads this one's.
struct WarpSync {
  uint32_t mask, arrived, generation;
  Table table[2];
};
struct Warp {
  int count;
  WarpSync sync[MAX_MASKS];
};
struct AsyncCopy {
  void* dst;
  const void* src;
  uint32_t bytes, fill, group;  // copies `bytes`, then zeroes up to `fill`
};
enum FiberState : uint8_t { FRESH, LIVE, DONE };
struct Block;
struct Fiber {
  void* sp;
  void* stack;
  uint3 tid;
  uint32_t linear;
  uint16_t lane, warp;
  FiberState state;
  const uint32_t* wait;  // waits until *wait differs from wait_for; null: can run
  uint32_t wait_for;
  const char* why;
  uint32_t copy_group, copies, copy_room;
  AsyncCopy* copy;
  Block* blk;
};
struct Block {
  Fiber f[MAX_THREADS];
  Warp w[MAX_THREADS / 32];
  uint32_t n, live, bar_arrived, bar_generation, bar_sum, bar_result;
  uint3 bid;
  dim3 bdim, gdim;
  void (*fn)(void**);
  void** params;
  void* main_sp;
  void* free_stack[MAX_THREADS];
  uint32_t free_stacks, used_stacks;
  unsigned char *stacks, *smem;
  const char* error;
  uint64_t switches, spins, rng;  // rng 0: fibers take turns in order
};

// The running fiber is found from the stack pointer: stacks are STACK-aligned and begin with {Fiber*, canary}. A
// thread-local would cost a call per access, and the cheap TLS model is out of reach, because __shared__ arrays are
// TLS too and would have to fit the static TLS block.
enum : uint64_t { CANARY = 0x5afe57acull };
__attribute__((always_inline)) inline Fiber* self() {
  return *(Fiber**)((uintptr_t)__builtin_frame_address(0) & ~(uintptr_t)(STACK - 1));
}

#ifndef SOFTGPU_IMPL
void block_on(const uint32_t* word, uint32_t value, const char* why);
void fail(const char* message);
void spin_hint();
#else
extern "C" void softgpu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type softgpu_switch,@function
softgpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size softgpu_switch,.-softgpu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type softgpu_switch,%function
softgpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "softgpu knows how to switch fibers on x86-64 and aarch64 only"
#endif
extern "C" __attribute__((noinline)) void softgpu_entry();

static inline bool runnable(const Fiber& f) {
  return f.state == FRESH || (f.state == LIVE && (!f.wait || *f.wait != f.wait_for));
}
// The next fiber that can run: round robin, or from a random place when the order is to be shaken.
static Fiber* find(Block* b, uint32_t from) {
  if (b->rng) {
    b->rng ^= b->rng << 13, b->rng ^= b->rng >> 7, b->rng ^= b->rng << 17;
    from = (uint32_t)(b->rng % b->n);
  }
  for (uint32_t k = 1; k <= b->n; k++) {
    uint32_t i = from + k;
    if (i >= b->n) i -= b->n;
    if (runnable(b->f[i])) return &b->f[i];
  }
  return nullptr;
}
// Finds the next fiber and gives it a stack if it never ran.
static Fiber* pick(Block* b, uint32_t from) {
  Fiber* f = find(b, from);
  if (!f || f->state != FRESH) return f;
  void* stack = b->free_stacks ? b->free_stack[--b->free_stacks] : b->stacks + (size_t)(b->used_stacks++) * STACK;
  f->stack = stack;
  ((Fiber**)stack)[0] = f;
  ((uint64_t*)stack)[1] = CANARY;
  uintptr_t* top = (uintptr_t*)((char*)stack + STACK);
#if defined(__x86_64__)
  *--top = 0;  // stands for a return address: rsp % 16 is 8 on entry, as after a call
  *--top = (uintptr_t)softgpu_entry;
  for (int saved = 0; saved < 6; saved++) *--top = 0;
#else
  top -= 20;
  for (int saved = 0; saved < 20; saved++) top[saved] = 0;
  top[11] = (uintptr_t)softgpu_entry;
#endif
  f->sp = top;
  f->state = LIVE;
  f->wait = nullptr;
  return f;
}
// Leaves the block for good: back to softgpu_run, which reports b->error.
__attribute__((noreturn, noinline)) static void leave(Block* b, const char* error) {
  b->error = error;
  void* nobody;
  softgpu_switch(&nobody, b->main_sp);
  __builtin_unreachable();
}
__attribute__((noinline)) void fail(const char* message) { leave(self()->blk, message); }
// Entered by the driver stand-in's SIGSEGV handler, on the stack of the fiber that touched what it may not touch.
extern "C" __attribute__((visibility("default"), noinline)) void softgpu_fault() {
  leave(self()->blk, "illegal memory access");
}
// Waits until *word differs from value.
__attribute__((noinline)) void block_on(const uint32_t* word, uint32_t value, const char* why) {
  Fiber* me = self();
  Block* b = me->blk;
  if (((uint64_t*)me->stack)[1] != CANARY) leave(b, "stack overflow");
  me->wait = word;
  me->wait_for = value;
  me->why = why;
  Fiber* next = pick(b, me->linear);
  if (!next) leave(b, "deadlock");
  if (next != me) {
    b->switches++;
    softgpu_switch(&me->sp, next->sp);
  }
  me->wait = nullptr;
}
// Called in every turn of a spin loop: the value waited for may come from a thread of this block, or from another
// process that needs this core.
__attribute__((noinline)) void spin_hint() {
  Fiber* me = self();
  Block* b = me->blk;
  me->wait = nullptr;
  if (++b->spins % 256 == 0) {
    timespec pause{0, 50000};
    nanosleep(&pause, nullptr);
  }
  Fiber* next = pick(b, me->linear);
  if (next && next != me) {
    b->switches++;
    softgpu_switch(&me->sp, next->sp);
  } else {
    sched_yield();
  }
}
static void release_barrier(Block* b) {
  b->bar_result = b->bar_sum;
  b->bar_arrived = 0;
  b->bar_generation++;
}
extern "C" void softgpu_entry() {
  for (;;) {
    Fiber* me = self();
    Block* b = me->blk;
    b->fn(b->params);
    me->state = DONE;
    b->live--;
    if (b->live && b->bar_arrived == b->live) release_barrier(b);  // as on a GPU, the dead do not hold a barrier
    Fiber* next = b->live ? find(b, me->linear) : nullptr;
    if (!next) leave(b, b->live ? "deadlock: a thread returned while others wait for it" : b->error);
    if (next->state == FRESH) {  // runs on this very stack: a kernel that never waits never switches
      next->stack = me->stack;
      next->state = LIVE;
      next->wait = nullptr;
      *(Fiber* volatile*)me->stack = next;
      continue;
    }
    // The stack may be taken by the next fresh fiber, but not before the switch away from it is over.
    b->free_stack[b->free_stacks++] = me->stack;
    void* nobody;
    softgpu_switch(&nobody, next->sp);
    __builtin_unreachable();
  }
}
#endif
}  // namespace softgpu
