// The linear layer on tensor cores, for weights that stay quantized (kernels/src/cpu/linear.rs, kernels/src/cpu/gemm):
// out[row][n] = x[row] . weight[n] (+ bias[n]), bf16 x bf16 summed in f32.
//
// Weights are decoded to bf16 on their way into shared memory and never stored. An output is the sum of
// K_PARTS parts of K, each summed from its front to its back: the same for both kernels and whatever the other rows and
// columns are, so that a row has the same bits alone and in a batch, and a column on any rank.
//
// linear_few_rows: a block has 16 rows and 32 columns, and each of its four warps a part of K.
//   grid (ceil(outputs / 32), ceil(rows / 16)), block 128
// linear_many_rows: a block has 64 rows and 64 columns.
//   grid (ceil(outputs / 64), ceil(rows / 64)), block 128
//
//   out: first column to write of the first row, f32, rows out_stride apart
//   x [rows][inputs] bf16, rows x_stride apart
//   weight: the planes of the packed layout of quant.cuh; codes and x 16-byte aligned
//   inputs: a multiple of 32; x_stride: of 8
//   bias [outputs] f32, or null
// Parameters: WEIGHT_FORMAT, one of the packed layout, by its number
#include "quant.cuh"

static_assert(WEIGHT_FORMAT == Q4_0 || WEIGHT_FORMAT == Q4_1 || WEIGHT_FORMAT == Q8_0 || WEIGHT_FORMAT == INT4,
              "other formats are dequantized when they are loaded");

// Elements of K that are in shared memory at a time: one quantized block.
const u32 DEPTH = BLOCK_LEN;
// From one row in shared memory to the next; the padding keeps eight rows out of each other's banks.
const u32 PITCH = DEPTH + 8;
const u32 K_PARTS = 4;

// By value.
struct Linear {
  const bf16* x;
  Packed weight;
  const float* bias;
  u32 x_stride;
  u32 rows;
  u32 inputs;
  u32 outputs;
};

// Steps of DEPTH that belong to a part of K.
struct Steps {
  u32 start;
  u32 end;
};
PHX_DEV Steps part_of_k(const Linear& a, u32 part) {
  const u32 all = div_ceil(a.inputs, DEPTH), each = div_ceil(all, K_PARTS);
  return {min(part * each, all), min((part + 1) * each, all)};
}

// 16 weights of one block before they are decoded.
struct HalfBlock {
  uint4 codes;  // Q4: 8 bytes, .z and .w unused
  Scale scale;
};

// A tile of ROWS x COLS outputs, computed by THREADS threads as WARPS_M x WARPS_N warps. Two stages in shared memory: one
// arrives while the other is used.
template <u32 ROWS, u32 COLS, u32 WARPS_M, u32 WARPS_N>
struct Tile {
  static const u32 WARPS = WARPS_M * WARPS_N;
  static const u32 THREADS = WARPS * WARP;
  static const u32 M = ROWS / WARPS_M / 16;
  static const u32 N = COLS / WARPS_N / 8;
  // Half blocks of a step that a thread decodes.
  static const u32 HALVES = COLS * 2 / THREADS;
  static_assert(ROWS % (16 * WARPS_M) == 0 && COLS % (16 * WARPS_N) == 0, "whole fragments");
  static_assert(COLS * 2 % THREADS == 0, "whole half blocks");

  bf16 x[2][ROWS][PITCH];
  bf16 weight[2][COLS][PITCH];

