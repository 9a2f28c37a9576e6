// The module's side of a launch. The unit registers its kernels by name; the parameter types are deduced from the
// function itself, so that the void** of cuLaunchKernel is unpacked without annotation.
#pragma once

namespace softgpu {
// Both structures are mirrored in src/module.rs.
struct Kernel {
  const char* name;
  void (*call)(void**);
  uint32_t params;
  const uint32_t* sizes;
  Kernel* next;
};
struct Run {
  const Kernel* kernel;
  uint32_t grid[3], block[3];
  uint32_t smem;     // bytes of dynamic shared memory
  uint32_t seed;     // not 0: fibers run in an order drawn from it
  void** params;
  uint64_t first, last;  // blocks [first, last)
  void** scratch;    // one word per OS thread, for the Block that is used again and again
  char* message;
  size_t message_len;
  uint64_t switches;  // out
};

extern Kernel* kernels;
template <class... A> struct Sizes { static constexpr uint32_t v[sizeof...(A) + 1] = {(uint32_t)sizeof(A)..., 0}; };
template <auto F, class... A, size_t... I> inline void unpack(void** p, std::index_sequence<I...>) {
  F((*(std::remove_reference_t<A>*)p[I])...);
}
template <auto F> struct Trampoline;
template <class... A, void (*F)(A...)> struct Trampoline<F> {
  static void call(void** p) { unpack<F, A...>(p, std::index_sequence_for<A...>{}); }
  static constexpr uint32_t n = sizeof...(A);
  static const uint32_t* sizes() { return Sizes<A...>::v; }
};
struct Registration {
  Kernel k;
  template <class T> Registration(const char* name, T*) {
    k = {name, &T::call, T::n, T::sizes(), kernels};
    kernels = &k;
  }
};
#define SOFTGPU_CAT_(a, b) a##b
#define SOFTGPU_CAT(a, b) SOFTGPU_CAT_(a, b)
#define SOFTGPU_REGISTER(str, ...) \
  static softgpu::Registration SOFTGPU_CAT(softgpu_kernel_, __COUNTER__){str, (softgpu::Trampoline<&__VA_ARGS__>*)nullptr};

#ifdef SOFTGPU_IMPL
Kernel* kernels = nullptr;
extern "C" __attribute__((visibility("default"))) const Kernel* softgpu_find(const char* name) {
  for (Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return k;
  return nullptr;
}
static void* pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
// Kept for the life of the OS thread: a thousand stacks are cheap to keep and dear to make.
static Block* block_of_thread(void** scratch) {
  if (*scratch) return (Block*)*scratch;
  Block* b = (Block*)pages(sizeof(Block));
  void* stacks = pages((size_t)(MAX_THREADS + 1) * STACK);
  void* smem = pages(SMEM_BYTES);
  if (!b || !stacks || !smem) return nullptr;
  b->stacks = (unsigned char*)(((uintptr_t)stacks + STACK - 1) & ~(uintptr_t)(STACK - 1));
  b->smem = (unsigned char*)smem;
  *scratch = b;
  return b;
}
// The static __shared__ variables of the module are all of its thread-local memory: the loader says where this OS thread
// has it, so that it can be filled before each block.
static thread_local unsigned char shared_anchor;  // makes sure that there is such memory, once it is touched
struct SharedMemory {
  unsigned char* start;
  size_t bytes;
};
static int find_shared(dl_phdr_info* object, size_t, void* found) {
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < object->dlpi_phnum; i++) {
    const auto& segment = object->dlpi_phdr[i];
    const uintptr_t offset = (uintptr_t)&kernels - object->dlpi_addr - segment.p_vaddr;
    if (segment.p_type == PT_LOAD) ours |= offset < segment.p_memsz;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (ours) *(SharedMemory*)found = {(unsigned char*)object->dlpi_tls_data, bytes};
  return ours;
}
static SharedMemory shared_of_thread() {
  SharedMemory found{nullptr, 0};
  *(volatile unsigned char*)&shared_anchor = 0;
  dl_iterate_phdr(find_shared, &found);
  return found.start ? found : SharedMemory{nullptr, 0};
}
static void prepare_launch(Block* b, const Run* run) {
  b->bdim = {run->block[0], run->block[1], run->block[2]};
  b->gdim = {run->grid[0], run->grid[1], run->grid[2]};
  b->fn = run->kernel->call;
  b->params = run->params;
  b->n = run->block[0] * run->block[1] * run->block[2];
  b->switches = 0;
  b->rng = run->seed;
  b->error = nullptr;
  for (uint32_t i = 0; i < b->n; i++) {
    Fiber& f = b->f[i];
    f.blk = b;
    f.linear = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.tid = {i % run->block[0], i / run->block[0] % run->block[1], i / (run->block[0] * run->block[1])};
  }
}
static void prepare_block(Block* b, uint64_t index, uint32_t smem, SharedMemory shared) {
  const uint64_t x = b->gdim.x, y = b->gdim.y;
  b->bid = {(unsigned)(index % x), (unsigned)(index / x % y), (unsigned)(index / (x * y))};
  for (uint32_t i = 0; i < b->n; i++) {
    Fiber& f = b->f[i];
    f.state = FRESH;
    f.wait = nullptr;
    f.copies = f.copy_group = 0;
  }
  for (uint32_t i = 0; i < (b->n + 31) / 32; i++) b->w[i].count = 0;
  b->live = b->n;
  b->bar_arrived = b->bar_generation = b->free_stacks = b->used_stacks = 0;
  // NaN: nothing useful is in shared memory before somebody has written it.
  memset(b->smem, 0xff, smem);
  if (shared.bytes) memset(shared.start, 0xff, shared.bytes);
}
static void report(const Block* b, const Run* run) {
  int at = snprintf(run->message, run->message_len, "%s: block (%u,%u,%u): %s", run->kernel->name, b->bid.x, b->bid.y,
                    b->bid.z, b->error);
  uint32_t named = 0;
  for (uint32_t i = 0; i < b->n && named < 4 && at < (int)run->message_len; i++) {
    if (b->f[i].state != LIVE || !b->f[i].wait) continue;
    named++;
    at += snprintf(run->message + at, run->message_len - at, "; thread %u waits in %s", i, b->f[i].why);
  }
}
// Returns 0, or 1 with a message.
extern "C" __attribute__((visibility("default"))) int softgpu_run(Run* run) {
  Block* b = block_of_thread(run->scratch);
  if (!b) {
    snprintf(run->message, run->message_len, "%s: no memory for the threads of a block", run->kernel->name);
    return 1;
  }
  prepare_launch(b, run);
  const SharedMemory shared = shared_of_thread();
  for (uint64_t i = run->first; i < run->last && !b->error; i++) {
    prepare_block(b, i, run->smem, shared);
    Fiber* first = pick(b, b->n - 1);
    softgpu_switch(&b->main_sp, first->sp);
    if (b->error) report(b, run);
  }
  run->switches = b->switches;
  return b->error != nullptr;
}
#endif
}  // namespace softgpu
