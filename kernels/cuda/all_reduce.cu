// One-shot all-reduce over memory that the ranks have opened of each other (CUDA IPC, NVLink), for short messages: every
// rank reads all ranks' values and adds them in rank order, so all get the same bits. The CPU's counterpart is
// Communicator::all_reduce of kernels/src/comm/shm.rs; the host's side is kernels/src/comm/nccl/one_shot.rs.
//
// one_shot_all_reduce: data[i] = sum over the ranks of their data[i], in place.
//   peers: of each rank, its staging memory [2][capacity] f32 and its flags [MAX_BLOCKS][MAX_RANKS] u32, zero at first
//   epochs [MAX_BLOCKS] u32 in the rank's own memory, zero at first: the kernel counts its calls itself, so a captured
//     graph can be replayed
//   abort: a word of host memory. Once it is not 0, a block that waits for a peer gives up and leaves its part of data
//     as it is: a peer may never come, and nobody reads the result of a group that has ended.
//   len: a multiple of 4, at most capacity, the same on all ranks; data and staging 16-byte aligned
//   capacity: the same on all ranks and in all calls; a multiple of 4 * THREADS * VECTORS_PER_THREAD, so many times as
//     there are blocks for the longest message, at most MAX_BLOCKS
//   grid (blocks), as many as have work: ceil(len / (4 * THREADS)), at most those of the longest message; block 256. All
//     blocks must be resident at once: a block waits for its peers'.
#include "phx.cuh"

const u32 THREADS = 256;
const u32 MAX_RANKS = 8;
const u32 MAX_BLOCKS = 64;
// Of the longest message.
const u32 VECTORS_PER_THREAD = 4;
// Looks at a flag between two looks at `abort`, which lies across the bus.
const u32 PATIENCE = 64;
static_assert(MAX_RANKS <= THREADS, "a thread per peer");

// By value.
struct Peers {
  float* staging[MAX_RANKS];
  u32* flags[MAX_RANKS];
};

// Waits until the peer behind `flag` has come to `epoch`, or one call further; epochs wrap. False if it is given up.
PHX_DEV bool arrived(const u32* flag, u32 epoch, const u32* abort) {
  for (u32 looks = 1; (int)(ld_acquire_sys(flag) - epoch) < 0; looks++) {
    if (looks % PATIENCE == 0 && ld_acquire_sys(abort) != 0) return false;
  }
  return true;
}

// A place of the staging memory belongs to one block, the same in all calls, so a block need not know of the others.
// A call uses the half of it that the block's previous one did not, so nobody waits at the end: a rank writes a
// half again two calls later, when its peers, which have entered the call between, are done with it.
PHX_KERNEL __launch_bounds__(256)
one_shot_all_reduce(float* data, const __grid_constant__ Peers peers, u32* epochs, const u32* abort, u32 rank, u32 ranks,
                    u32 len, u32 capacity) {
  __shared__ u32 given_up;
  const u32 epoch = epochs[blockIdx.x] + 1, vectors = len / 4, half = epoch % 2 * (capacity / 4);
  const u32 first = blockIdx.x * THREADS + threadIdx.x, stride = capacity / 4 / VECTORS_PER_THREAD;
  float4* values = (float4*)data;
  float4* own = (float4*)peers.staging[rank] + half;
  if (threadIdx.x == 0) given_up = 0;
  for (u32 i = first; i < vectors; i += stride) own[i] = values[i];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x < ranks) {
    st_release_sys(peers.flags[threadIdx.x] + blockIdx.x * MAX_RANKS + rank, epoch);
    const u32* flag = peers.flags[rank] + blockIdx.x * MAX_RANKS + threadIdx.x;
    if (!arrived(flag, epoch, abort)) given_up = 1;
  }
  __syncthreads();
  if (given_up) return;
  for (u32 i = first; i < vectors; i += stride) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (u32 r = 0; r < ranks; r++) {
      const float4 v = ((const float4*)peers.staging[r] + half)[i];
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    values[i] = sum;
  }
  if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
}
