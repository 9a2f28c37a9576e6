//! How many values of a row are at least as large as a given one.

use std::sync::atomic::{AtomicU32, Ordering};

use super::buffer::CpuBuffer;
use super::exec::{Exec, check};
use crate::{Result, Threshold};

pub(crate) fn count_at_least(
    exec: Exec<'_>,
    x: &CpuBuffer,
    columns: usize,
    thresholds: &[Threshold],
) -> Result<Vec<u32>> {
    const OP: &str = "count_at_least";
    check(OP, columns <= u32::MAX as usize, || format!("{columns} columns"))?;
    for threshold in thresholds {
        x.check(OP, threshold.row.saturating_add(1), columns)?;
    }
    // Each is stored by one task; the pool's end of work publishes it.
    let counts: Vec<AtomicU32> = thresholds.iter().map(|_| AtomicU32::new(0)).collect();
    exec.for_rows(thresholds.len(), columns, |tasks| {
        for (threshold, count) in thresholds[tasks.clone()].iter().zip(&counts[tasks]) {
            let row = &x.row(threshold.row)[..columns];
            let reached = row.iter().map(|&value| u32::from(value >= threshold.value));
            count.store(reached.sum(), Ordering::Relaxed);
        }
    });
    Ok(counts.into_iter().map(AtomicU32::into_inner).collect())
}
