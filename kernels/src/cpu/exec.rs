//! How the ops use the machine: its threads and its instruction set.

use std::ops::Range;
use std::sync::OnceLock;

use super::pool::Pool;
use super::simd::Isa;
use crate::Result;

pub(crate) use crate::error::check;

/// Values worth a task of their own; smaller ones cost more to hand out than to do.
const VALUES_PER_TASK: usize = 8192;

#[derive(Clone, Copy)]
pub(crate) struct Exec<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) isa: Isa,
}

impl Exec<'_> {
    /// Calls `f` for disjoint ranges that tile `0..rows`, in parallel if rows of `width` values make it worth it.
    pub(crate) fn for_rows(&self, rows: usize, width: usize, f: impl Fn(Range<usize>) + Sync) {
        let per_task = (VALUES_PER_TASK / width.max(1)).max(1);
        self.pool.run(rows.div_ceil(per_task), |task| {
            f(task * per_task..rows.min((task + 1) * per_task));
        });
    }

    /// As [`Exec::for_rows`], for work that can fail; one of the errors is returned.
    pub(crate) fn try_for_rows(
        &self,
        rows: usize,
        width: usize,
        f: impl Fn(Range<usize>) -> Result<()> + Sync,
    ) -> Result<()> {
        let error = OnceLock::new();
        self.for_rows(rows, width, |range| {
            if let Err(e) = f(range) {
                // Another task's error is as good as this one.
                let _ = error.set(e);
            }
        });
        error.into_inner().map_or(Ok(()), Err)
    }
}
