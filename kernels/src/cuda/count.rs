//! How many values of a row are at least as large as a given one: `kernels/cuda/count.cu`.

use super::backend::CudaBackend;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use crate::{KernelError, Result, Threshold};

const THREADS: u32 = 256;

pub(crate) fn count_at_least(
    backend: &CudaBackend,
    x: &CudaBuffer,
    columns: usize,
    thresholds: &[Threshold],
) -> Result<Vec<u32>> {
    const OP: &str = "count_at_least";
    if thresholds.is_empty() {
        return Ok(Vec::new());
    }
    let mut packed = Vec::with_capacity(2 * thresholds.len());
    for threshold in thresholds {
        x.check(OP, threshold.row.saturating_add(1), columns)?;
        packed.extend([u32_of(OP, threshold.row)?, threshold.value.to_bits()]);
    }
    let (requested, free) = (size_of_val(thresholds), backend.scratch.bytes());
    if requested > free {
        return Err(KernelError::OutOfMemory {
            what: "the counts of a step",
            requested,
            free,
        });
    }
    let uploaded = backend.upload_step(&packed)?;
    let args = [
        Pointer(backend.scratch.ptr()),
        Pointer(x.ptr()),
        U32(u32_of(OP, x.width())?),
        U32(u32_of(OP, columns)?),
        Pointer(uploaded.ptr()),
    ];
    // SAFETY: the parameters of `count_at_least`; every threshold names a row of `x`, which has so many columns, and the
    // scratch memory holds a count for each. The memory of `uploaded` is given out again only in stream order.
    unsafe { backend.launch(OP, Grid::rows(thresholds.len(), THREADS), &args) }?;
    backend.download(&backend.scratch, thresholds.len())
}
