//! A step's positions, slots and tables in device memory.

use std::cell::RefCell;

use super::attention::AttentionPlan;
use super::backend::CudaBackend;
use super::memory::Region;
use crate::batch::CheckedBatch;
use crate::{BatchInput, Result};

/// Arrays start at multiples of so many entries: 16 bytes, for vector loads.
const ALIGNMENT: usize = 4;

/// A [`BatchInput`] whose parts fit together, on the device.
pub struct CudaBatch {
    checked: CheckedBatch,
    region: Region,
    /// Where each array starts, in entries of 4 bytes.
    starts: [usize; ARRAYS],
    /// How attention divides the step's work: made by the first layer, used by all.
    pub(crate) attention_plan: RefCell<Option<AttentionPlan>>,
}

const ARRAYS: usize = 6;

/// What kernels read, in the order in which it lies.
fn arrays(input: &BatchInput) -> [&[u32]; ARRAYS] {
    [
        &input.token_ids,
        &input.positions,
        &input.slot_mapping,
        &input.cu_seqlens_q,
        &input.block_tables,
        &input.cu_blocks,
    ]
}

impl CudaBatch {
    /// One upload, in stream order.
    ///
    /// # Errors
    /// [`KernelError::Shape`](crate::KernelError::Shape) if lengths, offsets or positions contradict each other,
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory) if the step is larger than the memory for steps.
    pub(crate) fn new(backend: &CudaBackend, input: &BatchInput) -> Result<Self> {
        let checked = CheckedBatch::new(input.clone())?;
        let arrays = arrays(checked.input());
        let mut packed: Vec<u32> = Vec::with_capacity(arrays.iter().map(|a| a.len() + ALIGNMENT).sum());
        let starts = arrays.map(|array| {
            let start = packed.len();
            packed.extend(array);
            packed.resize(packed.len().next_multiple_of(ALIGNMENT), 0);
            start
        });
        let region = backend.upload_step(&packed)?;
        Ok(Self {
            checked,
            region,
            starts,
            attention_plan: RefCell::default(),
        })
    }

    pub(crate) fn checked(&self) -> &CheckedBatch {
        &self.checked
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.checked.input().num_rows()
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
    pub(crate) fn block_tables(&self) -> u64 {
        self.array(4)
    }
    pub(crate) fn cu_blocks(&self) -> u64 {
        self.array(5)
    }
}
