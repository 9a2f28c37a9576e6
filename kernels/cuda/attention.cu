// Causal attention over the paged cache (kernels/src/cpu/attention): FlashAttention-2's online softmax (Dao, 2023) on
// tensor cores, over tiles of 64 positions.
//
// A query vector is one row's q head. Positions are cut into spans of SPAN, always at the same places; a vector's result
// is the fold, in rising order, of its spans' partial results, and a position that it does not see adds exactly
// nothing. So its bits depend neither on the vectors beside it, nor on how the prompt was cut, nor on which of the two
// kernels computed it: `chunk` folds a span into `out` when it is done with it, `split` gives every span a block of its
// own and leaves the same fold to `combine`.
//
// Work comes as lists in device memory with their lengths, and blocks stride over them: the grid says how much of the
// device is used, not how much there is to do, so that one graph serves every step of its size.
//
// paged_attention_chunk: whole vectors of the sequences in `tasks`.
//   grid (any, num_kv), block 128, 64 vectors a task
// paged_attention_split: partial results of the sequences in `tasks`, for few rows over long contexts.
//   grid (any, num_kv), block 32, the sequence's vectors of one KV head (at most 16) over one span a task
// paged_attention_combine: rows of the step from their partial results.
//   grid (any, num_q), block 64
//
//   ChunkTask: `tile` counts a sequence's vectors of one KV head from 0 in 64s; a sequence needs
//     ceil(its rows * min(group_size, num_q) / 64) tasks.
//   SplitTask: `partial` is where the sequence's first row has its partial result for `span`; those of its other rows
//     follow.
//   Combination: the partial results of `row` are `partial + span * stride`.
//   out: first column to write of the step's first row, f32, rows out_stride apart
//   partial_sums [partial results][num_q][HEAD_DIM] f32, partial_weights [partial results][num_q][2] f32
//   (largest score, sum of weights relative to it)
// Parameters: HEAD_DIM, KV_FORMAT. Queries, K, V and weights are multiplied in bf16, with an f16 or E4M3 cache in f16.
#include "kv_layout.cuh"

static_assert(HEAD_DIM >= 1 && HEAD_DIM <= 128, "a vector's sums must fit in registers");

const u32 TILE = 64;
const u32 SPAN = 512;
static_assert(SPAN % TILE == 0, "a tile lies in one span");
// Vectors of a warp: the rows of one mma.
const u32 VECTORS = 16;
// Head dimension that mma sees, and elements from one row in shared memory to the next: the odd multiple of 16 bytes
// keeps eight rows out of each other's banks.
const u32 DIM = (HEAD_DIM + 15) / 16 * 16;
const u32 PITCH = DIM + 8;
const float LOWEST = -3.402823466e+38f;
const float LOG2_E = 1.44269504088896f;

template <u32 FORMAT>
struct MultipliedAs {
  typedef bf16 type;
};
template <>
struct MultipliedAs<F16> {
  typedef f16 type;
};
template <>
struct MultipliedAs<E4M3> {
  typedef f16 type;
};
typedef MultipliedAs<KV_FORMAT>::type Factor;

struct ChunkTask {
  u32 sequence;
  u32 tile;
};
struct SplitTask {
  u32 sequence;
  u32 span;
  u32 partial;
};
struct Combination {
  u32 row;
  u32 partial;
  u32 stride;
};

// What attention reads; by value.
struct Attention {
  const float* qkv;
  const KvElement* k_cache;
  const KvElement* v_cache;
  // As in kernels/src/batch.rs.
  const u32* positions;
  const u32* cu_seqlens_q;
  const u32* block_tables;
  const u32* cu_blocks;
  u32 qkv_stride;
  u32 block_size;
  // As in kernels/src/backend.rs, Heads. sliding_window 0: none.
  u32 num_q;
  u32 num_kv;
  u32 q_start;
  u32 kv_start;
  u32 group_size;
  u32 sliding_window;
};

struct Range {
  u32 start;
  u32 end;
};
PHX_DEV Range visible(const Attention& a, u32 row) {
  const u32 end = a.positions[row] + 1;
  return {a.sliding_window != 0 && end > a.sliding_window ? end - a.sliding_window : 0, end};
}

