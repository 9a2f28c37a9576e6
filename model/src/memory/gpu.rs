//! What things take on a GPU.

use crate::TensorFormat;

/// What a rank takes of its GPU beside weights, KV cache and activations until it has been measured: the kernels'
/// scratch (64 MiB), cublasLt's (32 MiB), a step's input (16 MiB), and what is left over in allocations.
pub const GPU_OVERHEAD_BYTES: u64 = 192 << 20;

/// NCCL's buffers and its share of the context: 16 channels of a send and a receive buffer with their protocols, 8 MiB
/// each. An estimate; a clique is made after the KV cache.
pub const NCCL_BYTES: u64 = 256 << 20;

/// `cuMemAlloc` gives whole pages of the device.
pub(super) const ALLOCATION_GRANULE: u64 = 2 << 20;

const BF16_BYTES: usize = 2;
/// Rows begin at multiples of so many elements.
const BF16_ROW_ALIGN: usize = 8;

/// Bytes of a matrix as the CUDA backend holds it: bf16, whatever the file has.
pub(super) fn matrix_bytes(_format: TensorFormat, rows: usize, cols: usize) -> usize {
    rows * cols.next_multiple_of(BF16_ROW_ALIGN) * BF16_BYTES
}
