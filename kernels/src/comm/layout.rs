//! What a gather's layout must be.

use crate::{GatherLayout, KernelError, Result};

/// An error unless the layout describes a buffer of `rows` rows of `width` values.
pub(super) fn check_layout(
    layout: GatherLayout<'_>,
    world_size: usize,
    rows: usize,
    width: usize,
) -> Result<()> {
    let fits = match layout {
        GatherLayout::Columns(ranges) => {
            ranges.len() == world_size && ranges.iter().all(|r| r.start <= r.end && r.end <= width)
        }
        GatherLayout::Rows(writers) => {
            writers.len() == rows && writers.iter().all(|&w| (w as usize) < world_size)
        }
    };
    if fits {
        return Ok(());
    }
    let message = format!("{layout:?} for {world_size} ranks, {rows} rows of {width}");
    Err(KernelError::Shape {
        op: "all_gather",
        message,
    })
}
