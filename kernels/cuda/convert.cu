// Conversions at an op's edges. The CPU backend's counterpart is the rounding of activations in
// kernels/src/cpu/gemm/activations.rs.
//
// convert_f32_to_bf16, convert_f32_to_f16: out[row][0..width] = x[row][0..width] rounded to nearest, ties to even;
// out[row][width..out_stride] = 0, so that matrix kernels may read whole tiles.
//   out [rows][out_stride], x [rows][x_stride] f32; strides in elements, out_stride >= width
//   grid (rows), block 256
#include "phx.cuh"

const u32 THREADS = 256;

template <class T>
PHX_DEV void convert_row(T* out, u32 out_stride, const float* x, u32 x_stride, u32 width) {
  out += (u64)blockIdx.x * out_stride;
  x += (u64)blockIdx.x * x_stride;
  for (u32 i = threadIdx.x; i < out_stride; i += THREADS) out[i] = rounded<T>(i < width ? x[i] : 0.f);
}

PHX_KERNEL __launch_bounds__(256)
convert_f32_to_bf16(bf16* __restrict__ out, u32 out_stride, const float* __restrict__ x, u32 x_stride, u32 width) {
  convert_row(out, out_stride, x, x_stride, width);
}

PHX_KERNEL __launch_bounds__(256)
convert_f32_to_f16(f16* __restrict__ out, u32 out_stride, const float* __restrict__ x, u32 x_stride, u32 width) {
  convert_row(out, out_stride, x, x_stride, width);
}
