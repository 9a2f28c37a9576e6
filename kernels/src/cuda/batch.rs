//! A step's positions, slots and tables in device memory.

use std::cell::RefCell;

use super::attention::AttentionPlan;
use super::backend::CudaBackend;
use super::memory::Region;
use crate::batch::CheckedBatch;
use crate::error::check;
use crate::{BatchInput, DecodeShape, KernelError, Result};

/// Arrays start at multiples of so many entries: 16 bytes, for vector loads.
const ALIGNMENT: usize = 4;
/// Of rows that are padding: their K and V go nowhere.
const NO_SLOT: u32 = u32::MAX;

/// A [`BatchInput`] whose parts fit together, on the device.
pub struct CudaBatch {
    checked: CheckedBatch,
    /// Padding included.
    rows: usize,
    region: Region,
    starts: [usize; ARRAYS],
    /// How attention divides the step's work: made by the first layer, used by all.
    pub(crate) attention_plan: RefCell<Option<AttentionPlan>>,
}

const ARRAYS: usize = 6;

/// What kernels read, in the order in which it lies. The block tables, whose length depends on more than the rows, are
/// last.
fn arrays(input: &BatchInput) -> [&[u32]; ARRAYS] {
    [
        &input.token_ids,
        &input.positions,
        &input.slot_mapping,
        &input.cu_seqlens_q,
        &input.cu_blocks,
        &input.block_tables,
    ]
}

/// Where arrays of these lengths start, in entries of 4 bytes.
fn starts(lengths: [usize; ARRAYS]) -> [usize; ARRAYS] {
    let mut next = 0usize;
    lengths.map(|length| {
        let start = next;
        next = start.saturating_add(length).next_multiple_of(ALIGNMENT);
        start
    })
}

impl CudaBatch {
    /// One upload, in stream order.
    ///
    /// # Errors
    /// [`KernelError::Shape`](crate::KernelError::Shape) if lengths, offsets or positions contradict each other,
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory) if the step is larger than the memory for steps.
    pub(crate) fn new(backend: &CudaBackend, input: &BatchInput) -> Result<Self> {
        let checked = CheckedBatch::new(input.clone())?;
        let starts = starts(arrays(checked.input()).map(<[u32]>::len));
        let region = backend.upload_step(&pack(arrays(checked.input()), starts))?;
        Ok(Self {
            rows: checked.input().num_rows(),
            checked,
            region,
            starts,
            attention_plan: RefCell::default(),
        })
    }

    /// Without rows, at an address that stays, with room for every step of `shape` whose block tables fit into the
    /// memory for a step.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory).
    pub(crate) fn fixed(backend: &CudaBackend, shape: &DecodeShape) -> Result<Self> {
        let (rows, tables) = (shape.rows, shape.rows.saturating_mul(shape.blocks_per_row));
        let starts = starts([rows, rows, rows, rows + 1, rows + 1, tables]);
        let words = starts[ARRAYS - 1].saturating_add(tables);
        let bytes = words.saturating_mul(size_of::<u32>()).min(backend.step_bytes);
        Ok(Self {
            checked: CheckedBatch::new(BatchInput::default())?,
            rows: 0,
            region: backend.fixed_region(bytes)?,
            starts,
            attention_plan: RefCell::new(Some(AttentionPlan::fixed(backend, shape)?)),
        })
    }

    /// Makes a batch that stays a step of `rows` rows: those of `input`, one of each sequence, and padding: token 0 at
    /// position 0 of a sequence that nobody attends to.
    ///
    /// # Errors
    /// As [`new`](Self::new), and for a sequence of several rows.
    pub(crate) fn refill(&mut self, backend: &CudaBackend, input: &BatchInput, rows: usize) -> Result<()> {
        const OP: &str = "a decode step";
        let checked = CheckedBatch::new(input.clone())?;
        let (given, room) = (input.num_rows(), self.starts[1]);
        check(OP, given <= rows && rows <= room, || {
            format!("{given} rows in {rows} of at most {room}")
        })?;
        check(
            OP,
            (0..).zip(&input.cu_seqlens_q).all(|(i, &start)| start == i),
            || format!("{given} rows of {} sequences", input.num_sequences()),
        )?;
        let mut padded = input.clone();
        padded.token_ids.resize(rows, 0);
        padded.positions.resize(rows, 0);
        padded.slot_mapping.resize(rows, NO_SLOT);
        let packed = pack(arrays(&padded), self.starts);
        let bytes = size_of_val(packed.as_slice());
        if bytes > self.region.bytes() {
            return Err(KernelError::OutOfMemory {
                what: OP,
                requested: bytes,
                free: self.region.bytes(),
            });
        }
        backend.upload(&self.region, &packed)?;
        if let Some(plan) = self.attention_plan.get_mut() {
            plan.refill(backend, input, rows)?;
        }
        (self.checked, self.rows) = (checked, rows);
        Ok(())
    }

    pub(crate) fn checked(&self) -> &CheckedBatch {
        &self.checked
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.rows
    }

    /// Of device memory.
    pub(crate) fn bytes(&self) -> usize {
        self.region.bytes()
    }

    fn array(&self, index: usize) -> u64 {
        self.region.ptr() + (self.starts[index] * size_of::<u32>()) as u64
    }
    pub(crate) fn token_ids(&self) -> u64 {
        self.array(0)
    }
    pub(crate) fn positions(&self) -> u64 {
        self.array(1)
    }
    pub(crate) fn slot_mapping(&self) -> u64 {
        self.array(2)
    }
    pub(crate) fn cu_seqlens_q(&self) -> u64 {
        self.array(3)
    }
    pub(crate) fn cu_blocks(&self) -> u64 {
        self.array(4)
    }
    pub(crate) fn block_tables(&self) -> u64 {
        self.array(5)
    }
}

/// Each array at its start, zeros between them.
fn pack(arrays: [&[u32]; ARRAYS], starts: [usize; ARRAYS]) -> Vec<u32> {
    let mut packed = Vec::with_capacity(starts[ARRAYS - 1] + arrays[ARRAYS - 1].len());
    for (array, start) in arrays.into_iter().zip(starts) {
        packed.resize(start, 0);
        packed.extend(array);
    }
    packed
}
