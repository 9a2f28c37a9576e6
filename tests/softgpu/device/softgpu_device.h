// CUDA C++ compiled for the host. A kernel source includes this one header (through phx.cuh, when SOFTGPU is defined)
// and is then plain C++17: the qualifiers below vanish or map to something the host has, threadIdx and its like are
// read from the running fiber, and the PTX wrappers of the dialect call functions of namespace softgpu.
//
//   softgpu_fiber.h       one fiber per CUDA thread, one block at a time per OS thread
//   softgpu_warp.h        what the threads of a warp or block do together: exchange, barriers
//   softgpu_mma.h         mma.sync, ldmatrix, cp.async, number formats
//   softgpu_intrinsics.h  shuffles, votes, atomics, bit casts: the CUDA names
//   softgpu_launch.h      registry of kernels, and the entry by which the driver stand-in runs blocks
//
// The unit that holds the kernels defines SOFTGPU_IMPL before including it; there is one such unit per module.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <link.h>
#include <sched.h>
#include <sys/mman.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// An OS thread runs one block at a time, so a block's shared memory is the thread's own.
#define __shared__ static thread_local
#define __grid_constant__

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct uint3 { unsigned x, y, z; };
struct alignas(2) uchar2 { unsigned char x, y; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(2) char2 { signed char x, y; };
struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#include "softgpu_fiber.h"
#include "softgpu_warp.h"
#include "softgpu_mma.h"
#include "softgpu_launch.h"

#define threadIdx (softgpu::self()->tid)
#define blockIdx (softgpu::self()->blk->bid)
#define blockDim (softgpu::self()->blk->bdim)
#define gridDim (softgpu::self()->blk->gdim)
static const int warpSize = 32;

#include "softgpu_intrinsics.h"
