// Rows that are looked up (kernels/src/cpu/embedding.rs).
//
// embedding: out[t] = table[token_ids[t] - vocab_start] for tokens in vocab_start..vocab_end; other rows stay.
//   out [rows][width] f32, token_ids [rows]
//   format F32, F16, BF16: table [..][table_stride] numbers, scales unused
//   format Q4_0, Q4_1, Q8_0, INT4: table and scales are the planes of the packed layout of quant.cuh, table_stride = width
//   grid (rows), block 256
//
// select_rows: out[i] = x[rows[i]].
//   out [n][width] f32, x [..][width] f32, rows [n]
//   grid (n), block 256
#include "quant.cuh"

const u32 THREADS = 256;

PHX_KERNEL __launch_bounds__(256)
embedding(float* __restrict__ out, const u8* __restrict__ table, const u8* __restrict__ scales, u32 format,
          u32 table_stride, const u32* __restrict__ token_ids, u32 vocab_start, u32 vocab_end, u32 width) {
  const u32 token = token_ids[blockIdx.x];
  if (token < vocab_start || token >= vocab_end) return;
  const u64 first = (u64)(token - vocab_start) * table_stride;
  out += (u64)blockIdx.x * width;
  for (u32 i = threadIdx.x; i < width; i += THREADS) {
    float v;
    switch (format) {
      case F32: v = ((const float*)table)[first + i]; break;
      case F16: v = to_float(((const f16*)table)[first + i]); break;
      case BF16: v = to_float(((const bf16*)table)[first + i]); break;
      default: v = packed_weight(format, {table, scales}, (first + i) / BLOCK_LEN, i % BLOCK_LEN);
    }
    out[i] = v;
  }
}

PHX_KERNEL __launch_bounds__(256)
select_rows(float* __restrict__ out, const float* __restrict__ x, const u32* __restrict__ rows, u32 width) {
  out += (u64)blockIdx.x * width;
  x += (u64)rows[blockIdx.x] * width;
  for (u32 i = threadIdx.x; i < width; i += THREADS) out[i] = x[i];
}
