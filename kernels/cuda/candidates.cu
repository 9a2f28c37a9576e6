// Sampling candidates of rows of logits (kernels/src/cpu/candidates.rs, kernels/src/candidates.rs, kernels/src/philox.rs).
//
// Three kernels in stream order; a request is one sampled row over one part of the vocabulary, whose ids are those of
// the buffer's columns. A chunk is VOCAB_CHUNK ids; `max_chunks` is the largest number of chunks of a request.
//
// candidate_chunks: edits, scales and masks a chunk, and takes its statistics and its perturbed winner.
//   logits [..][logits_stride] f32, requests [n], edits: all requests' edits, each request's by rising id
//   masks: all requests' masks; bit i % 32 of a mask's word i / 32 lets column i be drawn
//   scaled [n][max_chunks * VOCAB_CHUNK] f32: scaled logits, negative infinity beyond the vocabulary
//   statistics [n][max_chunks], winners [n][max_chunks]
//   grid (max_chunks, n), block 128
//
// candidate_winners: the best of each request's chunks: results[request]. An id of NO_TOKEN: all were banned, or no noise.
//   grid (n), block 32
//
// select_top: the ids of each request's `top` largest values; equal values count by rising id, and negative infinity never.
//   raw 0: values are the scaled logits, at most request.top; raw 1: the raw logits, at most request.raw_top
//   ids [sum of the tops], request r's from request.top_start (raw: raw_top_start) on, in no order: the host sorts them
//   with `rank` of kernels/src/candidates.rs; counts [n]
//   top_raw, top_scaled: the values of ids, same places
//   grid (n), block 512
#include "phx.cuh"

const u32 VOCAB_CHUNK = 512;
// One call of the generator gives four words, for the tokens id, id + 8, id + 16 and id + 24.
const u32 CHUNK_THREADS = VOCAB_CHUNK / 4;
const u32 SELECT_THREADS = 512;
const u32 NO_TOKEN = 0xffffffffu;
const u32 NO_MASK = 0xffffffffu;
static_assert(CHUNK_THREADS == 128, "as in the launch bounds");

struct Request {
  // Row of the logits buffer; first id and number of ids.
  u32 row;
  u32 vocab_start;
  u32 vocab_len;
  u32 edits_start;
  u32 edits_len;
  float inverse_temperature;
  u32 has_noise;
  u32 seed[2];      // low, high
  u32 position[2];  // low, high
  u32 top;
  u32 top_start;
  u32 raw_top;
  u32 raw_top_start;
  // First word of the mask; NO_MASK: every token may be drawn.
  u32 mask_start;
};
struct Edit {
  u32 id;
  float repetition;
  float add;
};
// Largest value and sum(exp(x - max)).
struct Statistics {
  float scaled_max;
  float scaled_sum;
  float raw_max;
  float raw_sum;
};
struct Winner {
  float value;
  u32 id;
  float raw;
  float scaled;
  u32 finite;
};

