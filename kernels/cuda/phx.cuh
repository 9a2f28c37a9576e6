// The device dialect: what the kernels need of CUDA C++ beyond the language itself.
//
// Three compilers read it. NVRTC and nvcc see inline PTX, which lives in this file only; the soft GPU's host compiler
// (SOFTGPU defined) sees functions of the same names. No NVIDIA header is included, so NVRTC needs no include path.
#pragma once
#ifdef SOFTGPU
#include "softgpu_device.h"
#endif

#define PHX_DEV static __device__ __forceinline__
#define PHX_KERNEL extern "C" __global__ void

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
// kernels/src/e4m3.rs
struct e4m3 {
  u8 bits;
};

// Number formats, with the numbers of `enum ggml_type` and two of our own (model/src/format.rs, `gguf_type`).
enum Format : u32 {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  BF16 = 30,
  INT4 = 256,
  E4M3 = 257,
};

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)
const u32 FULL_WARP = 0xffffffffu;
const u32 WARP = 32;

PHX_DEV u32 div_ceil(u32 a, u32 b) { return (a + b - 1) / b; }
PHX_DEV u32 lane_id() { return threadIdx.x % WARP; }
PHX_DEV u32 warp_id() { return threadIdx.x / WARP; }

// ---- number formats ----------------------------------------------------------------------------------------------

PHX_DEV float to_float(float v) { return v; }
PHX_DEV float to_float(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

PHX_DEV float to_float(f16 v) {
#ifdef SOFTGPU
  return softgpu::f16_to_f(v.bits);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
#endif
}

// Round to nearest, ties to even.
PHX_DEV void from_float(float& out, float v) { out = v; }
PHX_DEV void from_float(bf16& out, float v) {
#ifdef SOFTGPU
  out.bits = softgpu::bf16_rn(v);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#endif
}
PHX_DEV void from_float(f16& out, float v) {
#ifdef SOFTGPU
  out.bits = softgpu::f16_rn(v);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#endif
}
// Beyond +-448 is +-448; NaN stays NaN, without its sign.
PHX_DEV void from_float(e4m3& out, float v) {
#if !defined(SOFTGPU) && __CUDA_ARCH__ >= 890
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(v));
  out.bits = (u8)pair;
#else
  const u32 bits = __float_as_uint(v), sign = bits >> 24 & 0x80u;
  const float magnitude = fminf(__uint_as_float(bits & 0x7fffffffu), 448.f);
  u32 code;
  if (magnitude < 1.f / 64.f) {
    // Leaves no bits below 2^-9, the step of subnormal numbers.
    code = __float_as_uint(magnitude + 16384.f) - __float_as_uint(16384.f);
  } else {
    const u32 m = __float_as_uint(magnitude);
    code = ((m + 0x7ffffu + (m >> 20 & 1)) >> 20) - (120u << 3);
  }
  out.bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fu : (u8)(sign | code);
#endif
}
// Two numbers, the first in the low byte, as two f16, the first in the low half. Exact.
PHX_DEV u32 e4m3x2_to_f16x2(u32 codes) {
#if !defined(SOFTGPU) && __CUDA_ARCH__ >= 890
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)codes));
  return r;
#else
  const u32 spread = (codes & 0xffu) | (codes & 0xff00u) << 8;
  const u32 magnitudes = spread & 0x007f007fu, signs = (spread & 0x00800080u) << 8;
  // Bit 7 of each half is set if its magnitude is 0x7f; the difference makes 0x7fff, a NaN of f16, of it.
  const u32 nan = (magnitudes + 0x00010001u) & 0x00800080u;
  const u32 halves = magnitudes << 7 | signs | ((nan << 8) - (nan >> 7));
  // Exponent and mantissa are in an f16's places, and too small by 2^8, the difference of the biases.
#ifdef SOFTGPU
  const u32 low = softgpu::f16_rn(softgpu::f16_to_f((u16)halves) * 256.f);
  return low | (u32)softgpu::f16_rn(softgpu::f16_to_f((u16)(halves >> 16)) * 256.f) << 16;
#else
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(halves), "r"(0x5c005c00u));
  return r;
#endif
#endif
}
PHX_DEV float to_float(e4m3 v) { return to_float(f16{(u16)e4m3x2_to_f16x2(v.bits)}); }
template <class T>
PHX_DEV T rounded(float v) {
  T out;
  from_float(out, v);
  return out;
}
// Two numbers in one register, `low` in the low half.
template <class T>
PHX_DEV u32 packed(float low, float high) {
  return (u32)rounded<T>(low).bits | (u32)rounded<T>(high).bits << 16;
}

// ---- arithmetic that no compiler may contract ---------------------------------------------------------------------

