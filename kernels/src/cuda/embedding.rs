//! Ops that copy rows: `kernels/cuda/embedding.cu`.

use std::ops::Range;

use cudarc::driver::result;
use phalanx_model::TensorFormat;

use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::buffer::CudaBuffer;
use super::error::driver;
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
        Storage::Bf16 => (TensorFormat::BF16, padded(table.cols())),
        Storage::Packed { format, .. } => (*format, table.cols()),
        Storage::E4m3 => return check(OP, false, || "a table of E4M3".to_owned()),
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
    if let Some(first) = run_start(rows) {
        return copy_rows(backend, out, x, first..first + rows.len());
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

/// The first of rows that follow each other: all rows of a step, or those of a step of single tokens.
fn run_start(rows: &[u32]) -> Option<usize> {
    let first = *rows.first()?;
    (first..)
        .zip(rows)
        .all(|(a, &b)| a == b)
        .then_some(first as usize)
}

/// One copy, and nothing is uploaded.
fn copy_rows(backend: &CudaBackend, out: &CudaBuffer, x: &CudaBuffer, rows: Range<usize>) -> Result<()> {
    let row_bytes = x.width() * size_of::<f32>();
    let from = x.ptr() + (rows.start * row_bytes) as u64;
    let bytes = rows.len() * row_bytes;
    // SAFETY: `select_rows` has checked that `x` has the rows and `out` as many of the same width.
    unsafe { result::memcpy_dtod_async(out.ptr(), from, bytes, backend.device.stream.cu_stream()) }
        .map_err(|e| driver("select_rows", e))
}
