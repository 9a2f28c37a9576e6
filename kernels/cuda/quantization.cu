// Weights on their way into device memory (kernels/src/cpu/quant, kernels/src/cpu/pack).
//
// dequantize_rows: out[row][0..cols] = the weights of a row in the file's layout, rounded to bf16;
// out[row][cols..out_stride] = 0.
//   out [rows][out_stride] bf16, data: row r at data + r * row_stride bytes; format: a GGUF type number; cols a multiple
//   of the format's block length
//   grid (rows), block 256
//
// dequantize_rows_f32: the same with f32 output.
//
// pack_rows: rows of Q4_0, Q4_1, Q8_0 or INT4 in the file's layout to the packed layout of quant.cuh.
//   codes, scales: the planes from the first of these rows on; the rest as above
//   grid (rows), block 256
//
// unpack_rows: out[row][0..cols] = the weights of a row in the packed layout, rounded to bf16. cols a multiple of 32.
//   codes, scales: the planes from the first of these rows on
//   grid (rows), block 256
#include "quant.cuh"

const u32 THREADS = 256;

template <class T>
PHX_DEV void dequantize_row(T* out, u32 out_stride, const u8* data, u64 row_stride, u32 format, u32 cols) {
  out += (u64)blockIdx.x * out_stride;
  const u8* row = data + blockIdx.x * row_stride;
  const bool dense = block_len(format) == 1;
  for (u32 i = threadIdx.x; i < out_stride; i += THREADS) {
    float w = 0.f;
    if (i < cols) w = dense ? file_number(format, row, i) : file_weight(format, row, i / BLOCK_LEN, i % BLOCK_LEN);
    out[i] = rounded<T>(w);
  }
}

PHX_KERNEL __launch_bounds__(256)
dequantize_rows(bf16* __restrict__ out, u32 out_stride, const u8* __restrict__ data, u64 row_stride, u32 format, u32 cols) {
  dequantize_row(out, out_stride, data, row_stride, format, cols);
}

PHX_KERNEL __launch_bounds__(256)
dequantize_rows_f32(float* __restrict__ out, u32 out_stride, const u8* __restrict__ data, u64 row_stride, u32 format, u32 cols) {
  dequantize_row(out, out_stride, data, row_stride, format, cols);
}

PHX_KERNEL __launch_bounds__(256)
pack_rows(u8* __restrict__ codes, u8* __restrict__ scales, const u8* __restrict__ data, u64 row_stride, u32 format, u32 cols) {
  const u32 blocks = cols / BLOCK_LEN, bytes = block_bytes(format);
  const u32 scale_bytes = packed_scale_bytes(format), code_bytes = packed_code_bytes(format);
  const u8* row = data + blockIdx.x * row_stride;
  codes += (u64)blockIdx.x * blocks * code_bytes;
  scales += (u64)blockIdx.x * blocks * scale_bytes;
  for (u32 i = threadIdx.x; i < blocks * bytes; i += THREADS) {
    const u32 block = i / bytes, byte = i % bytes;
    if (byte < scale_bytes) {
      scales[block * scale_bytes + byte] = row[i];
    } else {
      codes[block * code_bytes + byte - scale_bytes] = row[i];
    }
  }
}

PHX_KERNEL __launch_bounds__(256)
unpack_rows(bf16* __restrict__ out, const u8* __restrict__ codes, const u8* __restrict__ scales, u32 format, u32 cols) {
  const u64 first = (u64)blockIdx.x * (cols / BLOCK_LEN);
  out += (u64)blockIdx.x * cols;
  for (u32 i = threadIdx.x; i < cols; i += THREADS)
    out[i] = rounded<bf16>(packed_weight(format, {codes, scales}, first + i / BLOCK_LEN, i % BLOCK_LEN));
}