#ifdef SOFTGPU
template <class T>
PHX_DEV T opaque(T v) {
  asm("" : "+m"(v));
  return v;
}
PHX_DEV double mul_rn(double a, double b) { return opaque(a * b); }
PHX_DEV float mul_rn(float a, float b) { return opaque(a * b); }
PHX_DEV float add_rn(float a, float b) { return opaque(a) + b; }
PHX_DEV float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PHX_DEV double round_even(double v) { return __builtin_rint(v); }
PHX_DEV u64 double_bits(double v) {
  u64 bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}
PHX_DEV double bits_double(u64 bits) {
  double v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
// 2^v
PHX_DEV float exp2_fast(float v) { return __builtin_exp2f(v); }
#else
PHX_DEV double mul_rn(double a, double b) { return __dmul_rn(a, b); }
PHX_DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }
PHX_DEV float add_rn(float a, float b) { return __fadd_rn(a, b); }
PHX_DEV float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PHX_DEV double round_even(double v) { return rint(v); }
PHX_DEV u64 double_bits(double v) { return (u64)__double_as_longlong(v); }
PHX_DEV double bits_double(u64 bits) { return __longlong_as_double((long long)bits); }
// 2^v, within 2 units in the last place; results that are not normal numbers are 0.
PHX_DEV float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
#endif

// ---- tensor cores, shared memory ----------------------------------------------------------------------------------

#ifdef SOFTGPU
#define PHX_DYNAMIC_SHARED(T, name) T* name = (T*)softgpu::dyn_smem()
#else
#define PHX_DYNAMIC_SHARED(T, name)                     \
  extern __shared__ __align__(16) u8 phx_dynamic_[];    \
  T* name = (T*)phx_dynamic_
#endif

// d += a (16 x 16, row-major) * b (16 x 8, column-major), summed in f32; by a whole warp. PTX ISA, mma.m16n8k16:
// lane l has of d the rows l / 4 and l / 4 + 8 and the columns 2 (l % 4) and the next.
template <class T>
PHX_DEV void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_16816<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef SOFTGPU
  softgpu::mma_m16n8k16_bf16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
template <>
__device__ __forceinline__ void mma_16816<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef SOFTGPU
  softgpu::mma_m16n8k16_f16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8, 16-byte aligned.
PHX_DEV void ldmatrix_x4(u32 (&r)[4], const void* row) {
#ifdef SOFTGPU
  softgpu::ldmatrix_x4(r, row);
#else
  const u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
#endif
}
// The same, each matrix transposed.
PHX_DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
#ifdef SOFTGPU
  softgpu::ldmatrix_x4_trans(r, row);
#else
  const u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
#endif
}

// Copies 16 bytes from global to shared memory, or zeros if not `valid`; done after cp_wait.
PHX_DEV void cp_async16(void* shared, const void* global, bool valid) {
#ifdef SOFTGPU
  softgpu::cp_async16(shared, global, valid);
#else
  const u32 address = (u32)__cvta_generic_to_shared(shared);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes));
#endif
}
PHX_DEV void cp_commit() {
#ifdef SOFTGPU
  softgpu::cp_commit();
#else
  asm volatile("cp.async.commit_group;");
#endif
}
// Waits for all but the last N groups of the calling thread.
template <int N>
PHX_DEV void cp_wait() {
#ifdef SOFTGPU
  softgpu::cp_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- flags that other devices and processes see -------------------------------------------------------------------

PHX_DEV void st_release_sys(u32* p, u32 v) {
#ifdef SOFTGPU
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}
PHX_DEV u32 ld_acquire_sys(const u32* p) {
#ifdef SOFTGPU
  softgpu::spin_hint();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#else
  u32 v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#endif
}

// ---- reductions in a fixed order ----------------------------------------------------------------------------------

PHX_DEV float warp_sum(float v) {
#pragma unroll
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(FULL_WARP, v, distance);
  return v;
}
PHX_DEV float warp_max(float v) {
#pragma unroll
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, distance));
  return v;
}
// Over a block of THREADS; all get the result.
template <u32 THREADS>
PHX_DEV float block_sum(float v) {
  static_assert(THREADS % WARP == 0 && THREADS <= 1024, "whole warps");
  __shared__ float of_warp[THREADS / WARP];
  v = warp_sum(v);
  __syncthreads();  // the previous call's readers are done
  if (lane_id() == 0) of_warp[warp_id()] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (u32 w = 0; w < THREADS / WARP; w++) sum += of_warp[w];
  return sum;
}
template <u32 THREADS>
PHX_DEV float block_max(float v) {
  static_assert(THREADS % WARP == 0 && THREADS <= 1024, "whole warps");
  __shared__ float of_warp[THREADS / WARP];
  v = warp_max(v);
  __syncthreads();
  if (lane_id() == 0) of_warp[warp_id()] = v;
  __syncthreads();
  float max = of_warp[0];
#pragma unroll
  for (u32 w = 1; w < THREADS / WARP; w++) max = fmaxf(max, of_warp[w]);
  return max;
}
