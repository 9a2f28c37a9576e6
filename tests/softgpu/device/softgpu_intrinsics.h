// CUDA's own names: barriers, shuffles, votes, atomics, fences, bit casts, fast math.
#pragma once

inline void __syncthreads() { softgpu::bar(0, "__syncthreads"); }
inline int __syncthreads_count(int p) { return (int)softgpu::bar(p != 0, "__syncthreads_count"); }
inline int __syncthreads_or(int p) { return softgpu::bar(p != 0, "__syncthreads_or") != 0; }
inline int __syncthreads_and(int p) { return softgpu::bar(p == 0, "__syncthreads_and") == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { softgpu::exchange(mask, 0, "__syncwarp"); }

template <class T> inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  const auto& table = softgpu::exchange(mask, v, "__shfl_sync");
  const int lane = softgpu::self()->lane;
  return softgpu::peek<T>(table, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  const auto& table = softgpu::exchange(mask, v, "__shfl_xor_sync");
  const int lane = softgpu::self()->lane, from = lane ^ lanes;
  return softgpu::peek<T>(table, (from & ~(width - 1)) > (lane & ~(width - 1)) ? lane : from);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const auto& table = softgpu::exchange(mask, v, "__shfl_down_sync");
  const int lane = softgpu::self()->lane;
  return softgpu::peek<T>(table, (lane & (width - 1)) + (int)delta < width ? lane + (int)delta : lane);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const auto& table = softgpu::exchange(mask, v, "__shfl_up_sync");
  const int lane = softgpu::self()->lane;
  return softgpu::peek<T>(table, (lane & (width - 1)) - (int)delta >= 0 ? lane - (int)delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  const auto& table = softgpu::exchange(mask, p, "__ballot_sync");
  const softgpu::Fiber* me = softgpu::self();
  mask &= softgpu::lanes_of(me->blk, me->warp);
  unsigned votes = 0;
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && softgpu::peek<int>(table, i)) votes |= 1u << i;
  return votes;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

// Fibers of one block never run at once, but blocks do, on the threads of the pool.
template <class T> inline T atomicAdd(T* p, T v) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  } else {
    T old, sum;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do sum = old + v;
    while (!__atomic_compare_exchange(p, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
  }
}
template <class T> inline T atomicSub(T* p, T v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }
template <class T> inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }
template <class T> inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
template <class T> inline T atomicXor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }
template <class T> inline T atomicExch(T* p, T v) {
  T old;
  __atomic_exchange(p, &v, &old, __ATOMIC_ACQ_REL);
  return old;
}
template <class T> inline T atomicCAS(T* p, T expected, T v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
template <class T> inline T atomicMax(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}
template <class T> inline T atomicMin(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}
// Counts from 0 to limit and starts again: the ticket of the last block to arrive.
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
  return old;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { softgpu::spin_hint(); }

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }

inline unsigned __float_as_uint(float f) { return softgpu::bits_of(f); }
inline float __uint_as_float(unsigned u) { return softgpu::float_of(u); }
inline int __float_as_int(float f) { return (int)softgpu::bits_of(f); }
inline float __int_as_float(int i) { return softgpu::float_of((unsigned)i); }
inline int __float2int_rn(float f) { return (int)nearbyintf(f); }
inline int __float2int_rd(float f) { return (int)floorf(f); }
inline int __float2int_rz(float f) { return (int)f; }
inline float __int2float_rn(int i) { return (float)i; }
inline float __uint2float_rn(unsigned i) { return (float)i; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// glibc declares functions of these names for its own use, so they can only be replaced, not defined.
#define __expf softgpu_expf
#define __logf softgpu_logf
#define __log2f softgpu_log2f
#define __powf softgpu_powf
#define __sinf softgpu_sinf
#define __cosf softgpu_cosf
inline float softgpu_expf(float x) { return expf(x); }
inline float softgpu_logf(float x) { return logf(x); }
inline float softgpu_log2f(float x) { return log2f(x); }
inline float softgpu_powf(float x, float y) { return powf(x, y); }
inline float softgpu_sinf(float x) { return sinf(x); }
inline float softgpu_cosf(float x) { return cosf(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}
// Dot product of four signed bytes.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; i++) sum += (int)(signed char)(a >> (8 * i)) * (int)(signed char)(b >> (8 * i));
  return sum;
}
template <class T> inline T min(T a, T b) { return a < b ? a : b; }
template <class T> inline T max(T a, T b) { return a > b ? a : b; }
