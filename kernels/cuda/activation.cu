// Ops on single elements (kernels/src/cpu/silu.rs, and the bias of kernels/src/cpu/linear.rs).
//
// silu_and_mul: out[row][i] = silu(gate) * up, where a row of gate_up is [gate | up], each `width` wide.
//   out: first column to write of the first row, rows out_stride apart; gate_up [rows][2 * width] f32
//   grid (rows, any), block 256
//
// add_bias: out[row][i] += bias[i].
//   out as above, bias [width] f32
//   grid (rows, any), block 256
#include "phx.cuh"

const u32 THREADS = 256;

PHX_KERNEL __launch_bounds__(256)
silu_and_mul(float* __restrict__ out, u32 out_stride, const float* __restrict__ gate_up, u32 width) {
  out += (u64)blockIdx.x * out_stride;
  const float* gate = gate_up + (u64)blockIdx.x * 2 * width;
  for (u32 i = blockIdx.y * THREADS + threadIdx.x; i < width; i += gridDim.y * THREADS) {
    out[i] = gate[i] / (1.f + expf(-gate[i])) * gate[width + i];
  }
}

PHX_KERNEL __launch_bounds__(256)
add_bias(float* __restrict__ out, u32 out_stride, const float* __restrict__ bias, u32 width) {
  out += (u64)blockIdx.x * out_stride;
  for (u32 i = blockIdx.y * THREADS + threadIdx.x; i < width; i += gridDim.y * THREADS) out[i] += bias[i];
}
