// Products of E4M3 (kernels/src/cuda/fp8.rs): cublasLt multiplies the codes, and what it gives is scaled here, by the
// scale of the activation's row and that of the weight's row. Both are one number per row, so that a row's result does
// not depend on the rows beside it.
//
// quantize_rows_e4m3: codes[row] = x[row] / scales[row], scales[row] = max |x[row]| / 448; the columns from `width` on,
// and the rows from `rows` on, are zeros.
//   codes [grid rows][stride], scales [grid rows] f32, x [rows] f32, rows x_stride apart
//   grid (rows, rounded up as the product needs it), block 256
//
// scale_product: out[row][column] = sums[row][column] * x_scales[row] * weight_scales[column] (+ bias[column]).
//   out: first column to write of row 0, f32, rows out_stride apart; sums f32, rows sums_stride apart; bias null for none
//   grid (rows, columns / 256, rounded up), block 256
//
// dequantize_rows_e4m3: out[row][0..cols] = codes[row] * scales[row], rounded to bf16; the rest of the row is zeros.
//   out [rows][out_stride], codes [rows][cols], scales [rows] f32
//   grid (rows), block 256
#include "phx.cuh"

const u32 THREADS = 256;
const float LARGEST = 448.f;

PHX_KERNEL __launch_bounds__(256)
quantize_rows_e4m3(e4m3* __restrict__ codes, u32 stride, float* __restrict__ scales, const float* __restrict__ x,
                   u32 x_stride, u32 width, u32 rows) {
  const bool exists = blockIdx.x < rows;
  codes += (u64)blockIdx.x * stride;
  x += (u64)blockIdx.x * x_stride;
  float largest = 0.f;
  if (exists)
    for (u32 i = threadIdx.x; i < width; i += THREADS) largest = fmaxf(largest, fabsf(x[i]));
  largest = block_max<THREADS>(largest);
  // A row so small that its scale's inverse is no number is a row of zeros.
  const float scale = largest > 1e-30f ? largest / LARGEST : 1.f;
  for (u32 i = threadIdx.x; i < stride; i += THREADS)
    codes[i] = rounded<e4m3>(exists && i < width ? x[i] / scale : 0.f);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

PHX_KERNEL __launch_bounds__(256)
scale_product(float* __restrict__ out, u32 out_stride, const float* __restrict__ sums, u32 sums_stride,
              const float* __restrict__ x_scales, const float* __restrict__ weight_scales, const float* __restrict__ bias,
              u32 columns) {
  const u32 column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= columns) return;
  const float sum = sums[(u64)blockIdx.x * sums_stride + column];
  const float scaled = mul_rn(mul_rn(sum, x_scales[blockIdx.x]), weight_scales[column]);
  out[(u64)blockIdx.x * out_stride + column] = bias ? add_rn(scaled, bias[column]) : scaled;
}

PHX_KERNEL __launch_bounds__(256)
dequantize_rows_e4m3(bf16* __restrict__ out, u32 out_stride, const e4m3* __restrict__ codes,
                     const float* __restrict__ scales, u32 cols) {
  out += (u64)blockIdx.x * out_stride;
  codes += (u64)blockIdx.x * cols;
  for (u32 i = threadIdx.x; i < out_stride; i += THREADS)
    out[i] = rounded<bf16>(i < cols ? mul_rn(to_float(codes[i]), scales[blockIdx.x]) : 0.f);
}
