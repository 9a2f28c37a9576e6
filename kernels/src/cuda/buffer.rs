//! Activations: f32 `[rows, width]` in device memory, row-major and dense.

use super::memory::Region;
use crate::Result;
use crate::error::check;

/// Activations in device memory.
pub struct CudaBuffer {
    region: Region,
    rows: usize,
    width: usize,
}

impl CudaBuffer {
    /// `region` holds `rows * width` f32.
    pub(crate) fn new(region: Region, rows: usize, width: usize) -> Self {
        Self { region, rows, width }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.region.ptr()
    }

    /// Address of a column of the first row.
    pub(crate) fn column(&self, column: usize) -> u64 {
        self.ptr() + (column * size_of::<f32>()) as u64
    }

    /// An error unless there are so many rows of at least so many values.
    pub(crate) fn check(&self, op: &'static str, rows: usize, width: usize) -> Result<()> {
        check(op, rows <= self.rows && width <= self.width, || {
            format!(
                "rows {rows} x {width} in a buffer of {} x {}",
                self.rows, self.width
            )
        })
    }

    /// An error unless rows are exactly so wide.
    pub(crate) fn check_width(&self, op: &'static str, rows: usize, width: usize) -> Result<()> {
        self.check(op, rows, width)?;
        check(op, self.width == width, || {
            format!("rows of {} values where they must be {width}", self.width)
        })
    }
}

/// A short f32 vector in device memory.
pub struct CudaVector {
    pub(crate) region: Region,
    pub(crate) len: usize,
}
