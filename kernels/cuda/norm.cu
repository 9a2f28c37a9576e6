// RMS normalization (kernels/src/cpu/norm.rs): out = x / sqrt(mean(x^2) + eps) * weight.
//
// rms_norm
//   out, x [rows][width] f32, weight [width] f32
//   grid (rows), block 256
//
// fused_add_rms_norm: residual += delta; out = rms_norm(residual).
//   out, residual, delta [rows][width] f32; out may be delta
//   grid (rows), block 256
//
// A row's squares are summed per thread in rising column, then over the threads in one fixed tree.
#include "phx.cuh"

const u32 THREADS = 256;

// Each thread scales the columns that it has squared itself, so no thread reads what another has written.
PHX_DEV void normalize(float* out, const float* x, const float* weight, u32 width, float eps, float squares) {
  const float mean = block_sum<THREADS>(squares) / (float)width;
  const float inverse = 1.f / sqrtf(mean + eps);
  for (u32 i = threadIdx.x; i < width; i += THREADS) out[i] = x[i] * inverse * weight[i];
}

PHX_KERNEL __launch_bounds__(256)
rms_norm(float* out, const float* x, const float* __restrict__ weight, u32 width, float eps) {
  out += (u64)blockIdx.x * width;
  x += (u64)blockIdx.x * width;
  float squares = 0.f;
  for (u32 i = threadIdx.x; i < width; i += THREADS) squares = fma_rn(x[i], x[i], squares);
  normalize(out, x, weight, width, eps, squares);
}

PHX_KERNEL __launch_bounds__(256)
fused_add_rms_norm(float* out, float* residual, const float* delta, const float* __restrict__ weight, u32 width, float eps) {
  out += (u64)blockIdx.x * width;
  residual += (u64)blockIdx.x * width;
  delta += (u64)blockIdx.x * width;
  float squares = 0.f;
  for (u32 i = threadIdx.x; i < width; i += THREADS) {
    const float x = residual[i] + delta[i];
    residual[i] = x;
    squares = fma_rn(x, x, squares);
  }
  normalize(out, residual, weight, width, eps, squares);
}
