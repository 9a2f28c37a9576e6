//! RMS normalization: `kernels/cuda/norm.cu`.

use super::backend::CudaBackend;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{F32, Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use crate::{Norm, Result};

const THREADS: u32 = 256;

pub(crate) fn rms_norm(
    backend: &CudaBackend,
    out: &mut CudaBuffer,
    x: &CudaBuffer,
    norm: &Norm<'_, CudaBackend>,
    rows: usize,
) -> Result<()> {
    const OP: &str = "rms_norm";
    let width = norm.weight.len;
    out.check_width(OP, rows, width)?;
    x.check_width(OP, rows, width)?;
    let args = [
        Pointer(out.ptr()),
        Pointer(x.ptr()),
        Pointer(norm.weight.region.ptr()),
        U32(u32_of(OP, width)?),
        F32(norm.eps),
    ];
    // SAFETY: the parameters of `rms_norm`; both buffers have `rows` rows of `width`, and the weight is so long.
    unsafe { backend.launch(OP, Grid::rows(rows, THREADS), &args) }
}

/// `residual += delta; out = rms_norm(residual)`
pub(crate) fn fused_add_rms_norm(
    backend: &CudaBackend,
    [out, residual]: [&mut CudaBuffer; 2],
    delta: &CudaBuffer,
    norm: &Norm<'_, CudaBackend>,
    rows: usize,
) -> Result<()> {
    const OP: &str = "fused_add_rms_norm";
    let width = norm.weight.len;
    for buffer in [&*out, residual, delta] {
        buffer.check_width(OP, rows, width)?;
    }
    let args = [
        Pointer(out.ptr()),
        Pointer(residual.ptr()),
        Pointer(delta.ptr()),
        Pointer(norm.weight.region.ptr()),
        U32(u32_of(OP, width)?),
        F32(norm.eps),
    ];
    // SAFETY: the parameters of `fused_add_rms_norm`; the buffers have `rows` rows of `width`, and the weight is so long.
    unsafe { backend.launch(OP, Grid::rows(rows, THREADS), &args) }
}