// State of a vector over some spans. Finite at the start, so that what is not seen changes nothing: 2^(max - max) is 1.
struct State {
  float max;
  float weight;
};
// How much the sums so far, and those of one more span, count in the fold of both.
struct Factors {
  float old_sums;
  float new_sums;
};
PHX_DEV Factors fold(State& total, State span) {
  const float max = fmaxf(total.max, span.max);
  const Factors f = {exp2_fast(total.max - max), exp2_fast(span.max - max)};
  total.weight = fma_rn(total.weight, f.old_sums, mul_rn(span.weight, f.new_sums));
  total.max = max;
  return f;
}
PHX_DEV float fold_sum(Factors f, float old_sum, float new_sum) {
  return fma_rn(old_sum, f.old_sums, mul_rn(new_sum, f.new_sums));
}

// A tile of K or of V in shared memory.
struct Rows {
  Factor values[TILE][PITCH];
};

// Copies the positions from `first` that lie in `seen`; zeros elsewhere, for memory there may hold anything. Done after
// cp_wait.
template <u32 THREADS>
PHX_DEV void load_tile(Rows& to, const KvElement* cache, const Attention& a, const u32* block_table, u32 kv_head,
                       u32 first, Range seen) {
  const u32 CHUNK = 8;
  for (u32 i = threadIdx.x; i < TILE * (DIM / CHUNK); i += THREADS) {
    const u32 row = i / (DIM / CHUNK), column = i % (DIM / CHUNK) * CHUNK, position = first + row;
    const bool valid = position >= seen.start && position < seen.end && column < KV_STRIDE;
    const KvElement* from = cache;
    if (valid) {
      const u32 block = block_table[position / a.block_size];
      from += kv_row(block, position % a.block_size, kv_head, a.num_kv, a.block_size) + column;
    }
    Factor* at = &to.values[row][column];
    if constexpr (KV_FORMAT == F32) {
      u32 pairs[4] = {};
      if (valid) {
        const float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
        pairs[0] = packed<Factor>(low.x, low.y);
        pairs[1] = packed<Factor>(low.z, low.w);
        pairs[2] = packed<Factor>(high.x, high.y);
        pairs[3] = packed<Factor>(high.z, high.w);
      }
      *(uint4*)at = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else if constexpr (KV_FORMAT == E4M3) {
      const uint2 codes = valid ? *(const uint2*)from : make_uint2(0, 0);
      *(uint4*)at = make_uint4(e4m3x2_to_f16x2(codes.x), e4m3x2_to_f16x2(codes.x >> 16), e4m3x2_to_f16x2(codes.y),
                               e4m3x2_to_f16x2(codes.y >> 16));
    } else {
      cp_async16(at, from, valid);
    }
  }
  cp_commit();
}

// One warp's 16 query vectors. A lane has, of each mma result, elements 0 and 1 of vector lane / 4 and elements 2 and 3
// of vector lane / 4 + 8, in columns 2 (lane % 4) and the next: index [0] and [1] below.
struct Warp {
  u32 query[DIM / 16][4];
  float sums[DIM / 8][4];
  Range seen[2];
  State span[2];

  __device__ __forceinline__ void start_span() {
#pragma unroll
    for (u32 j = 0; j < DIM / 8; j++)
#pragma unroll
      for (u32 e = 0; e < 4; e++) sums[j][e] = 0.f;
    span[0] = span[1] = {LOWEST, 0.f};
  }

  // Loads the query at `vectors[h]`, null for none, times `scale`.
  __device__ __forceinline__ void load_query(const float* const (&vectors)[2], float scale) {
#pragma unroll
    for (u32 step = 0; step < DIM / 16; step++) {
#pragma unroll
      for (u32 e = 0; e < 4; e++) {
        const float* q = vectors[e % 2];
        const u32 column = step * 16 + e / 2 * 8 + lane_id() % 4 * 2;
        const float low = q && column < HEAD_DIM ? q[column] * scale : 0.f;
        const float high = q && column + 1 < HEAD_DIM ? q[column + 1] * scale : 0.f;
        query[step][e] = packed<Factor>(low, high);
      }
    }
  }

  // Scores of the tile's positions, in rising dimension.
  __device__ __forceinline__ void multiply_keys(float (&scores)[TILE / 8][4], const Rows& k) const {
    const u32 lane = lane_id();
#pragma unroll
    for (u32 j = 0; j < TILE / 8; j++)
#pragma unroll
      for (u32 e = 0; e < 4; e++) scores[j][e] = 0.f;
#pragma unroll
    for (u32 step = 0; step < DIM / 16; step++) {
#pragma unroll
      for (u32 pair = 0; pair < TILE / 16; pair++) {
        u32 b[4];
        ldmatrix_x4(b, &k.values[pair * 16 + lane % 8 + lane / 16 * 8][step * 16 + lane / 8 % 2 * 8]);
        mma_16816<Factor>(scores[2 * pair], query[step], {b[0], b[1]});
        mma_16816<Factor>(scores[2 * pair + 1], query[step], {b[2], b[3]});
      }
    }
  }

  // Scores to weights relative to the new maximum; 0 where the vector does not see.
  __device__ __forceinline__ void softmax(float (&scores)[TILE / 8][4], u32 first) {
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      float max = span[h].max;
#pragma unroll
      for (u32 j = 0; j < TILE / 8; j++) {
#pragma unroll
        for (u32 e = 2 * h; e < 2 * h + 2; e++) {
          const u32 position = first + j * 8 + lane_id() % 4 * 2 + e % 2;
          if (position < seen[h].start || position >= seen[h].end) scores[j][e] = NEGATIVE_INFINITY;
          max = fmaxf(max, scores[j][e]);
        }
      }
      max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, 1));
      max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, 2));
      const float factor = exp2_fast(span[h].max - max);
      float weight = 0.f;
