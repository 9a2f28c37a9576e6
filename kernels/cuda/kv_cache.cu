// The op that writes the cache (kernels/src/cpu/kv_cache.rs).
//
// reshape_and_cache: the k and v heads of row t of qkv go to slot slot_mapping[t].
//   k_cache, v_cache: see kv_layout.cuh; kv: first k head of row 0 of qkv (k heads, then v heads), rows qkv_stride apart
//   slot_mapping [rows], each slot once (of equal ones either row wins), all within the cache or NO_SLOT: padding
//   grid (rows), block 128
// Parameters: HEAD_DIM, KV_FORMAT
#include "kv_layout.cuh"

const u32 THREADS = 128;
const u32 NO_SLOT = 0xffffffff;

PHX_KERNEL __launch_bounds__(128)
reshape_and_cache(KvElement* __restrict__ k_cache, KvElement* __restrict__ v_cache, const float* __restrict__ kv,
                  u32 qkv_stride, const u32* __restrict__ slot_mapping, u32 num_kv_heads, u32 block_size) {
  const u32 slot = slot_mapping[blockIdx.x], block = slot / block_size, offset = slot % block_size;
  if (slot == NO_SLOT) return;
  const float* row = kv + (u64)blockIdx.x * qkv_stride;
  for (u32 i = threadIdx.x; i < 2 * num_kv_heads * KV_STRIDE; i += THREADS) {
    const u32 head = i / KV_STRIDE, dim = i % KV_STRIDE, kv_head = head % num_kv_heads;
    KvElement* cache = head < num_kv_heads ? k_cache : v_cache;
    const float value = dim < HEAD_DIM ? row[head * HEAD_DIM + dim] : 0.f;
    from_float(cache[kv_row(block, offset, kv_head, num_kv_heads, block_size) + dim], value);
  }
}
