//! Rotary position embedding: `kernels/cuda/rotary.cu`.

use phalanx_model::RopeLayout;

use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{F32, Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use crate::error::check;
use crate::{Heads, Result, Rope};

/// As many as the kernel has shared memory for.
const MAX_PAIRS: usize = 256;

pub(crate) fn rotary_embedding(
    backend: &CudaBackend,
    qkv: &mut CudaBuffer,
    rope: &Rope<'_, CudaBackend>,
    heads: &Heads,
    batch: &CudaBatch,
) -> Result<()> {
    const OP: &str = "rotary_embedding";
    let (rows, pairs) = (batch.num_rows(), rope.inverse_frequencies.len);
    qkv.check(OP, rows, heads.qkv_width())?;
    check(OP, 2 * pairs <= heads.head_dim && pairs <= MAX_PAIRS, || {
        format!(
            "{pairs} pairs in heads of {}; at most {MAX_PAIRS}",
            heads.head_dim
        )
    })?;
    if pairs == 0 {
        return Ok(());
    }
    let args = [
        Pointer(qkv.ptr()),
        U32(u32_of(OP, qkv.width())?),
        U32(u32_of(OP, heads.num_q + heads.num_kv)?),
        U32(u32_of(OP, heads.head_dim)?),
        Pointer(batch.positions()),
        Pointer(rope.inverse_frequencies.region.ptr()),
        U32(u32_of(OP, pairs)?),
        F32(rope.attention_factor),
        U32(match rope.layout {
            RopeLayout::Half => 0,
            RopeLayout::Interleaved => 1,
        }),
    ];
    // SAFETY: the parameters of `rotary_embedding`; the heads lie within the rows of `qkv`, and a head has all pairs.
    unsafe { backend.launch(OP, Grid::rows(rows, 128), &args) }
}
