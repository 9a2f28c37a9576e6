// The paged cache (kernels/src/cpu/kv_cache.rs): K and V of a layer are two arrays
// [num_blocks][num_kv_heads][block_size][KV_STRIDE] of KV_FORMAT elements. KV_STRIDE is HEAD_DIM rounded up to 8, so that
// every row is 16-byte aligned, and 8-byte aligned in E4M3; the padding holds zeros. E4M3 has no scale.
//
// Parameters: HEAD_DIM; KV_FORMAT, one of F32 (0), F16 (1), BF16 (30), E4M3 (257).
#pragma once
#include "phx.cuh"

const u32 KV_STRIDE = (HEAD_DIM + 7) / 8 * 8;

template <u32 FORMAT>
struct ElementOf;
template <>
struct ElementOf<F32> {
  typedef float type;
};
template <>
struct ElementOf<F16> {
  typedef f16 type;
};
template <>
struct ElementOf<BF16> {
  typedef bf16 type;
};
template <>
struct ElementOf<E4M3> {
  typedef e4m3 type;
};
typedef ElementOf<KV_FORMAT>::type KvElement;

// First element of the row of a slot (block * block_size + offset) and a KV head.
PHX_DEV u64 kv_row(u32 block, u32 offset, u32 kv_head, u32 num_kv_heads, u32 block_size) {
  return (((u64)block * num_kv_heads + kv_head) * block_size + offset) * KV_STRIDE;
}
