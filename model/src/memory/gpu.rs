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

/// Of an op in a CUDA graph: its node, its arguments and its share of the launch buffers. An estimate.
const GRAPH_OP_BYTES: u64 = 8 << 10;
/// Ops of a layer's decode step, and of what comes before and after all layers.
const OPS_PER_LAYER: u64 = 14;
const OTHER_OPS: u64 = 12;

/// What of the ranks' GPUs, and of how they are used, decides bytes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuPlacement {
    /// What a rank takes beside weights, KV cache, activations, graphs and NCCL's buffers: [`GPU_OVERHEAD_BYTES`], or
    /// what was measured.
    pub overhead: u64,
    /// Whether all of them multiply 8-bit floats: if not, such weights are bf16.
    pub multiplies_e4m3: bool,
    /// CUDA graphs that a rank captures, of decode steps of as many sizes.
    pub num_graphs: usize,
}

impl Default for GpuPlacement {
    fn default() -> Self {
        Self {
            overhead: GPU_OVERHEAD_BYTES,
            multiplies_e4m3: false,
            num_graphs: 0,
        }
    }
}

impl GpuPlacement {
    /// Bytes of a matrix as the CUDA backend holds it. None if `cols` cuts a block.
    pub(super) fn matrix_bytes(&self, format: TensorFormat, rows: usize, cols: usize) -> Option<usize> {
        let held = match format {
            TensorFormat::F8_E4M3 if !self.multiplies_e4m3 => TensorFormat::BF16,
            format => format,
        };
        held.gpu_bytes(rows, cols)
    }

    /// Bytes of all CUDA graphs of a model of so many layers. An estimate.
    pub(super) fn graph_bytes(&self, layers: usize) -> u64 {
        self.num_graphs as u64 * (layers as u64 * OPS_PER_LAYER + OTHER_OPS) * GRAPH_OP_BYTES
    }
}
