//! Ops that copy rows: token embeddings, and the rows that are sampled.

use std::ops::Range;

use super::batch::CpuBatch;
use super::buffer::CpuBuffer;
use super::exec::{Exec, check};
use super::linear::PackedWeight;
use crate::Result;

/// `out[t] = table[token_ids[t] - vocab.start]` for tokens within `vocab`.
pub(crate) fn embedding(
    exec: Exec<'_>,
    out: &mut CpuBuffer,
    table: &PackedWeight,
    vocab: Range<usize>,
    batch: &CpuBatch,
) -> Result<()> {
    const OP: &str = "embedding";
    let token_ids = &batch.input().token_ids;
    out.check(OP, token_ids.len(), table.cols())?;
    check(OP, out.width() == table.cols(), || {
        format!(
            "embeddings of {} values for rows of {}",
            table.cols(),
            out.width()
        )
    })?;
    check(OP, vocab.len() <= table.rows(), || {
        format!("vocabulary {vocab:?} in a table of {} rows", table.rows())
    })?;
    let out = out.writer();
    exec.try_for_rows(token_ids.len(), table.cols(), |rows| {
        for row in rows {
            let token = token_ids[row] as usize;
            if vocab.contains(&token) {
                // SAFETY: each row is given to one task, and used once in it.
                table.dequantize_row(token - vocab.start, unsafe { out.row(row) })?;
            }
        }
        Ok(())
    })
}

/// `out[i] = x[rows[i]]`
pub(crate) fn select_rows(out: &mut CpuBuffer, x: &CpuBuffer, rows: &[u32]) -> Result<()> {
    const OP: &str = "select_rows";
    let width = x.width();
    out.check(OP, rows.len(), width)?;
    check(OP, out.width() == width, || {
        format!("rows of {width} values into rows of {}", out.width())
    })?;
    for (out, &row) in out.values_mut().chunks_exact_mut(width.max(1)).zip(rows) {
        x.check(OP, row as usize + 1, width)?;
        out.copy_from_slice(x.row(row as usize));
    }
    Ok(())
}
