// Weight formats, as the scalar definitions of kernels/src/cpu/quant say: w = scale * (code - offset) + min.
//
// Two layouts. The file's: blocks as in a GGUF file, rows at any byte. The packed one, for the formats that the linear
// kernels read themselves (Q4_0, Q4_1, Q8_0, INT4): a plane of codes, [rows][cols / 32] blocks of 16 (Q8_0: 32) bytes as in
// the file, and a plane of scales, [rows][cols / 32] f16 d (Q4_1: f16 d, f16 m; INT4: f16 d, f16 z), so that loads are
// aligned.
#pragma once
#include "phx.cuh"

const u32 BLOCK_LEN = 32;

PHX_DEV u16 load_u16(const u8* p) { return (u16)(p[0] | p[1] << 8); }
PHX_DEV float load_half(const u8* p) { return to_float(f16{load_u16(p)}); }

// Elements and bytes of a block in the file's layout.
__host__ __device__ constexpr u32 block_len(u32 format) {
  return format == Q4_K || format == Q5_K || format == Q6_K ? 256 : format == F32 || format == F16 || format == BF16 ? 1 : 32;
}
__host__ __device__ constexpr u32 block_bytes(u32 format) {
  return format == F32    ? 4
         : format == F16  ? 2
         : format == BF16 ? 2
         : format == Q4_0 ? 18
         : format == Q4_1 ? 20
         : format == INT4 ? 20
         : format == Q5_0 ? 22
         : format == Q5_1 ? 24
         : format == Q8_0 ? 34
         : format == Q4_K ? 144
         : format == Q5_K ? 176
                          : 210;
}
__host__ __device__ constexpr u32 packed_code_bytes(u32 format) { return format == Q8_0 ? 32 : 16; }
__host__ __device__ constexpr u32 packed_scale_bytes(u32 format) { return format == Q4_1 || format == INT4 ? 4 : 2; }

// What decodes a code of one group of 16 weights.
struct Scale {
  float scale;
  int offset;
  float min;
};
// The products and sums are those of the scalar definition, each rounded.
PHX_DEV float decode(Scale s, u32 code) { return add_rn(mul_rn(s.scale, (float)((int)code - s.offset)), s.min); }

PHX_DEV u32 nibble(const u8* codes, u32 k) { return k < 16 ? codes[k] & 15 : codes[k - 16] >> 4; }
PHX_DEV u32 fifth(const u8* high, u32 k) { return (u32)(high[k / 8] >> (k % 8) & 1) << 4; }

// ggml's get_scale_min_k4: 6-bit scale and min of block j from 12 bytes.
PHX_DEV void scale_and_min(const u8* p, u32 j, u32& scale, u32& min) {
  if (j < 4) {
    scale = p[j] & 63;
    min = p[j + 4] & 63;
  } else {
    scale = (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
    min = (p[j + 4] >> 4) | (p[j] >> 6) << 4;
  }
}

// Weight k (of 32) of block `index` (of 32 weights) of a row in the file's layout.
PHX_DEV float file_weight(u32 format, const u8* row, u32 index, u32 k) {
  const u32 per = block_len(format) / BLOCK_LEN;
  const u8* b = row + (u64)(per > 1 ? index / per : index) * block_bytes(format);
  const u32 j = per > 1 ? index % per : 0;
  switch (format) {
    case Q4_0: return decode({load_half(b), 8, 0.f}, nibble(b + 2, k));
    case Q4_1: return decode({load_half(b), 0, load_half(b + 2)}, nibble(b + 4, k));
    case INT4: return decode({load_half(b), (int)load_half(b + 2), 0.f}, nibble(b + 4, k));
    case Q5_0: return decode({load_half(b), 16, 0.f}, nibble(b + 6, k) | fifth(b + 2, k));
    case Q5_1: return decode({load_half(b), 0, load_half(b + 2)}, nibble(b + 8, k) | fifth(b + 4, k));
    case Q8_0: return decode({load_half(b), 128, 0.f}, b[2 + k] ^ 0x80u);
    case Q4_K:
    case Q5_K: {
      u32 scale, min;
      scale_and_min(b + 4, j, scale, min);
      const u8* quants = b + (format == Q4_K ? 16 : 48);
      u32 code = quants[j / 2 * BLOCK_LEN + k] >> (j % 2 * 4) & 15;
      if (format == Q5_K) code |= (u32)(b[16 + k] >> j & 1) << 4;
      return decode({mul_rn(load_half(b), (float)scale), 0, -mul_rn(load_half(b + 2), (float)min)}, code);
    }
    default: {  // Q6_K
      const u32 part = j / 4, t = j % 4;
      const u32 low = b[part * 64 + t % 2 * 32 + k] >> (t / 2 * 4) & 15;
      const u32 high = b[128 + part * 32 + k] >> (2 * t) & 3;
      const float scale = mul_rn(load_half(b + 208), (float)(signed char)b[192 + 2 * j + k / 16]);
      return decode({scale, 32, 0.f}, low | high << 4);
    }
  }
}

// Element `column` of a row of plain numbers, at any byte.
PHX_DEV float file_number(u32 format, const u8* row, u32 column) {
  if (format == F32) {
    const u8* p = row + (u64)column * 4;
    return __uint_as_float((u32)load_u16(p) | (u32)load_u16(p + 2) << 16);
  }
  const u16 bits = load_u16(row + (u64)column * 2);
  return format == F16 ? to_float(f16{bits}) : to_float(bf16{bits});
}

// The packed layout's planes of one matrix.
struct Packed {
  const u8* codes;
  const u8* scales;
};
PHX_DEV Scale packed_scale(u32 format, const u8* scales, u64 block) {
  if (format == Q4_1) {
    const u32 both = ((const u32*)scales)[block];
    return {to_float(f16{(u16)both}), 0, to_float(f16{(u16)(both >> 16)})};
  }
  if (format == INT4) {
    const u32 both = ((const u32*)scales)[block];
    return {to_float(f16{(u16)both}), (int)to_float(f16{(u16)(both >> 16)}), 0.f};
  }
  return {to_float(((const f16*)scales)[block]), format == Q8_0 ? 128 : 8, 0.f};
}
// Weight k (of 32) of block `block`, counted over all rows.
PHX_DEV float packed_weight(u32 format, Packed p, u64 block, u32 k) {
  const u8* codes = p.codes + block * packed_code_bytes(format);
  const u32 code = format == Q8_0 ? codes[k] ^ 0x80u : nibble(codes, k);
  return decode(packed_scale(format, p.scales, block), code);
}