#pragma unroll
      for (u32 j = 0; j < TILE / 8; j++) {
#pragma unroll
        for (u32 e = 2 * h; e < 2 * h + 2; e++) {
          scores[j][e] = exp2_fast(scores[j][e] - max);
          weight = add_rn(weight, scores[j][e]);
        }
      }
      span[h] = {max, fma_rn(span[h].weight, factor, weight)};
#pragma unroll
      for (u32 j = 0; j < DIM / 8; j++) {
        sums[j][2 * h] = mul_rn(sums[j][2 * h], factor);
        sums[j][2 * h + 1] = mul_rn(sums[j][2 * h + 1], factor);
      }
    }
  }

  // sums += weights * V, in rising position.
  __device__ __forceinline__ void add_values(const float (&weights)[TILE / 8][4], const Rows& v) {
    const u32 lane = lane_id();
#pragma unroll
    for (u32 step = 0; step < TILE / 16; step++) {
      const float(&low)[4] = weights[2 * step], (&high)[4] = weights[2 * step + 1];
      const u32 a[4] = {packed<Factor>(low[0], low[1]), packed<Factor>(low[2], low[3]), packed<Factor>(high[0], high[1]),
                        packed<Factor>(high[2], high[3])};
#pragma unroll
      for (u32 pair = 0; pair < DIM / 16; pair++) {
        u32 b[4];
        ldmatrix_x4_trans(b, &v.values[step * 16 + lane % 16][pair * 16 + lane / 16 * 8]);
        mma_16816<Factor>(sums[2 * pair], a, {b[0], b[1]});
        mma_16816<Factor>(sums[2 * pair + 1], a, {b[2], b[3]});
      }
    }
  }

  // The whole warp's sums of weights, in place of each lane's own.
  __device__ __forceinline__ void finish_span() {
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      span[h].weight += __shfl_xor_sync(FULL_WARP, span[h].weight, 1);
      span[h].weight += __shfl_xor_sync(FULL_WARP, span[h].weight, 2);
    }
  }
};

// The vectors of one task and KV head, and what they see together.
struct Vectors {
  u32 first_row;
  u32 first_q;
  u32 group;
  u32 first;
  u32 count;
  Range seen;

