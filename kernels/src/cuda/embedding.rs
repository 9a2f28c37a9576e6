//! Ops that copy rows: `kernels/cuda/embedding.cu`.

use std::ops::Range;

use phalanx_model::TensorFormat;

use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use super::weight::{CudaWeight, Storage, padded};
use crate::Result;
use crate::error::check;

const THREADS: u32 = 256;

pub(crate) fn embedding(
    backend: &CudaBackend,
    out: &mut CudaBuffer,
    table: &CudaWeight,
    vocab: Range<usize>,
    batch: &CudaBatch,
) -> Result<()> {
    const OP: &str = "embedding";
    let rows = batch.num_rows();
    out.check_width(OP, rows, table.cols())?;
    check(OP, vocab.len() <= table.rows(), || {
        format!("vocabulary {vocab:?} in a table of {} rows", table.rows())
    })?;
    let [segment] = table.segments() else {
        return check(OP, table.rows() == 0, || {
            "a table of parts that are stored differently".to_owned()
        });
    };
    let (format, stride) = match segment.storage() {
        Storage::Fp8(_) => {
            return check(OP, false, || "a table of E4M3".to_owned());
        }
        Storage::Bf16(_) => (TensorFormat::BF16, padded(table.cols())),
        Storage::Packed { format, .. } => (*format, table.cols()),
    };
    let args = [
        Pointer(out.ptr()),
        Pointer(segment.row(0)),
        Pointer(segment.scales(0)),
        U32(format.gguf_type()),
        U32(u32_of(OP, stride)?),
        Pointer(batch.token_ids()),
        U32(u32_of(OP, vocab.start)?),
        U32(u32_of(OP, vocab.end)?),
        U32(u32_of(OP, table.cols())?),
    ];
    // SAFETY: the parameters of `embedding`; tokens of `vocab` have a row in the table, others are left out.
    unsafe { backend.launch(OP, Grid::rows(rows, THREADS), &args) }
}

pub(crate) fn select_rows(
    backend: &CudaBackend,
    out: &mut CudaBuffer,
    x: &CudaBuffer,
    rows: &[u32],
) -> Result<()> {
    const OP: &str = "select_rows";
    out.check_width(OP, rows.len(), x.width())?;
    for &row in rows {
        x.check(OP, row as usize + 1, x.width())?;
    }
    let chosen = backend.upload_step(rows)?;
    let args = [
        Pointer(out.ptr()),
        Pointer(x.ptr()),
        Pointer(chosen.ptr()),
        U32(u32_of(OP, x.width())?),
    ];
    // SAFETY: the parameters of `select_rows`; every row is in `x`, and `out` has a row for each. The memory of
    // `chosen` is given out again only in stream order.
    unsafe { backend.launch(OP, Grid::rows(rows.len(), THREADS), &args) }
}
