//! A step's positions, slots and tables, checked once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::rotary::RopeTable;
use crate::batch::CheckedBatch;
use crate::{BatchInput, Result};

/// A [`BatchInput`] whose parts fit together.
pub struct CpuBatch {
    checked: CheckedBatch,
    /// The step's cosines and sines: computed by the first layer, used by all.
    rope_tables: Mutex<Vec<RopeTable>>,
}

impl CpuBatch {
    /// # Errors
    /// [`KernelError::Shape`](crate::KernelError::Shape) if lengths, offsets or positions contradict each other.
    pub(crate) fn new(input: BatchInput) -> Result<Self> {
        Ok(Self {
            checked: CheckedBatch::new(input)?,
            rope_tables: Mutex::default(),
        })
    }

    pub fn input(&self) -> &BatchInput {
        self.checked.input()
    }

    pub(crate) fn checked(&self) -> &CheckedBatch {
        &self.checked
    }

    pub(crate) fn rope_tables(&self) -> MutexGuard<'_, Vec<RopeTable>> {
        // Tables are pushed whole: a panic elsewhere cannot leave half of one.
        self.rope_tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
