//! K and V of one layer in blocks, and the op that writes them. Layout: `kernels/cuda/kv_layout.cuh`.

use std::sync::Arc;

use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid, Kernels,
};
use super::memory::Region;
use super::shape::u32_of;
use crate::error::check;
use crate::{Heads, KernelError, KvSpec, Result};

/// Rows of the cache are padded to a multiple of so many elements.
const PADDING: usize = 8;

/// K and V of one layer in device memory.
pub struct CudaKvCache {
    spec: KvSpec,
    k: Region,
    v: Region,
    /// The kernels for this head size and element type.
    kernels: Arc<Kernels>,
}

impl CudaKvCache {
    pub(crate) fn new(backend: &CudaBackend, spec: KvSpec) -> Result<Self> {
        const OP: &str = "kv_cache";
        check(OP, spec.block_size > 0 && spec.head_dim > 0, || {
            format!("blocks of {} positions of {}", spec.block_size, spec.head_dim)
        })?;
        let bytes = half_bytes(&spec).ok_or(KernelError::OutOfMemory {
            what: "KV cache",
            requested: usize::MAX,
            free: 0,
        })?;
        Ok(Self {
            spec,
            k: backend.kv.alloc(&backend.device, bytes)?,
            v: backend.kv.alloc(&backend.device, bytes)?,
            kernels: backend.kv_kernels(&spec)?,
        })
    }

    pub(crate) fn spec(&self) -> &KvSpec {
        &self.spec
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Addresses of K and of V.
    pub(crate) fn ptrs(&self) -> [u64; 2] {
        [self.k.ptr(), self.v.ptr()]
    }

    /// An error unless the cache is of these heads.
    pub(crate) fn check_heads(&self, op: &'static str, heads: &Heads) -> Result<()> {
        let spec = &self.spec;
        check(
            op,
            (spec.num_kv_heads, spec.head_dim) == (heads.num_kv, heads.head_dim),
            || {
                format!(
                    "{} heads of {} in a cache of {} heads of {}",
                    heads.num_kv, heads.head_dim, spec.num_kv_heads, spec.head_dim
                )
            },
        )
    }
}

/// Bytes of K, and of V.
fn half_bytes(spec: &KvSpec) -> Option<usize> {
    let row = spec.head_dim.checked_next_multiple_of(PADDING)?;
    [
        spec.num_blocks,
        spec.num_kv_heads,
        spec.block_size,
        spec.dtype.bytes(),
    ]
    .into_iter()
    .try_fold(row, usize::checked_mul)
}

pub(crate) fn reshape_and_cache(
    backend: &CudaBackend,
    kv: &mut CudaKvCache,
    qkv: &CudaBuffer,
    heads: &Heads,
    batch: &CudaBatch,
) -> Result<()> {
    const OP: &str = "reshape_and_cache";
    let rows = batch.num_rows();
    qkv.check(OP, rows, heads.qkv_width())?;
    kv.check_heads(OP, heads)?;
    batch
        .checked()
        .check_slots(OP, kv.spec.num_blocks.saturating_mul(kv.spec.block_size))?;
    let [k, v] = kv.ptrs();
    let args = [
        Pointer(k),
        Pointer(v),
        Pointer(qkv.column(heads.num_q * heads.head_dim)),
        U32(u32_of(OP, qkv.width())?),
        Pointer(batch.slot_mapping()),
        U32(u32_of(OP, heads.num_kv)?),
        U32(u32_of(OP, kv.spec.block_size)?),
    ];
    // SAFETY: the parameters of `reshape_and_cache` in kernels/cuda/kv_cache.cu. The rows of `qkv` are as wide as the
    // heads, and every slot is within the cache: checked above.
    unsafe {
        kv.kernels
            .launch(&backend.device, OP, Grid::rows(rows, 128), &args)
    }
}
