// How many values of a row are at least as large as a given one (kernels/src/cpu/count.rs).
//
// count_at_least: counts[i] = how many of the first `columns` values of row thresholds[i].row reach thresholds[i].value.
//   counts [n], x [..][stride] f32, thresholds [n]
//   grid (n), block 256
#include "phx.cuh"

const u32 THREADS = 256;

struct Threshold {
  u32 row;
  float value;
};

PHX_KERNEL __launch_bounds__(256)
count_at_least(u32* __restrict__ counts, const float* __restrict__ x, u32 stride, u32 columns,
               const Threshold* __restrict__ thresholds) {
  const Threshold threshold = thresholds[blockIdx.x];
  const float* row = x + (u64)threshold.row * stride;
  u32 count = 0;
  for (u32 i = threadIdx.x; i < columns; i += THREADS) count += row[i] >= threshold.value ? 1 : 0;
#pragma unroll
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) count += __shfl_xor_sync(FULL_WARP, count, distance);
  __shared__ u32 of_warp[THREADS / WARP];
  if (lane_id() == 0) of_warp[warp_id()] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  u32 sum = 0;
#pragma unroll
  for (u32 w = 0; w < THREADS / WARP; w++) sum += of_warp[w];
  counts[blockIdx.x] = sum;
}