  // None (`count` 0) if the task lies beyond the KV head's vectors.
  __device__ __forceinline__ Vectors(const Attention& a, ChunkTask task, u32 kv_head, u32 per_task) {
    // q heads by their numbers in the whole model.
    const u32 head = a.kv_start + kv_head;
    const u32 start = max(head * a.group_size, a.q_start), end = min((head + 1) * a.group_size, a.q_start + a.num_q);
    group = end > start ? end - start : 0;
    first_q = start - a.q_start;
    first_row = a.cu_seqlens_q[task.sequence];
    const u32 all = (a.cu_seqlens_q[task.sequence + 1] - first_row) * group;
    first = task.tile * per_task;
    count = all > first ? min(all - first, per_task) : 0;
    if (count > 0) seen = {visible(a, row(0)).start, visible(a, row(count - 1)).end};
  }
  __device__ __forceinline__ u32 row(u32 vector) const { return first_row + (first + vector) / group; }
  __device__ __forceinline__ u32 q_head(u32 vector) const { return first_q + (first + vector) % group; }
};

// Attends to the positions in `range`, span by span; `done(warp, span)` gets each span's partial results.
template <u32 WARPS, class Done>
PHX_DEV void attend(const Attention& a, const Vectors& vectors, u32 sequence, u32 kv_head, Range range, Done done) {
  __shared__ __align__(16) Rows k, v;
  const u32 THREADS = WARPS * WARP;
  const u32* block_table = a.block_tables + a.cu_blocks[sequence];
  Warp warp;
  const float* queries[2];
#pragma unroll
  for (u32 h = 0; h < 2; h++) {
    const u32 vector = warp_id() * VECTORS + lane_id() / 4 + 8 * h;
    const bool exists = vector < vectors.count;
    warp.seen[h] = exists ? visible(a, vectors.row(vector)) : Range{0, 0};
    queries[h] = nullptr;
    if (exists) queries[h] = a.qkv + (u64)vectors.row(vector) * a.qkv_stride + vectors.q_head(vector) * HEAD_DIM;
  }
  warp.load_query(queries, LOG2_E / sqrtf((float)HEAD_DIM));
  warp.start_span();

  u32 first = range.start / TILE * TILE;
  load_tile<THREADS>(k, a.k_cache, a, block_table, kv_head, first, range);
  for (; first < range.end; first += TILE) {
    load_tile<THREADS>(v, a.v_cache, a, block_table, kv_head, first, range);
    cp_wait<1>();
    __syncthreads();
    float scores[TILE / 8][4];
    warp.multiply_keys(scores, k);
    __syncthreads();
    // K of the next tile travels while this tile's V is used. Beyond the range it is zeros, which nobody reads.
    load_tile<THREADS>(k, a.k_cache, a, block_table, kv_head, first + TILE, range);
    warp.softmax(scores, first);
    cp_wait<1>();
    __syncthreads();
    warp.add_values(scores, v);
    if ((first + TILE) % SPAN == 0 || first + TILE >= range.end) {
      warp.finish_span();
      done(warp, first / SPAN);
      warp.start_span();
    }
    __syncthreads();
  }
  cp_wait<0>();
}

// Calls `store(dimension, sum)` for the dimensions that the lane has of the vector [h].
template <class Store>
PHX_DEV void each_sum(const Warp& warp, u32 h, Store store) {
#pragma unroll
  for (u32 j = 0; j < DIM / 8; j++) {
#pragma unroll
    for (u32 e = 0; e < 2; e++) {
      const u32 dimension = j * 8 + lane_id() % 4 * 2 + e;
      if (dimension < HEAD_DIM) store(dimension, h == 0 ? warp.sums[j][e] : warp.sums[j][2 + e]);
    }
  }
}