  __device__ __forceinline__ void sync() {
    if (WARPS == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  __device__ __forceinline__ u32 thread() { return WARPS == 1 ? lane_id() : threadIdx.x; }

  // Starts the copy of rows of x; zeros for rows that are not there.
  __device__ __forceinline__ void copy(bf16 (&to)[ROWS][PITCH], const Linear& a, u32 first, u32 step) {
    const u32 CHUNKS = DEPTH / 8;
    for (u32 i = thread(); i < ROWS * CHUNKS; i += THREADS) {
      const u32 row = first + i / CHUNKS, column = i % CHUNKS * 8;
      const bool valid = row < a.rows;
      cp_async16(&to[i / CHUNKS][column], valid ? a.x + (u64)row * a.x_stride + step * DEPTH + column : a.x, valid);
    }
  }

  __device__ __forceinline__ void fetch(HalfBlock (&halves)[HALVES], const Linear& a, u32 first_col, u32 step) {
#pragma unroll
    for (u32 i = 0; i < HALVES; i++) {
      const u32 item = thread() + i * THREADS, col = first_col + item / 2, half = item % 2;
      halves[i].codes = make_uint4(0, 0, 0, 0);
      halves[i].scale = {0.f, 0, 0.f};
      if (col >= a.outputs) continue;
      const u64 block = (u64)col * (a.inputs / BLOCK_LEN) + step;
      halves[i].scale = packed_scale(WEIGHT_FORMAT, a.weight.scales, block);
      const u8* codes = a.weight.codes + block * packed_code_bytes(WEIGHT_FORMAT);
      if constexpr (WEIGHT_FORMAT == Q8_0) {
        halves[i].codes = ((const uint4*)codes)[half];
      } else {
        const uint2 eight = ((const uint2*)codes)[half];
        halves[i].codes.x = eight.x;
        halves[i].codes.y = eight.y;
      }
    }
  }

  // Eight weights from the codes in the bytes of `low` and `high`.
  __device__ __forceinline__ void decode_eight(bf16* to, Scale scale, u32 low, u32 high) {
    u32 pairs[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const u32 both = (i < 2 ? low : high) >> (i % 2 * 16);
      pairs[i] = packed<bf16>(decode(scale, both & 255), decode(scale, both >> 8 & 255));
    }
    *(uint4*)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }

  __device__ __forceinline__ void store(u32 stage, const HalfBlock (&halves)[HALVES]) {
#pragma unroll
    for (u32 i = 0; i < HALVES; i++) {
      const u32 item = thread() + i * THREADS, half = item % 2;
      bf16* row = weight[stage][item / 2];
      const uint4 codes = halves[i].codes;
      const Scale scale = halves[i].scale;
      if constexpr (WEIGHT_FORMAT == Q8_0) {
        const u32 OFFSET_BINARY = 0x80808080u;
        decode_eight(row + half * 16, scale, codes.x ^ OFFSET_BINARY, codes.y ^ OFFSET_BINARY);
        decode_eight(row + half * 16 + 8, scale, codes.z ^ OFFSET_BINARY, codes.w ^ OFFSET_BINARY);
      } else {
        const u32 NIBBLES = 0x0f0f0f0fu;
        decode_eight(row + half * 8, scale, codes.x & NIBBLES, codes.y & NIBBLES);
        decode_eight(row + half * 8 + 16, scale, codes.x >> 4 & NIBBLES, codes.y >> 4 & NIBBLES);
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&sums)[M][N][4], u32 stage) {
    const u32 lane = lane_id(), warp = WARPS == 1 ? 0 : warp_id();
    const u32 m0 = warp / WARPS_N * (M * 16), n0 = warp % WARPS_N * (N * 8);
#pragma unroll
    for (u32 k = 0; k < DEPTH; k += 16) {
      u32 a[M][4], b[N / 2][4];
#pragma unroll
      for (u32 i = 0; i < M; i++) ldmatrix_x4(a[i], &x[stage][m0 + i * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (u32 j = 0; j < N / 2; j++)
        ldmatrix_x4(b[j], &weight[stage][n0 + j * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
#pragma unroll
      for (u32 i = 0; i < M; i++)
#pragma unroll
        for (u32 j = 0; j < N; j++) mma_16816<bf16>(sums[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
    }
  }

  __device__ __forceinline__ void start(u32 stage, const Linear& a, u32 first_row, u32 first_col, u32 step, HalfBlock (&halves)[HALVES]) {
    copy(x[stage], a, first_row, step);
    fetch(halves, a, first_col, step);
    cp_commit();
  }

  // Adds the products over `steps` of K.
  __device__ __forceinline__ void accumulate(float (&sums)[M][N][4], const Linear& a, u32 first_row, u32 first_col, Steps steps) {
    HalfBlock halves[HALVES];
    if (steps.start < steps.end) start(0, a, first_row, first_col, steps.start, halves);
    for (u32 step = steps.start; step < steps.end; step++) {
      const u32 stage = (step - steps.start) % 2;
      store(stage, halves);
      if (step + 1 < steps.end) {
        start(stage ^ 1, a, first_row, first_col, step + 1, halves);
        cp_wait<1>();
      } else {
        cp_wait<0>();
      }
      sync();
      multiply(sums, stage);
      sync();
    }
  }
};

template <u32 M, u32 N>
PHX_DEV void clear(float (&sums)[M][N][4]) {
#pragma unroll
  for (u32 i = 0; i < M; i++)
#pragma unroll
    for (u32 j = 0; j < N; j++)
#pragma unroll
      for (u32 e = 0; e < 4; e++) sums[i][j][e] = 0.f;
}

PHX_DEV void write(float* out, u32 out_stride, const Linear& a, u32 row, u32 col, float sum) {
  if (row < a.rows && col < a.outputs) out[(u64)row * out_stride + col] = a.bias ? sum + a.bias[col] : sum;
}

PHX_KERNEL __launch_bounds__(128)
linear_many_rows(float* __restrict__ out, u32 out_stride, Linear a) {
  typedef Tile<64, 64, 2, 2> Many;
  __shared__ __align__(16) Many tile;
  const u32 first_row = blockIdx.y * 64, first_col = blockIdx.x * 64;
  float sums[Many::M][Many::N][4], part[Many::M][Many::N][4];
  clear(sums);
  for (u32 p = 0; p < K_PARTS; p++) {
    clear(part);
    tile.accumulate(part, a, first_row, first_col, part_of_k(a, p));
#pragma unroll
    for (u32 i = 0; i < Many::M; i++)
#pragma unroll
      for (u32 j = 0; j < Many::N; j++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) sums[i][j][e] += part[i][j][e];
  }
  const u32 row = first_row + warp_id() / 2 * 32 + lane_id() / 4, col = first_col + warp_id() % 2 * 32 + lane_id() % 4 * 2;
#pragma unroll
  for (u32 i = 0; i < Many::M; i++)
#pragma unroll
    for (u32 j = 0; j < Many::N; j++)
#pragma unroll
      for (u32 e = 0; e < 4; e++) write(out, out_stride, a, row + i * 16 + e / 2 * 8, col + j * 8 + e % 2, sums[i][j][e]);
}

PHX_KERNEL __launch_bounds__(128)
linear_few_rows(float* __restrict__ out, u32 out_stride, Linear a) {
  typedef Tile<16, 32, 1, 1> Few;
  __shared__ __align__(16) Few tiles[K_PARTS];
  __shared__ float parts[K_PARTS][16][32];
  const u32 first_row = blockIdx.y * 16, first_col = blockIdx.x * 32, warp = warp_id();
  float part[Few::M][Few::N][4];
  clear(part);
  tiles[warp].accumulate(part, a, first_row, first_col, part_of_k(a, warp));
#pragma unroll
  for (u32 j = 0; j < Few::N; j++)
#pragma unroll
    for (u32 e = 0; e < 4; e++) parts[warp][lane_id() / 4 + e / 2 * 8][lane_id() % 4 * 2 + j * 8 + e % 2] = part[0][j][e];
  __syncthreads();
  for (u32 i = threadIdx.x; i < 16 * 32; i += K_PARTS * WARP) {
    float sum = 0.f;
#pragma unroll
    for (u32 p = 0; p < K_PARTS; p++) sum += parts[p][i / 32][i % 32];
    write(out, out_stride, a, first_row + i / 32, first_col + i % 32, sum);
  }
}
