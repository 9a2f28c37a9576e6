//! The area that all ranks share for activations.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::segment::Segment;

/// [`arena_bytes`](crate::GroupShape::arena_bytes) of memory that every rank of the group sees at the same offsets (not
/// at the same addresses), page-aligned and zero at first. It stays mapped for as long as any clone of the handle lives.
///
/// Nothing here says who may write what. A rank's writes are seen by all others after the next
/// [`barrier`](crate::RankPort::barrier) that both pass; writing to bytes that another rank may read or write without a
/// barrier in between is a data race.
#[derive(Clone, Debug)]
pub struct Arena {
    segment: Arc<Segment>,
}

impl Arena {
    pub(crate) fn new(segment: Arc<Segment>) -> Self {
        Self { segment }
    }

    pub fn as_ptr(&self) -> NonNull<u8> {
        let offset = self.segment.layout().arena_offset;
        // SAFETY: the layout puts the arena within the mapping, whose base is not null.
        unsafe { NonNull::new_unchecked(self.segment.base().add(offset)) }
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.segment.shape().arena_bytes as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