// Philox4x32-10 (Salmon et al., 2011).
PHX_DEV void philox4x32(u32 (&c)[4], u32 k0, u32 k1) {
#pragma unroll
  for (u32 round = 0; round < 10; round++) {
    const u64 a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
    c[0] = (u32)(b >> 32) ^ c[1] ^ k0;
    c[1] = (u32)b;
    c[2] = (u32)(a >> 32) ^ c[3] ^ k1;
    c[3] = (u32)a;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// Natural logarithm of a positive normal number: the very operations of kernels/src/cpu/math.rs (fdlibm's e_log.c), so
// that all backends draw the same tokens.
PHX_DEV double natural_log(double x) {
  const u64 SQRT_HALF = 0x3fe6a09e667f3bcdull;
  const double LN_2_HIGH = bits_double(0x3fe62e42fee00000ull), LN_2_LOW = bits_double(0x3dea39ef35793c76ull);
  const double COEFFICIENTS[7] = {1.4798198605116585910e-01, 1.5313837699209373320e-01, 1.8183572161618050120e-01,
                                  2.2222198432149784100e-01, 2.8571428743662391490e-01, 3.9999999999409419080e-01,
                                  6.6666666666667351300e-01};
  const long long exponent = (long long)(double_bits(x) - SQRT_HALF) >> 52;
  const double k = (double)exponent, f = bits_double(double_bits(x) - ((u64)exponent << 52)) - 1.0;
  const double s = f / (2.0 + f), z = mul_rn(s, s);
  double r = 0.0;
#pragma unroll
  for (u32 i = 0; i < 7; i++) r = mul_rn(r + COEFFICIENTS[i], z);
  const double half_square = mul_rn(mul_rn(0.5, f), f);
  const double low = mul_rn(s, half_square + r) + mul_rn(k, LN_2_LOW);
  return mul_rn(k, LN_2_HIGH) - ((half_square - low) - f);
}

// Standard Gumbel noise of a uniform word.
PHX_DEV float gumbel(u32 word) {
  const double uniform = ((double)word + 0.5) * 0x1p-32;
  return (float)-natural_log(-natural_log(uniform));
}

// Sorts by falling value, then rising id; the zeros are one value. As `rank` of kernels/src/candidates.rs, for unsigned
// comparison. NaN counts as negative infinity: neither is ever chosen.
PHX_DEV u32 rank_key(float value) {
  const u32 bits = __float_as_uint(value == value ? value + 0.f : NEGATIVE_INFINITY);
  const u32 rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~rising;
}
PHX_DEV bool before(float value, u32 id, float other, u32 other_id) {
  return value > other || (value == other && id < other_id);
}

PHX_DEV float edited(const Edit* edits, u32 len, u32 id, float logit) {
  u32 low = 0, high = len;
  while (low < high) {
    const u32 middle = (low + high) / 2;
    if (edits[middle].id < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == len || edits[low].id != id) return logit;
  const Edit edit = edits[low];
  return add_rn(logit > 0.f ? logit / edit.repetition : mul_rn(logit, edit.repetition), edit.add);
}

// A warp's best, then the block's: all threads of warp 0 get it.
PHX_DEV Winner warp_best(Winner best) {
#pragma unroll
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
    const Winner other = {__shfl_xor_sync(FULL_WARP, best.value, distance), __shfl_xor_sync(FULL_WARP, best.id, distance),
                          __shfl_xor_sync(FULL_WARP, best.raw, distance),
                          __shfl_xor_sync(FULL_WARP, best.scaled, distance), 0};
    const u32 finite = best.finite & __shfl_xor_sync(FULL_WARP, best.finite, distance);
    if (before(other.value, other.id, best.value, best.id)) best = other;
    best.finite = finite;
  }
  return best;
}
PHX_DEV Winner nobody() { return {NEGATIVE_INFINITY, NO_TOKEN, NEGATIVE_INFINITY, NEGATIVE_INFINITY, 1}; }

PHX_KERNEL __launch_bounds__(128)
candidate_chunks(float* __restrict__ scaled, Statistics* __restrict__ statistics, Winner* __restrict__ winners,
                 const float* __restrict__ logits, u32 logits_stride, const Request* __restrict__ requests,
                 const Edit* __restrict__ edits, const u32* __restrict__ masks) {
  const Request request = requests[blockIdx.y];
  const u32 first = blockIdx.x * VOCAB_CHUNK;
  if (first >= request.vocab_len) return;
  const float* row = logits + (u64)request.row * logits_stride;
  const u64 chunk = (u64)blockIdx.y * gridDim.x + blockIdx.x;

  // vocab_start is a multiple of VOCAB_CHUNK: places in the chunk and token ids agree modulo 32.
  const u32 place = threadIdx.x / 8 * 32 + threadIdx.x % 8;
  u32 words[4] = {(request.vocab_start + first) / 4 + threadIdx.x, 0, request.position[0], request.position[1]};
  if (request.has_noise) philox4x32(words, request.seed[0], request.seed[1]);
  float raw[4], value[4];
  Winner best = nobody();
#pragma unroll
  for (u32 w = 0; w < 4; w++) {
    const u32 column = first + place + 8 * w, id = request.vocab_start + column;
    raw[w] = value[w] = NEGATIVE_INFINITY;
    if (column < request.vocab_len) {
      raw[w] = row[column];
      best.finite &= (__float_as_uint(raw[w]) & 0x7f800000u) != 0x7f800000u;
      const bool allowed =
          request.mask_start == NO_MASK || (masks[request.mask_start + column / 32] >> column % 32 & 1) != 0;
      if (allowed) {
        value[w] =
            mul_rn(edited(edits + request.edits_start, request.edits_len, id, raw[w]), request.inverse_temperature);
      }
      if (request.has_noise && value[w] > NEGATIVE_INFINITY) {
        const float noisy = value[w] + gumbel(words[w]);
        if (before(noisy, id, best.value, best.id)) best = {noisy, id, raw[w], value[w], best.finite};
      }
    }
    scaled[chunk * VOCAB_CHUNK + place + 8 * w] = value[w];
  }

  const float scaled_max = block_max<CHUNK_THREADS>(fmaxf(fmaxf(value[0], value[1]), fmaxf(value[2], value[3])));
  const float raw_max = block_max<CHUNK_THREADS>(fmaxf(fmaxf(raw[0], raw[1]), fmaxf(raw[2], raw[3])));
  float scaled_sum = 0.f, raw_sum = 0.f;
#pragma unroll
  for (u32 w = 0; w < 4; w++) {
    if (first + place + 8 * w < request.vocab_len) {
      // A chunk of banned tokens has no weight.
      scaled_sum += scaled_max > NEGATIVE_INFINITY ? expf(value[w] - scaled_max) : 0.f;
      raw_sum += expf(raw[w] - raw_max);
    }
  }
  scaled_sum = block_sum<CHUNK_THREADS>(scaled_sum);
  raw_sum = block_sum<CHUNK_THREADS>(raw_sum);

  __shared__ Winner of_warp[CHUNK_THREADS / WARP];
  best = warp_best(best);
  if (lane_id() == 0) of_warp[warp_id()] = best;
  __syncthreads();
  if (warp_id() > 0) return;
  best = warp_best(lane_id() < CHUNK_THREADS / WARP ? of_warp[lane_id()] : nobody());
  if (lane_id() == 0) {
    statistics[chunk] = {scaled_max, scaled_sum, raw_max, raw_sum};
    winners[chunk] = best;
  }
}

PHX_KERNEL __launch_bounds__(32)
candidate_winners(Winner* __restrict__ results, const Winner* __restrict__ winners, const Request* __restrict__ requests,
                  u32 max_chunks) {
  const u32 chunks = div_ceil(requests[blockIdx.x].vocab_len, VOCAB_CHUNK);
  Winner best = nobody();
  for (u32 chunk = threadIdx.x; chunk < chunks; chunk += WARP) {
    const Winner other = winners[(u64)blockIdx.x * max_chunks + chunk];
    const u32 finite = best.finite & other.finite;
    if (before(other.value, other.id, best.value, best.id)) best = other;
    best.finite = finite;
  }
  best = warp_best(best);
  if (threadIdx.x == 0) results[blockIdx.x] = best;
}

// Number of earlier threads of the block with `flag`, and of all.
struct Count {
  u32 earlier;
  u32 all;
};
PHX_DEV Count count_flags(bool flag) {
  __shared__ u32 of_warp[SELECT_THREADS / WARP];
  const u32 ballot = __ballot_sync(FULL_WARP, flag);
  __syncthreads();  // the previous call's readers are done
  if (lane_id() == 0) of_warp[warp_id()] = __popc(ballot);
  __syncthreads();
  Count count = {(u32)__popc(ballot & ((1u << lane_id()) - 1)), 0};
#pragma unroll 1
  for (u32 w = 0; w < SELECT_THREADS / WARP; w++) {
    if (w < warp_id()) count.earlier += of_warp[w];
    count.all += of_warp[w];
  }
  return count;
}

// The `top`-th smallest key of a row (counted from 1, at most as many as there are), by four passes over its bytes, and
// how many keys are smaller.
struct Threshold {
  u32 key;
  u32 smaller;
};
PHX_DEV Threshold find_threshold(const float* values, u32 len, u32 top) {
  __shared__ u32 histogram[256];
  __shared__ Threshold found;
  u32 prefix = 0, smaller = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (u32 i = threadIdx.x; i < 256; i += SELECT_THREADS) histogram[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < len; i += SELECT_THREADS) {
      const u32 key = rank_key(values[i]);
      const bool same_prefix = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
      if (same_prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 digit = 0, before_digit = smaller;
      while (digit < 255 && before_digit + histogram[digit] < top) before_digit += histogram[digit++];
      found = {prefix | digit << shift, before_digit};
    }
    __syncthreads();
    prefix = found.key;
    smaller = found.smaller;
  }
  return {prefix, smaller};
}

PHX_KERNEL __launch_bounds__(512)
select_top(u32* __restrict__ ids, float* __restrict__ top_raw, float* __restrict__ top_scaled, u32* __restrict__ counts,
           const float* __restrict__ scaled, const float* __restrict__ logits, u32 logits_stride,
           const Request* __restrict__ requests, u32 max_chunks, u32 raw) {
  const Request request = requests[blockIdx.x];
  const float* raw_row = logits + (u64)request.row * logits_stride;
  const float* scaled_row = scaled + (u64)blockIdx.x * max_chunks * VOCAB_CHUNK;
  const float* values = raw ? raw_row : scaled_row;
  const u32 len = request.vocab_len, top = min(raw ? request.raw_top : request.top, len);
  const u32 start = raw ? request.raw_top_start : request.top_start;
  if (top == 0) {
    if (threadIdx.x == 0) counts[blockIdx.x] = 0;
    return;
  }
  const Threshold threshold = find_threshold(values, len, top);
  // Smaller keys fill the front in rising id, then come as many keys equal to the threshold, the smallest ids of them.
  u32 smaller = 0, equal = threshold.smaller;
  for (u32 base = 0; base < len; base += SELECT_THREADS) {
    const u32 i = base + threadIdx.x;
    const u32 key = i < len ? rank_key(values[i]) : 0;
    const bool valid = i < len && values[i] > NEGATIVE_INFINITY;
    const bool is_smaller = valid && key < threshold.key, is_equal = valid && key == threshold.key;
    const Count smaller_count = count_flags(is_smaller), equal_count = count_flags(is_equal);
    const u32 place = is_smaller ? smaller + smaller_count.earlier : equal + equal_count.earlier;
    if ((is_smaller || is_equal) && place < top) {
      ids[start + place] = request.vocab_start + i;
      top_raw[start + place] = raw_row[i];
      top_scaled[start + place] = scaled_row[i];
    }
    smaller += smaller_count.all;
    equal += equal_count.all;
  }
  if (threadIdx.x == 0) counts[blockIdx.x] = min(equal, top);
}