PHX_KERNEL __launch_bounds__(128)
paged_attention_chunk(float* out, u32 out_stride, Attention a, const ChunkTask* __restrict__ tasks,
                      const u32* __restrict__ num_tasks) {
  const u32 WARPS = 4;
  for (u32 index = blockIdx.x; index < *num_tasks; index += gridDim.x) {
    const ChunkTask task = tasks[index];
    const Vectors vectors(a, task, blockIdx.y, WARPS * VECTORS);
    if (vectors.count == 0) continue;
    State total[2] = {{LOWEST, 0.f}, {LOWEST, 0.f}};
    attend<WARPS>(a, vectors, task.sequence, blockIdx.y, vectors.seen, [&](const Warp& warp, u32 span) {
#pragma unroll
      for (u32 h = 0; h < 2; h++) {
        const u32 vector = warp_id() * VECTORS + lane_id() / 4 + 8 * h;
        if (vector >= vectors.count || warp.span[h].weight == 0.f) continue;
        float* to = out + (u64)vectors.row(vector) * out_stride + vectors.q_head(vector) * HEAD_DIM;
        const bool is_first = total[h].weight == 0.f, is_last = (warp.seen[h].end - 1) / SPAN == span;
        const Factors factors = fold(total[h], warp.span[h]);
        each_sum(warp, h, [&](u32 dimension, float sum) {
          sum = fold_sum(factors, is_first ? 0.f : to[dimension], sum);
          to[dimension] = is_last ? sum / total[h].weight : sum;
        });
      }
    });
  }
}

// Shared memory lets few more than 8 blocks be resident. Not told so, ptxas keeps registers for more and spills (sm_100).
PHX_KERNEL __launch_bounds__(32, 8)
paged_attention_split(float* __restrict__ partial_sums, float* __restrict__ partial_weights, Attention a,
                      const SplitTask* __restrict__ tasks, const u32* __restrict__ num_tasks) {
  for (u32 index = blockIdx.x; index < *num_tasks; index += gridDim.x) {
    const SplitTask task = tasks[index];
    const Vectors vectors(a, {task.sequence, 0}, blockIdx.y, VECTORS);
    if (vectors.count == 0) continue;
    const u32 first = task.span * SPAN;
    const Range range = {max(vectors.seen.start, first), min(vectors.seen.end, first + SPAN)};
    if (range.start >= range.end) continue;
    attend<1>(a, vectors, task.sequence, blockIdx.y, range, [&](const Warp& warp, u32) {
#pragma unroll
      for (u32 h = 0; h < 2; h++) {
        const u32 vector = lane_id() / 4 + 8 * h;
        if (vector >= vectors.count) continue;
        const u32 partial = task.partial + vectors.row(vector) - vectors.first_row;
        const u64 at = (u64)partial * a.num_q + vectors.q_head(vector);
        each_sum(warp, h, [&](u32 dimension, float sum) { partial_sums[at * HEAD_DIM + dimension] = sum; });
        if (lane_id() % 4 == 0) {
          partial_weights[at * 2] = warp.span[h].max;
          partial_weights[at * 2 + 1] = warp.span[h].weight;
        }
      }
    });
  }
}

PHX_KERNEL __launch_bounds__(64)
paged_attention_combine(float* __restrict__ out, u32 out_stride, Attention a, const float* __restrict__ partial_sums,
                        const float* __restrict__ partial_weights, const Combination* __restrict__ combinations,
                        const u32* __restrict__ num_combinations) {
  const u32 q_head = blockIdx.y;
  for (u32 index = blockIdx.x; index < *num_combinations; index += gridDim.x) {
    const Combination of = combinations[index];
    const Range seen = visible(a, of.row);
    float* to = out + (u64)of.row * out_stride + q_head * HEAD_DIM;
    for (u32 dimension = threadIdx.x; dimension < HEAD_DIM; dimension += blockDim.x) {
      State total = {LOWEST, 0.f};
      float sum = 0.f;
      for (u32 span = seen.start / SPAN; span <= (seen.end - 1) / SPAN; span++) {
        const u64 at = (u64)(of.partial + span * of.stride) * a.num_q + q_head;
        const Factors factors = fold(total, {partial_weights[at * 2], partial_weights[at * 2 + 1]});
        sum = fold_sum(factors, sum, partial_sums[at * HEAD_DIM + dimension]);
      }
      to[dimension] = sum / total.weight;
    }
  }
}
