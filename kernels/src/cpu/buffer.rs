//! Activations: f32 `[rows, width]`, row-major and dense.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::exec::check;
use super::memory::{Arena, Region};
use crate::{KernelError, Result};

/// Activations in memory of this process alone, or in memory of all ranks of a group on this host.
pub struct CpuBuffer {
    memory: Memory,
    rows: usize,
    width: usize,
}

enum Memory {
    Private(Region),
    Shared {
        start: NonNull<f32>,
        /// Keeps the memory mapped.
        _owner: Arc<dyn Any + Send + Sync>,
    },
}

// SAFETY: the memory is plain floats that the buffer owns, or shares under the contract of `CpuBuffer::shared`, which
// speaks of ranks and not of threads; the owner is `Send`.
unsafe impl Send for CpuBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for CpuBuffer {}

impl CpuBuffer {
    /// Zeroed memory of this process.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub(crate) fn private(arena: &Arena, rows: usize, width: usize) -> Result<Self> {
        let bytes = buffer_bytes(rows, width)?;
        let memory = Memory::Private(arena.alloc(bytes, "activations")?);
        Ok(Self { memory, rows, width })
    }

    /// A view into memory that other ranks see as well.
    ///
    /// # Safety
    /// `start` is aligned for f32 and valid for `rows * width` of them for as long as `owner` lives. The ranks write
    /// disjoint parts, and read what another rank writes only after a collective in between: it is what
    /// [`Communicator::all_gather`](crate::Communicator::all_gather) asks of its callers.
    pub(crate) unsafe fn shared(
        start: NonNull<f32>,
        rows: usize,
        width: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            memory: Memory::Shared { start, _owner: owner },
            rows,
            width,
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Whether all ranks see the memory.
    pub fn is_shared(&self) -> bool {
        matches!(self.memory, Memory::Shared { .. })
    }

    /// All rows.
    pub(crate) fn values(&self) -> &[f32] {
        match &self.memory {
            Memory::Private(region) => region.as_f32(),
            // SAFETY: valid for that many floats; nobody writes what this rank reads (`CpuBuffer::shared`).
            Memory::Shared { start, .. } => unsafe {
                std::slice::from_raw_parts(start.as_ptr(), self.rows * self.width)
            },
        }
    }

    /// All rows. Of a shared buffer only this rank's part may be written.
    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        match &mut self.memory {
            Memory::Private(region) => region.as_mut_f32(),
            // SAFETY: valid for that many floats, borrowed exclusively in this process; the other ranks neither read
            // nor write this rank's part now (`CpuBuffer::shared`).
            Memory::Shared { start, .. } => unsafe {
                std::slice::from_raw_parts_mut(start.as_ptr(), self.rows * self.width)
            },
        }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.width..][..self.width]
    }

    /// For writing disjoint rows from several threads.
    pub(crate) fn writer(&mut self) -> RowWriter<'_> {
        let start = match &mut self.memory {
            Memory::Private(region) => region.as_mut_f32().as_mut_ptr(),
            Memory::Shared { start, .. } => start.as_ptr(),
        };
        RowWriter {
            start,
            rows: self.rows,
            width: self.width,
            _buffer: PhantomData,
        }
    }

    /// An error unless the first `rows` rows exist and are at least `width` wide.
    pub(crate) fn check(&self, op: &'static str, rows: usize, width: usize) -> Result<()> {
        check(op, rows <= self.rows && width <= self.width, || {
            format!(
                "rows {rows} x {width} in a buffer of {} x {}",
                self.rows, self.width
            )
        })
    }
}

/// Bytes of a buffer.
///
/// # Errors
/// [`KernelError::OutOfMemory`] if they are not countable.
pub(crate) fn buffer_bytes(rows: usize, width: usize) -> Result<usize> {
    let bytes = rows
        .checked_mul(width)
        .and_then(|n| n.checked_mul(size_of::<f32>()));
    bytes
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or(KernelError::OutOfMemory {
            what: "activations",
            requested: usize::MAX,
            free: 0,
        })
}

/// An exclusively borrowed buffer whose rows go to different threads.
#[derive(Clone, Copy)]
pub(crate) struct RowWriter<'a> {
    start: *mut f32,
    rows: usize,
    width: usize,
    _buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: it hands out parts under the contract of `part`, which makes them disjoint.
unsafe impl Send for RowWriter<'_> {}
// SAFETY: as above.
unsafe impl Sync for RowWriter<'_> {}

impl<'a> RowWriter<'a> {
    /// Rows of `width` values.
    pub(crate) fn new(values: &'a mut [f32], width: usize) -> Self {
        let rows = values.len() / width;
        Self {
            start: values.as_mut_ptr(),
            rows,
            width,
            _buffer: PhantomData,
        }
    }

    /// The columns `columns` of row `row`.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    ///
    /// # Panics
    /// If they lie outside the buffer.
    pub(crate) unsafe fn part(&self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: within the buffer by the assertion; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.width + columns.start), columns.len())
        }
    }

    /// Row `row`.
    ///
    /// # Safety
    /// As [`RowWriter::part`].
    pub(crate) unsafe fn row(&self, row: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.part(row, 0..self.width) }
    }
}
